"""The loop over the columns: round, keep apart, push the error onto what remains.

Letters: Wᵀ [in, rows], so that rows are lanes; U [in, in] upper, UᵀU = H⁻¹;
T [rows], outlier threshold; g = group size; E [in, rows], the errors
e_j = (w_j - ŵ_j)/U_jj made so far.

Columns are visited in *panels* of whole groups. A panel is first brought up to
date with the errors of all panels before it, W -= Uᵀ E, in one matrix product;
inside it every *step* of a few columns updates the rest of the panel at once. So
a group is always fitted on weights that all earlier errors have reached.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from spqr_jax.array import round_up
from spqr_jax.solver.grid import GridSpec, GroupFit, Objective, dequantize, fit_group, round_to_grid
from spqr_jax.solver.outliers import leave_one_out_gain

_PANEL = 128  # columns brought up to date by one matrix product, at least one group
_LOOK_BACK = 1024  # rows of E a panel's update reads at a time


@dataclasses.dataclass(frozen=True)
class ColumnSpec:
    """Static choices of the loop.

    Attributes:
      grid: how a group is fitted.
      group_size: columns a group; the padded `in` is a multiple of it.
      outliers: whether weights may be kept apart.
      compensate: whether errors are pushed on (False: round to nearest).
    """

    grid: GridSpec
    group_size: int
    outliers: bool
    compensate: bool

    def step(self) -> int:
        """Columns a step: at most 16, a divisor of the group size."""
        return 16 if self.group_size % 16 == 0 else 8

    def panel(self, columns: int) -> int:
        """Columns a panel: whole groups, about `_PANEL`, with little padding at the end."""
        group = self.group_size
        if columns <= _PANEL or group > _PANEL:
            return min(group * -(-columns // group), max(group, _PANEL // group * group))
        sizes = range(round_up(_PANEL // 2, group), _PANEL * 3 // 2 + 1, group)
        return min(sizes, key=lambda size: (round_up(columns, size), abs(size - _PANEL)))


class SolvedColumns(NamedTuple):
    """What the loop found, columns first."""

    codes: jax.Array  # u8 [in, rows]
    values: jax.Array  # f32 [in, rows], what codes and residuals dequantize to
    residual: jax.Array  # f16 [in, rows], what an outlier adds; 0 elsewhere
    outliers: jax.Array  # bool [in, rows]
    scale_codes: jax.Array  # u8 [groups, rows]
    zero_codes: jax.Array  # u8 [groups, rows]
    stats: jax.Array  # f16 [groups, rows/G, 4] or [groups, rows, 2]


class _Group(NamedTuple):
    """Rows of the loop's output that belong to one group."""

    fit: GroupFit
    codes: jax.Array
    values: jax.Array
    residual: jax.Array
    outliers: jax.Array
    errors: jax.Array


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    """aᵀ b in full float32."""
    return lax.dot_general(a, b, (((0,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)


def _fit(w: jax.Array, u_diag: jax.Array, valid: jax.Array, threshold: jax.Array, spec: ColumnSpec) -> GroupFit:
    """Fits one group [g, rows], outlier candidates left out."""
    w = jnp.where(valid[:, None], w, w[:1])  # padding must not widen the range
    importance = jnp.where(valid, 1.0 / jnp.square(u_diag), 0.0)
    keep = jnp.broadcast_to(valid[:, None], w.shape)
    if spec.outliers:
        keep &= leave_one_out_gain(w, importance[:, None], spec.grid.maxq) <= threshold
    return fit_group(w, keep, Objective(importance[:, None], threshold), spec.grid)


def _solve_step(
    w: jax.Array, u: jax.Array, valid: jax.Array, fit: GroupFit, threshold: jax.Array, spec: ColumnSpec
) -> tuple[jax.Array, ...]:
    """Rounds the columns of one step, one after the other: w [c, rows], u [c, c]."""
    maxq, index = spec.grid.maxq, jnp.arange(w.shape[0])

    def column(j: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        w, codes, values, residual, outliers, errors = state
        pivot = u[j, j]
        q = round_to_grid(w[j], fit.scale, fit.zero, maxq)
        value = dequantize(q, fit.scale, fit.zero)
        miss = w[j] - value
        if spec.outliers:
            is_outlier = (jnp.square(miss / pivot) > threshold) & valid[j]
            added = jnp.where(is_outlier, miss, 0.0).astype(jnp.float16)
            residual, outliers = residual.at[j].set(added), outliers.at[j].set(is_outlier)
            value = value + added.astype(jnp.float32)
            miss = w[j] - value
        error = miss / pivot
        if spec.compensate:
            w = w - jnp.where(index > j, u[j], 0.0)[:, None] * error
            errors = errors.at[j].set(error)
        return w, codes.at[j].set(q.astype(jnp.uint8)), values.at[j].set(value), residual, outliers, errors

    start = (
        w,
        jnp.zeros(w.shape, jnp.uint8),
        jnp.zeros(w.shape, jnp.float32),
        jnp.zeros(w.shape, jnp.float16),
        jnp.zeros(w.shape, bool),
        jnp.zeros(w.shape, jnp.float32),
    )
    return lax.fori_loop(0, w.shape[0], column, start)[1:]


def _solve_group(w: jax.Array, u: jax.Array, valid: jax.Array, threshold: jax.Array, spec: ColumnSpec) -> _Group:
    """Fits one up-to-date group [g, rows] and rounds it; u [g, g] is its diagonal block."""
    fit = _fit(w, jnp.diagonal(u), valid, threshold, spec)
    step, columns = spec.step(), w.shape[0]

    def body(w: jax.Array, first: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        u_rows = lax.dynamic_slice_in_dim(u, first, step)  # [step, g]
        solved = _solve_step(
            lax.dynamic_slice_in_dim(w, first, step),
            lax.dynamic_slice_in_dim(u_rows, first, step, axis=1),
            lax.dynamic_slice_in_dim(valid, first, step),
            fit,
            threshold,
            spec,
        )
        if spec.compensate and step < columns:
            after = jnp.arange(columns) >= first + step
            w = w - _product(jnp.where(after, u_rows, 0.0), solved[-1])
        return w, solved

    _, solved = lax.scan(body, w, jnp.arange(0, columns, step))
    return _Group(fit, *(part.reshape(w.shape) for part in solved))


def _solve_panel(w: jax.Array, u: jax.Array, valid: jax.Array, threshold: jax.Array, spec: ColumnSpec) -> _Group:
    """Rounds the groups of one up-to-date panel [p, rows]; u [p, p] is its diagonal block."""
    group, columns = spec.group_size, w.shape[0]

    def body(w: jax.Array, first: jax.Array) -> tuple[jax.Array, _Group]:
        u_rows = lax.dynamic_slice_in_dim(u, first, group)
        solved = _solve_group(
            lax.dynamic_slice_in_dim(w, first, group),
            lax.dynamic_slice_in_dim(u_rows, first, group, axis=1),
            lax.dynamic_slice_in_dim(valid, first, group),
            threshold,
            spec,
        )
        if spec.compensate and group < columns:
            after = jnp.arange(columns) >= first + group
            w = w - _product(jnp.where(after, u_rows, 0.0), solved.errors)
        return w, solved

    _, solved = lax.scan(body, w, jnp.arange(0, columns, group))
    return solved


@partial(jax.jit, static_argnames="spec")
def solve_columns(
    w: jax.Array, u: jax.Array | None, valid: jax.Array, threshold: jax.Array, spec: ColumnSpec
) -> SolvedColumns:
    """Quantizes Wᵀ [in, rows] column by column.

    Args:
      w: f32 [in, rows], columns in the order of visit; `in` a multiple of the
        panel, `rows` of the second level's tile.
      u: f32 [in, in], upper factor of H⁻¹ in that order; None for round to nearest.
      valid: bool [in], False for padding.
      threshold: f32 [rows], T; infinite for no outliers.
      spec: static choices.
    """
    columns, rows = w.shape
    panel = spec.panel(columns)
    if u is None:
        u = jnp.eye(panel, dtype=w.dtype)
    look_back = min(_LOOK_BACK, columns)

    def body(errors: jax.Array, first: jax.Array) -> tuple[jax.Array, _Group]:
        w_panel = lax.dynamic_slice_in_dim(w, first, panel)
        if not spec.compensate:
            return errors, _solve_panel(w_panel, u, valid_panel(first), threshold, spec)
        u_columns = lax.dynamic_slice_in_dim(u, first, panel, axis=1)  # [in, panel]

        def look(chunk: jax.Array, w_panel: jax.Array) -> jax.Array:
            # The last chunk may reach back over its neighbour: clear what was read before.
            start = jnp.minimum(chunk * look_back, columns - look_back)
            fresh = start + jnp.arange(look_back) >= chunk * look_back
            u_part = lax.dynamic_slice_in_dim(u_columns, start, look_back)
            e_part = lax.dynamic_slice_in_dim(errors, start, look_back)
            return w_panel - _product(jnp.where(fresh[:, None], u_part, 0.0), e_part)

        w_panel = lax.fori_loop(0, -(-first // look_back), look, w_panel)
        u_panel = lax.dynamic_slice_in_dim(u_columns, first, panel)
        solved = _solve_panel(w_panel, u_panel, valid_panel(first), threshold, spec)
        new = solved.errors.reshape(panel, rows)
        return lax.dynamic_update_slice_in_dim(errors, new, first, axis=0), solved

    def valid_panel(first: jax.Array) -> jax.Array:
        return lax.dynamic_slice_in_dim(valid, first, panel)

    errors = jnp.zeros((columns if spec.compensate else 1, rows), w.dtype)
    _, solved = lax.scan(body, errors, jnp.arange(0, columns, panel))
    fit = solved.fit

    def by_column(part: jax.Array) -> jax.Array:
        return part.reshape(columns, rows)

    def by_group(part: jax.Array) -> jax.Array:
        return part.reshape(-1, *part.shape[2:])

    return SolvedColumns(
        by_column(solved.codes),
        by_column(solved.values),
        by_column(solved.residual),
        by_column(solved.outliers),
        by_group(fit.scale_codes),
        by_group(fit.zero_codes),
        by_group(fit.stats),
    )
