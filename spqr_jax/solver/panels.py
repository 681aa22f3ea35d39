"""The loop over the columns on an accelerator: programs that all matrices share, called panel by panel.

Letters and method are those of `columns.py`. A GPU or TPU compiles for longer than it solves, so here the
large program, which solves a panel, has one shape whatever the matrix's: a panel of columns by a chunk of
rows (rows are independent). The small one, which brings a panel up to date, has one shape for each number of
columns. The calls are dispatched without waiting for their results.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spqr_jax.product_jit import product_jit
from spqr_jax.solver import columns
from spqr_jax.solver.columns import ColumnSpec, RowChoices, SolvedColumns, product, rounded_columns, solve_group, sweep


def by_panels() -> bool:
    """Whether the loop runs panel by panel: wherever JAX's default device is no CPU."""
    return jax.default_backend() != "cpu"


def solve_columns(
    w: jax.Array, u: jax.Array | None, valid: np.ndarray, choices: RowChoices, spec: ColumnSpec
) -> SolvedColumns:
    """`columns.solve_columns`, in the way that `spec` is for."""
    if not spec.grid.at_once:
        return columns.solve_columns(w, u, valid, choices, spec)
    if w.shape[1] == spec.chunk:
        return solve_chunk(w, u, valid, choices, spec, LOCAL)
    chunks = []
    for first in range(0, w.shape[1], spec.chunk):
        w_chunk, choices_chunk = rows_from(w, choices, first, spec.chunk)
        chunks.append(solve_chunk(w_chunk, u, valid, choices_chunk, spec, LOCAL))
    return side_by_side(chunks)


class Progress(NamedTuple):
    """A chunk on its way: `errors` f32 [in, rows] made so far, and what is solved; both zero where nothing is yet."""

    errors: jax.Array
    solved: SolvedColumns


class Panel(NamedTuple):
    """A panel that is up to date: `w` [panel, rows], its diagonal block `u` [panel, panel], `valid` [panel]."""

    w: jax.Array
    u: jax.Array
    valid: jax.Array


class Programs(NamedTuple):
    """What a chunk is solved with: `_begin`, `_take_panel`, `_solve_panel` and `_put_panel`, or their like."""

    begin: Callable[..., Progress]
    take: Callable[..., Panel]
    solve: Callable[..., tuple[jax.Array, SolvedColumns]]
    put: Callable[..., Progress]


def solve_chunk(
    w: jax.Array, u: jax.Array | None, valid: np.ndarray, choices: RowChoices, spec: ColumnSpec, programs: Programs
) -> SolvedColumns:
    """Solves rows side by side, w [in, chunk]."""
    size = spec.panel(w.shape[0])
    progress = programs.begin(len(valid), spec)
    for first in np.arange(0, len(valid), size, dtype=np.int32):
        panel = programs.take(w, u, valid, progress.errors, first, size)
        progress = programs.put(progress, *programs.solve(*panel, choices, spec), first)
    return progress.solved


@partial(jax.jit, static_argnums=4)
def _solve_panel(
    w: jax.Array, u: jax.Array, valid: jax.Array, choices: RowChoices, spec: ColumnSpec
) -> tuple[jax.Array, SolvedColumns]:
    """Errors and results of one panel: the only program with the fits and the loop in it."""
    solve = partial(solve_group, rows=choices, spec=spec)
    (fit, visited), errors = sweep(w, u, valid, spec.group_size, solve, spec)
    solved = rounded_columns(visited.reshape(w.shape), errors, fit, jnp.diagonal(u), valid, choices, spec)
    return errors, solved


@product_jit(static_argnums=5)
def _take_panel(
    w: jax.Array, u: jax.Array | None, valid: np.ndarray, errors: jax.Array, first: np.int32, size: int
) -> Panel:
    """The panel that begins at column `first`: W - Uᵀ E; errors not made yet are zero."""
    w_panel = lax.dynamic_slice_in_dim(w, first, size)
    valid_panel = lax.dynamic_slice_in_dim(jnp.asarray(valid), first, size)
    if u is None:
        return Panel(w_panel, jnp.eye(size, dtype=w.dtype), valid_panel)
    u_columns = lax.dynamic_slice_in_dim(u, first, size, axis=1)
    u_panel = lax.dynamic_slice_in_dim(u_columns, first, size)
    return Panel(w_panel - product(u_columns, errors), u_panel, valid_panel)


@partial(jax.jit, donate_argnums=0)
def _put_panel(progress: Progress, errors: jax.Array, solved: SolvedColumns, first: np.int32) -> Progress:
    """Writes a panel's errors and results to their places; its loss is added to that of the panels before."""

    def put(whole: jax.Array, part: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(whole, part, first // (errors.shape[0] // part.shape[0]), axis=0)

    so_far = progress.solved
    loss = so_far.loss + solved.loss
    whole = {name: put(getattr(so_far, name), part) for name, part in solved._asdict().items() if name != "loss"}
    return Progress(put(progress.errors, errors), SolvedColumns(**whole, loss=loss))


@partial(jax.jit, static_argnums=(0, 1))
def _begin(inner: int, spec: ColumnSpec) -> Progress:
    """A chunk of `inner` columns of which nothing is solved."""
    rows, groups = spec.chunk, inner // spec.group_size
    stats = (rows // spec.grid.stats_group_size, 4) if spec.grid.quantized_stats else (rows, 2)
    solved = SolvedColumns(
        codes=jnp.zeros((inner, rows), jnp.uint8),
        values=jnp.zeros((inner, rows)),
        residual=jnp.zeros((inner, rows), jnp.float16),
        outliers=jnp.zeros((inner, rows), bool),
        scale_codes=jnp.zeros((groups, rows), jnp.uint8),
        zero_codes=jnp.zeros((groups, rows), jnp.uint8),
        stats=jnp.zeros((groups, *stats), jnp.float16),
        loss=jnp.zeros(rows),
    )
    return Progress(jnp.zeros((inner, rows)), solved)


LOCAL = Programs(_begin, _take_panel, _solve_panel, _put_panel)
"""On one device."""


@partial(jax.jit, static_argnums=3)
def rows_from(w: jax.Array, choices: RowChoices, first: int, size: int) -> tuple[jax.Array, RowChoices]:
    """Some rows of Wᵀ [in, rows], and their choices."""
    rows = RowChoices(*(lax.dynamic_slice_in_dim(choice, first, size) for choice in choices))
    return lax.dynamic_slice_in_dim(w, first, size, axis=1), rows


@jax.jit
def side_by_side(chunks: list[SolvedColumns]) -> SolvedColumns:
    """Rows of several chunks together: they are the second axis, or the only one."""
    fields = zip(*chunks, strict=True)
    return SolvedColumns(*(jnp.concatenate(parts, axis=min(parts[0].ndim - 1, 1)) for parts in fields))
