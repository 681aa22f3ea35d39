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
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

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


class _Rounded(NamedTuple):
    """What rounding some columns gave, [columns, rows] each."""

    codes: jax.Array  # u8
    values: jax.Array  # f32
    residual: jax.Array  # f16
    outliers: jax.Array  # bool


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    """aᵀ b in full float32."""
    return lax.dot_general(a, b, (((0,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)


_Solve = Callable[[jax.Array, jax.Array, jax.Array], tuple[Any, jax.Array]]
"""Solves some columns: (w [c, rows], u [c, c], valid [c]) -> (what it found, errors [c, rows])."""


def _sweep(
    w: jax.Array, u: jax.Array, valid: jax.Array, width: int, solve: _Solve, compensate: bool
) -> tuple[Any, jax.Array]:
    """Solves columns `width` at a time, pushing each part's errors onto all columns after it.

    Args:
      w: [columns, rows], up to date with all errors made before them.
      u: [columns, columns], their diagonal block of U.
      valid: [columns].
      width: columns a part; divides their number.
      solve: solves one part.
      compensate: False leaves the columns after a part alone.

    Returns:
      What `solve` found, stacked, and the errors [columns, rows].
    """
    columns = w.shape[0]

    def body(w: jax.Array, first: jax.Array) -> tuple[jax.Array, tuple[Any, jax.Array]]:
        u_rows = lax.dynamic_slice_in_dim(u, first, width)  # [width, columns]
        found, errors = solve(
            lax.dynamic_slice_in_dim(w, first, width),
            lax.dynamic_slice_in_dim(u_rows, first, width, axis=1),
            lax.dynamic_slice_in_dim(valid, first, width),
        )
        if compensate and width < columns:
            after = jnp.arange(columns) >= first + width
            w = w - _product(jnp.where(after, u_rows, 0.0), errors)
        return w, (found, errors)

    _, (found, errors) = lax.scan(body, w, jnp.arange(0, columns, width))
    return found, errors.reshape(w.shape)


def _fit(w: jax.Array, u_diag: jax.Array, valid: jax.Array, threshold: jax.Array, spec: ColumnSpec) -> GroupFit:
    """Fits one group [g, rows], outlier candidates left out."""
    w = jnp.where(valid[:, None], w, w[:1])  # padding must not widen the range
    importance = jnp.where(valid, 1.0 / jnp.square(u_diag), 0.0)
    keep = jnp.broadcast_to(valid[:, None], w.shape)
    if spec.outliers:
        keep &= leave_one_out_gain(w, importance[:, None], spec.grid.maxq) <= threshold
    return fit_group(w, keep, Objective(importance[:, None], threshold), spec.grid)


def _round_columns(
    w: jax.Array, u: jax.Array, valid: jax.Array, fit: GroupFit, threshold: jax.Array, spec: ColumnSpec
) -> tuple[_Rounded, jax.Array]:
    """Rounds a few columns of one group, one after the other: w [c, rows], u [c, c]."""
    maxq, index = spec.grid.maxq, jnp.arange(w.shape[0])

    def column(j: jax.Array, state: tuple[jax.Array, _Rounded, jax.Array]) -> tuple[jax.Array, _Rounded, jax.Array]:
        w, found, errors = state
        q = round_to_grid(w[j], fit.scale, fit.zero, maxq)
        value = dequantize(q, fit.scale, fit.zero)
        if spec.outliers:
            miss = w[j] - value
            is_outlier = (jnp.square(miss / u[j, j]) > threshold) & valid[j]
            added = jnp.where(is_outlier, miss, 0.0).astype(jnp.float16)
            value = value + added.astype(jnp.float32)
            found = found._replace(
                residual=found.residual.at[j].set(added), outliers=found.outliers.at[j].set(is_outlier)
            )
        found = found._replace(codes=found.codes.at[j].set(q.astype(jnp.uint8)), values=found.values.at[j].set(value))
        if spec.compensate:
            error = (w[j] - value) / u[j, j]
            w = w - jnp.where(index > j, u[j], 0.0)[:, None] * error
            errors = errors.at[j].set(error)
        return w, found, errors

    def zeros(dtype: Any) -> jax.Array:
        return jnp.zeros(w.shape, dtype)

    nothing = _Rounded(zeros(jnp.uint8), zeros(jnp.float32), zeros(jnp.float16), zeros(bool))
    _, found, errors = lax.fori_loop(0, w.shape[0], column, (w, nothing, zeros(jnp.float32)))
    return found, errors


def _solve_group(
    w: jax.Array, u: jax.Array, valid: jax.Array, threshold: jax.Array, spec: ColumnSpec
) -> tuple[tuple[GroupFit, _Rounded], jax.Array]:
    """Fits one up-to-date group [g, rows] and rounds it; u [g, g] is its diagonal block."""
    fit = _fit(w, jnp.diagonal(u), valid, threshold, spec)
    solve = partial(_round_columns, fit=fit, threshold=threshold, spec=spec)
    found, errors = _sweep(w, u, valid, spec.step(), solve, spec.compensate)
    return (fit, found), errors


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
    solve_group = partial(_solve_group, threshold=threshold, spec=spec)

    def body(errors: jax.Array, first: jax.Array) -> tuple[jax.Array, tuple[GroupFit, _Rounded]]:
        w_panel = lax.dynamic_slice_in_dim(w, first, panel)
        valid_panel = lax.dynamic_slice_in_dim(valid, first, panel)
        if not spec.compensate:
            return errors, _sweep(w_panel, u, valid_panel, spec.group_size, solve_group, False)[0]
        u_columns = lax.dynamic_slice_in_dim(u, first, panel, axis=1)  # [in, panel]
        w_panel = _brought_up_to_date(w_panel, u_columns, errors, first)
        u_panel = lax.dynamic_slice_in_dim(u_columns, first, panel)
        found, made = _sweep(w_panel, u_panel, valid_panel, spec.group_size, solve_group, True)
        return lax.dynamic_update_slice_in_dim(errors, made, first, axis=0), found

    errors = jnp.zeros((columns if spec.compensate else 1, rows), w.dtype)
    _, (fit, found) = lax.scan(body, errors, jnp.arange(0, columns, panel))

    def by_group(part: jax.Array) -> jax.Array:  # [panels, groups, ...] -> [all groups, ...]
        return part.reshape(-1, *part.shape[2:])

    codes, values, residual, outliers = (part.reshape(columns, rows) for part in found)
    scale_codes, zero_codes, stats = (by_group(part) for part in (fit.scale_codes, fit.zero_codes, fit.stats))
    return SolvedColumns(codes, values, residual, outliers, scale_codes, zero_codes, stats)


def _brought_up_to_date(w: jax.Array, u: jax.Array, errors: jax.Array, first: jax.Array) -> jax.Array:
    """W - Uᵀ E over the columns before `first`: w [panel, rows], u [in, panel], errors [in, rows].

    E is read in chunks, so that columns not yet visited cost (almost) nothing.
    """
    columns = errors.shape[0]
    chunk = min(_LOOK_BACK, columns)

    def look(index: jax.Array, w: jax.Array) -> jax.Array:
        # The last chunk may reach back over its neighbour: clear what was read before.
        start = jnp.minimum(index * chunk, columns - chunk)
        fresh = start + jnp.arange(chunk) >= index * chunk
        u_part = lax.dynamic_slice_in_dim(u, start, chunk)
        e_part = lax.dynamic_slice_in_dim(errors, start, chunk)
        return w - _product(jnp.where(fresh[:, None], u_part, 0.0), e_part)

    return lax.fori_loop(0, -(-first // chunk), look, w)
