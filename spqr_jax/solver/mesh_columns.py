"""The loop over the columns with the rows spread over the devices of a mesh: rows are independent, given U.

On an accelerator each device solves its rows panel by panel. The CPU devices of a process share its cores: there
their rows are solved part by part on the first, by the very program that runs without a mesh. (XLA writes a program
for several devices a little differently, and then fuses other products and sums into one rounding.) A row gets
the same result however many rows are solved beside it, as long as these are whole vectors.
"""

from __future__ import annotations

import dataclasses
import math
from functools import cache, lru_cache
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import spqr_jax.devices as devices
from spqr_jax.layout import round_up
from spqr_jax.solver import columns, panels
from spqr_jax.solver.columns import ColumnSpec, RowChoices, SolvedColumns

_UNIT = 64  # a CPU device's rows come in multiples; those of 32 are enough for equal results
_CHUNK = 512  # rows that an accelerator of a mesh solves together, however many there are


def spec_for(spec: ColumnSpec) -> ColumnSpec:
    """The same choices for a mesh, on which an accelerator solves fewer rows at once."""
    return dataclasses.replace(spec, rows_at_once=_CHUNK)


def solve_columns(
    mesh: Mesh, w: jax.Array, u: jax.Array | None, valid: np.ndarray, choices: RowChoices, spec: ColumnSpec
) -> SolvedColumns:
    """`columns.solve_columns` on all devices. Every process must call it with the same arrays, on its first device.

    Returns:
      The same numbers, of all rows, on this process's first device.
    """
    rows, count = w.shape[1], devices.size(mesh)
    tile = spec.grid.stats_group_size if spec.grid.quantized_stats else 1
    unit = count * (spec.chunk if spec.grid.at_once else math.lcm(_UNIT, tile))
    padded = round_up(rows, unit)
    w, choices = _padded(w, choices, padded)
    solve = _solve_panels if spec.grid.at_once else _solve_parts
    return _first_rows(solve(mesh, w, u, valid, choices, spec), rows, tile)


def _solve_parts(
    mesh: Mesh, w: jax.Array, u: jax.Array | None, valid: np.ndarray, choices: RowChoices, spec: ColumnSpec
) -> list[SolvedColumns]:
    size = w.shape[1] // devices.size(mesh)

    @cache
    def part(index: int) -> SolvedColumns:
        w_part, choices_part = panels.rows_from(w, choices, index * size, size)
        return columns.solve_columns(w_part, u, valid, choices_part, spec)

    if jax.process_count() == 1:
        return [part(index) for index in range(devices.size(mesh))]
    stacks = [devices.put_parts(mesh, lambda i, k=k: part(i)[k]) for k in range(len(SolvedColumns._fields))]  # type: ignore[misc]
    every = SolvedColumns(*devices.gather(mesh, stacks))
    return [SolvedColumns(*(field[index] for field in every)) for index in range(devices.size(mesh))]


def _solve_panels(
    mesh: Mesh, w: jax.Array, u: jax.Array | None, valid: np.ndarray, choices: RowChoices, spec: ColumnSpec
) -> list[SolvedColumns]:
    u = None if u is None else devices.put_everywhere(mesh, u)
    step, parts, programs = spec.chunk * devices.size(mesh), [], _panel_programs(mesh, spec)
    for first in range(0, w.shape[1], step):
        w_part, choices_part = panels.rows_from(w, choices, first, step)
        choices_part = RowChoices(*(devices.cut(mesh, choice) for choice in choices_part))
        solved = panels.solve_chunk(devices.cut(mesh, w_part, axis=1), u, valid, choices_part, spec, programs)
        parts.append(devices.gather(mesh, solved))
    return parts


def _padded(w: jax.Array, choices: RowChoices, rows: int) -> tuple[jax.Array, RowChoices]:
    """With rows of zeros behind the others."""
    extra = (0, rows - w.shape[1])
    threshold = jnp.pad(choices.threshold, extra, constant_values=jnp.inf)
    return jnp.pad(w, ((0, 0), extra)), RowChoices(threshold, jnp.pad(choices.maxq, extra, constant_values=1.0))


def _first_rows(parts: list[SolvedColumns], rows: int, tile: int) -> SolvedColumns:
    """Parts side by side without the padding."""
    solved = panels.side_by_side(parts) if len(parts) > 1 else parts[0]
    kept = {name: getattr(solved, name)[:, :rows] for name in solved._fields if name not in ("stats", "loss")}
    return SolvedColumns(**kept, stats=solved.stats[:, : rows // tile], loss=solved.loss[:rows])


def _specs(mesh: Mesh) -> tuple[Any, RowChoices, SolvedColumns]:
    """How weights, the rows' choices and results are cut."""
    by_column: Any = devices.cut_along(mesh, 1)
    by_row: Any = devices.cut_along(mesh)
    solved = {name: by_column for name in SolvedColumns._fields if name != "loss"}
    return by_column, RowChoices(by_row, by_row), SolvedColumns(**solved, loss=by_row)


@lru_cache(maxsize=64)
def _panel_programs(mesh: Mesh, spec: ColumnSpec) -> panels.Programs:
    """`panels.LOCAL` on every device's rows."""
    by_column, choices, solved = _specs(mesh)
    local, whole = panels.LOCAL, cast(Any, devices.EVERYWHERE)
    progress = panels.Progress(by_column, solved)
    taken = panels.Panel(by_column, whole, whole)

    def of(program: Any, in_specs: Any, out_specs: Any, **static: Any) -> Any:
        def run(*arguments: Any) -> Any:
            return program.__wrapped__(*arguments, **static)

        return devices.mesh_jit(mesh, run, in_specs, out_specs)

    def begin(inner: int, spec: ColumnSpec) -> Any:
        return of(local.begin, (), progress, inner=inner, spec=spec)()

    def take(w: Any, u: Any, valid: Any, errors: Any, first: Any, size: int) -> Any:
        program = _take(size)
        return program(w, u, valid, errors, first)

    @lru_cache
    def _take(size: int) -> Any:
        return of(local.take, (by_column, whole, whole, by_column, whole), taken, size=size)

    solve = of(local.solve, (by_column, whole, whole, choices), (by_column, solved), spec=spec)
    put = of(local.put, (progress, by_column, solved, whole), progress)
    return panels.Programs(begin, take, lambda w, u, valid, choices, _: solve(w, u, valid, choices), put)
