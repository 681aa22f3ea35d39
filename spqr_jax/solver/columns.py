"""The loop over the columns: round, keep apart, push the error onto what remains.

Letters: Wᵀ [in, rows], so that rows are lanes; U [in, in] upper, UᵀU = H⁻¹;
T [rows], outlier threshold; g = group size; E [in, rows], the errors
e_j = (w_j - ŵ_j)/U_jj made so far.

Columns are visited in *panels* of whole groups. A panel is first brought up to
date with the errors of all panels before it, W -= Uᵀ E, in one matrix product;
inside it every *step* of a few columns updates the rest of the panel at once. So
a group is always fitted on weights that all earlier errors have reached.

The loop carries weights and errors only. A weight does not change any more once
its turn has come, so codes and residuals are worked out at the end, all at once.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spqr_jax.layout import round_up
from spqr_jax.solver.grid import GridSpec, GroupFit, Objective, dequantize, fit_group, over_columns, round_to_grid
from spqr_jax.solver.outliers import leave_one_out_gain

_PANEL = 128  # columns brought up to date by one matrix product, at least one group
_CHUNK = 4096  # rows that an accelerator solves together; each is a thread
_FEW_ROWS = 256  # up to which rows come in multiples of about half as many


@dataclasses.dataclass(frozen=True)
class ColumnSpec:
    """Static choices of the loop.

    Attributes:
      grid: how a group is fitted.
      group_size: columns a group; the padded `in` is a multiple of it.
      outliers: whether weights may be kept apart.
      leave_one_out: whether a fit leaves outlier candidates out.
      compensate: whether errors are pushed on (False: round to nearest).
      rows_at_once: about how many rows an accelerator solves together.
    """

    grid: GridSpec
    group_size: int
    outliers: bool
    leave_one_out: bool
    compensate: bool
    rows_at_once: int = _CHUNK

    def step(self) -> int:
        """Columns a step: at most 16, a divisor of the group size."""
        return 16 if self.group_size % 16 == 0 else 8

    def panel(self, columns: int) -> int:
        """Columns a panel: whole groups, about `_PANEL`, with little padding at the end of several."""
        group = self.group_size
        if columns <= _PANEL or group > _PANEL or self.grid.at_once:
            return max(group, _PANEL // group * group)
        sizes = range(round_up(_PANEL // 2, group), _PANEL * 3 // 2 + 1, group)
        return min(sizes, key=lambda size: (round_up(columns, size), abs(size - _PANEL)))

    @property
    def chunk(self) -> int:
        """Rows that an accelerator solves together, whole tiles."""
        return round_up(self.rows_at_once, self.grid.stats_group_size if self.grid.quantized_stats else 1)

    def padded(self, columns: int, rows: int) -> tuple[int, int]:
        """Columns and rows with their padding, whole panels and tiles.

        Few rows take next to no time to solve and seconds to compile for: they are padded to few different numbers,
        on an accelerator to whole chunks.
        """
        tile = self.grid.stats_group_size if self.grid.quantized_stats else 1
        step = round_up(_FEW_ROWS // 2, tile) if rows <= _FEW_ROWS else tile
        if self.grid.at_once:
            step = self.chunk
        return round_up(columns, self.panel(columns)), round_up(rows, step)


class RowChoices(NamedTuple):
    """What may differ from row to row, and so from matrix to matrix of a stack."""

    threshold: jax.Array  # f32 [rows], T; infinite for no outliers
    maxq: jax.Array  # f32 [rows], largest code


class SolvedColumns(NamedTuple):
    """What the loop found, columns first."""

    codes: jax.Array  # u8 [in, rows]
    values: jax.Array  # f32 [in, rows], what codes stand for, without residuals
    residual: jax.Array  # f16 [in, rows], what an outlier adds; 0 elsewhere
    outliers: jax.Array  # bool [in, rows]
    scale_codes: jax.Array  # u8 [groups, rows]
    zero_codes: jax.Array  # u8 [groups, rows]
    stats: jax.Array  # f16 [groups, rows/G, 4] or [groups, rows, 2]
    loss: jax.Array  # f32 [rows], Σ_j e_j² = (w-ŵ) H (w-ŵ)ᵀ with the damped H; 0 for round to nearest

    def dequantized(self) -> jax.Array:
        """Values with residuals, f32 [in, rows]: bit for bit what the stored matrix dequantizes to.

        For programs that are given this as data: there the product inside of `values` and this sum are each rounded.
        """
        return self.values + self.residual.astype(jnp.float32)


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """aᵀ b in full float32."""
    return lax.dot_general(a, b, (((0,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)


def _sum_of_products(a: jax.Array, b: jax.Array) -> jax.Array:
    return over_columns(jnp.multiply, a[:, :, None], b[:, None, :], at_once=True)


_Solve = Callable[[jax.Array, jax.Array, jax.Array], tuple[Any, jax.Array]]
"""Solves some columns: (w [c, rows], u [c, c], valid [c]) -> (what it found, errors [c, rows])."""


def sweep(
    w: jax.Array, u: jax.Array, valid: jax.Array, width: int, solve: _Solve, spec: ColumnSpec
) -> tuple[Any, jax.Array]:
    """Solves columns `width` at a time, pushing each part's errors onto all columns after it.

    Args:
      w: [columns, rows], up to date with all errors made before them.
      u: [columns, columns], their diagonal block of U.
      valid: [columns].
      width: columns a part; divides their number.
      solve: solves one part.
      spec: where it does not compensate, the columns after a part are left alone.

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
        if spec.compensate and width < columns:
            after = jnp.arange(columns) >= first + width
            u_rows = jnp.where(after, u_rows, 0.0)
            # A few rows' product is a part of the launch that takes it off, if it is written as a sum.
            pushed = _sum_of_products if spec.grid.at_once else product
            w = w - pushed(u_rows, errors)
        return w, (found, errors)

    _, (found, errors) = lax.scan(body, w, jnp.arange(0, columns, width))
    return found, errors.reshape(w.shape)


def _fit(w: jax.Array, u_diag: jax.Array, valid: jax.Array, rows: RowChoices, spec: ColumnSpec) -> GroupFit:
    """Fits one group [g, rows], outlier candidates left out."""
    w = jnp.where(valid[:, None], w, w[:1])  # padding must not widen the range
    importance = jnp.where(valid, 1.0 / jnp.square(u_diag), 0.0)
    keep = jnp.broadcast_to(valid[:, None], w.shape)
    if spec.outliers and spec.leave_one_out:
        keep &= leave_one_out_gain(w, importance[:, None], rows.maxq, spec.grid.at_once) <= rows.threshold
    return fit_group(w, keep, Objective(importance[:, None], *rows), spec.grid)


def _round(
    w: jax.Array, scale: jax.Array, zero: jax.Array, u_diag: jax.Array, rows: RowChoices, spec: ColumnSpec
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Code, what it stands for, residual and outlier flag of weights as they are when their turn comes."""
    q = round_to_grid(w, scale, zero, rows.maxq)
    value = dequantize(q, scale, zero)
    if not spec.outliers:
        return q, value, jnp.zeros_like(w), jnp.zeros(w.shape, bool)
    miss = w - value
    is_outlier = jnp.square(miss / u_diag) > rows.threshold
    return q, value, jnp.where(is_outlier, miss, 0.0).astype(jnp.float16), is_outlier


def _dequantized(
    w: jax.Array, scale: jax.Array, zero: jax.Array, u_diag: jax.Array, rows: RowChoices, spec: ColumnSpec
) -> jax.Array:
    """What weights become, outliers included."""
    _, value, residual, _ = _round(w, scale, zero, u_diag, rows, spec)
    return value + residual.astype(jnp.float32) if spec.outliers else value


def _step(
    w: jax.Array, u: jax.Array, valid: jax.Array, fit: GroupFit, rows: RowChoices, spec: ColumnSpec
) -> tuple[jax.Array, jax.Array]:
    """Goes through a few columns of one group, one after the other: w [c, rows], u [c, c].

    Returns:
      The weights as they were when their turn came, and their errors, [c, rows] each.
    """
    if not spec.compensate:
        return w, jnp.zeros_like(w)
    if spec.grid.at_once:
        return _step_at_once(w, u, fit, rows, spec)
    before = jnp.triu(u, 1)  # [k, j]: what an error at k < j takes from column j

    def column(j: jax.Array, errors: jax.Array) -> jax.Array:
        w_j = w[j] - over_columns(jnp.multiply, errors, before[:, j, None])
        value = _dequantized(w_j, fit.scale, fit.zero, u[j, j], rows, spec)
        return errors.at[j].set((w_j - value) / u[j, j])

    errors = lax.fori_loop(0, w.shape[0], column, jnp.zeros_like(w))
    return w - product(before, errors), errors


def _step_at_once(
    w: jax.Array, u: jax.Array, fit: GroupFit, rows: RowChoices, spec: ColumnSpec
) -> tuple[jax.Array, jax.Array]:
    """`_step` with its loop written out, so that XLA makes one launch of it, a thread for each row."""
    visited: list[jax.Array] = []
    errors: list[jax.Array] = []
    for j in range(w.shape[0]):
        w_j = w[j]
        if errors:
            w_j = w_j - functools.reduce(jnp.add, (error * u[k, j] for k, error in enumerate(errors)))
        value = _dequantized(w_j, fit.scale, fit.zero, u[j, j], rows, spec)
        visited.append(w_j)
        errors.append((w_j - value) / u[j, j])
    # Without the barrier, each row of the stacks is worked out from the first column on.
    visited, errors = lax.optimization_barrier((visited, errors))
    return jnp.stack(visited), jnp.stack(errors)


def solve_group(
    w: jax.Array, u: jax.Array, valid: jax.Array, rows: RowChoices, spec: ColumnSpec
) -> tuple[tuple[GroupFit, jax.Array], jax.Array]:
    """Fits one up-to-date group [g, rows] and goes through it; u [g, g] is its diagonal block."""
    fit = _fit(w, jnp.diagonal(u), valid, rows, spec)
    solve = partial(_step, fit=fit, rows=rows, spec=spec)
    visited, errors = sweep(w, u, valid, spec.step(), solve, spec)
    return (fit, visited.reshape(w.shape)), errors


def solve_columns(
    w: jax.Array, u: jax.Array | None, valid: np.ndarray, choices: RowChoices, spec: ColumnSpec
) -> SolvedColumns:
    """Quantizes Wᵀ [in, rows] column by column.

    Args:
      w: f32 [in, rows], columns in the order of visit; `in` a multiple of the
        panel, `rows` of the second level's tile.
      u: f32 [in, in], upper factor of H⁻¹ in that order; None for round to nearest.
      valid: bool [in], False for padding.
      choices: T and the largest code of each row.
      spec: static choices.
    """
    return _program(jax.default_backend())(w, u, valid, choices, spec)


@lru_cache
def _program(platform: str) -> Callable[..., SolvedColumns]:
    return jax.jit(all_columns, static_argnums=4, compiler_options=column_options(platform))


def column_options(platform: str) -> dict[str, int] | None:
    """The compiler's options for the loop."""
    # On a CPU, LLVM's loop passes spoil the vector loops over the rows that XLA makes: without
    # them, and with full vectors, the loop takes half the time (benchmarks/quantize_time.py).
    options = {"xla_backend_optimization_level": 1, "xla_cpu_prefer_vector_width": 512} if platform == "cpu" else {}
    flags = os.environ.get("XLA_FLAGS", "")  # what the user sets there stays
    return {name: value for name, value in options.items() if name not in flags} or None


def all_columns(
    w: jax.Array, u: jax.Array | None, valid: jax.Array, choices: RowChoices, spec: ColumnSpec
) -> SolvedColumns:
    """`solve_columns`, to be traced."""
    columns, rows = w.shape
    panel = spec.panel(columns)
    u_diag = jnp.ones(columns, w.dtype) if u is None else jnp.diagonal(u)
    if u is None:
        u = jnp.eye(panel, dtype=w.dtype)
    solve = partial(solve_group, rows=choices, spec=spec)

    def body(errors: jax.Array, first: jax.Array) -> tuple[jax.Array, tuple[GroupFit, jax.Array]]:
        w_panel = lax.dynamic_slice_in_dim(w, first, panel)
        valid_panel = lax.dynamic_slice_in_dim(valid, first, panel)
        if not spec.compensate:
            return errors, sweep(w_panel, u, valid_panel, spec.group_size, solve, spec)[0]
        u_columns = lax.dynamic_slice_in_dim(u, first, panel, axis=1)  # [in, panel]
        w_panel = _brought_up_to_date(w_panel, u_columns, errors, first)
        u_panel = lax.dynamic_slice_in_dim(u_columns, first, panel)
        found, made = sweep(w_panel, u_panel, valid_panel, spec.group_size, solve, spec)
        return lax.dynamic_update_slice_in_dim(errors, made, first, axis=0), found

    errors = jnp.zeros((columns if spec.compensate else 1, rows), w.dtype)
    errors, (fit, visited) = lax.scan(body, errors, jnp.arange(0, columns, panel))
    fit = GroupFit(*(part.reshape(-1, *part.shape[2:]) for part in fit))  # [panels, groups, ...] -> [all groups, ...]
    return rounded_columns(visited.reshape(w.shape), errors, fit, u_diag, valid, choices, spec)


def rounded_columns(
    visited: jax.Array,
    errors: jax.Array,
    fit: GroupFit,
    u_diag: jax.Array,
    valid: jax.Array,
    choices: RowChoices,
    spec: ColumnSpec,
) -> SolvedColumns:
    """What weights become, once all were visited.

    Args:
      visited: f32 [in, rows], weights as they were when their turn came.
      errors: f32 [in, rows], theirs; [1, rows] of zeros for round to nearest.
      fit: of all groups, [groups, ...] each.
      u_diag: f32 [in], diagonal of U.
      valid: bool [in], False for padding.
      choices, spec: as `solve_columns` has them.
    """
    columns, rows = visited.shape
    by_group = (-1, spec.group_size, rows)
    codes, values, residual, outliers = (
        part.reshape(columns, rows)
        for part in _round(
            visited.reshape(by_group),
            fit.scale[:, None],
            fit.zero[:, None],
            u_diag.reshape(-1, spec.group_size, 1),
            choices,
            spec,
        )
    )
    loss = jnp.zeros(rows, errors.dtype)
    if spec.compensate:  # column by column, so that a row's sum does not depend on how many rows there are
        counted = jnp.broadcast_to(valid[:, None], errors.shape)
        loss = over_columns(lambda e, counts: jnp.where(counts, e * e, 0.0), errors, counted, at_once=spec.grid.at_once)
    return SolvedColumns(
        codes.astype(jnp.uint8),
        values,
        residual.astype(jnp.float16),
        outliers,
        fit.scale_codes,
        fit.zero_codes,
        fit.stats,
        loss,
    )


def _brought_up_to_date(w: jax.Array, u: jax.Array, errors: jax.Array, first: jax.Array) -> jax.Array:
    """W - Uᵀ E over the panels before column `first`: w [panel, rows], u [in, panel], errors [in, rows].

    E is read a panel at a time, so that columns not yet visited cost nothing.
    """
    panel = w.shape[0]

    def look(index: jax.Array, w: jax.Array) -> jax.Array:
        u_part = lax.dynamic_slice_in_dim(u, index * panel, panel)
        return w - product(u_part, lax.dynamic_slice_in_dim(errors, index * panel, panel))

    return lax.fori_loop(0, first // panel, look, w)
