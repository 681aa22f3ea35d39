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
ROWS_AT_ONCE = 512
"""Rows that an accelerator of a mesh solves together, however many there are."""


def spec_for(spec: ColumnSpec) -> ColumnSpec:
    """The same choices for a mesh, on which an accelerator solves fewer rows at once."""
    return dataclasses.replace(spec, rows_at_once=ROWS_AT_ONCE)


def solve_columns(
    mesh: Mesh, w: np.ndarray, u: jax.Array | None, valid: np.ndarray, choices: RowChoices, spec: ColumnSpec
) -> SolvedColumns:
    """`columns.solve_columns` on all devices. Every process must call it with the same arrays.

    Args:
      mesh: of devices.
      w, choices: in host memory; a device is given only its rows.
      u, valid, spec: as there; U is on this process's first device, and is copied to all.

    Returns:
      The same numbers, of all rows, in host memory.
    """
    rows, count = w.shape[1], devices.size(mesh)
    tile = spec.grid.stats_group_size if spec.grid.quantized_stats else 1
    unit = count * (spec.chunk if spec.grid.at_once else math.lcm(_UNIT, tile))
    solve = _solve_panels if spec.grid.at_once else _solve_parts
    parts = solve(mesh, w, u, valid, choices, spec, round_up(rows, unit))
    return parts[0] if len(parts) == 1 else _side_by_side(parts)


def _solve_parts(
    mesh: Mesh,
    w: np.ndarray,
    u: jax.Array | None,
    valid: np.ndarray,
    choices: RowChoices,
    spec: ColumnSpec,
    padded: int,
) -> list[SolvedColumns]:
    size = padded // devices.size(mesh)

    @cache
    def part(index: int) -> SolvedColumns:
        w_part, choices_part = _rows(w, choices, index * size, size)
        return columns.solve_columns(jnp.asarray(w_part), u, valid, choices_part, spec)

    if jax.process_count() == 1:
        firsts = range(0, w.shape[1], size)  # parts of padding alone are left out
        return [_in_host_memory(part(first // size), w.shape[1] - first, spec) for first in firsts]
    stacks = [devices.put_parts(mesh, lambda i, k=k: part(i)[k]) for k in range(len(SolvedColumns._fields))]  # type: ignore[misc]
    every = [devices.to_host(mesh, stack) for stack in stacks]
    solved = [SolvedColumns(*(field[index] for field in every)) for index in range(devices.size(mesh))]
    return [_in_host_memory(_side_by_side(solved), w.shape[1], spec)]


def _solve_panels(
    mesh: Mesh,
    w: np.ndarray,
    u: jax.Array | None,
    valid: np.ndarray,
    choices: RowChoices,
    spec: ColumnSpec,
    padded: int,
) -> list[SolvedColumns]:
    u = None if u is None else devices.put_everywhere(mesh, u)
    step, parts, programs = spec.chunk * devices.size(mesh), [], _panel_programs(mesh, spec)
    for first in range(0, padded, step):
        rows = min(step, w.shape[1] - first)
        w_part, choices_part = _rows(w, choices, first, rows)
        filled = (_filled(choice, step, value) for choice, value in zip(choices_part, _OF_NOTHING, strict=True))
        cut_choices = RowChoices(*(devices.cut(mesh, choice) for choice in filled))
        w_cut = devices.cut(mesh, w_part, axis=1, length=step)
        solved = panels.solve_chunk(w_cut, u, valid, cut_choices, spec, programs)
        fields = zip(SolvedColumns._fields, solved, strict=True)
        parts.append(SolvedColumns(*(_from_devices(mesh, *field, rows, spec) for field in fields)))
    return parts


_OF_NOTHING = RowChoices(np.inf, 1.0)  # type: ignore[arg-type]  # what rows of padding choose


def _rows(w: np.ndarray, choices: RowChoices, first: int, size: int) -> tuple[np.ndarray, RowChoices]:
    """Some rows of Wᵀ [in, rows], and their choices; with rows of zeros behind the last."""
    w_part = w[:, first : first + size]
    parts = (np.asarray(choice)[first : first + size] for choice in choices)
    filled = (_filled(part, size, value) for part, value in zip(parts, _OF_NOTHING, strict=True))
    missing = size - w_part.shape[1]
    return (np.pad(w_part, ((0, 0), (0, missing))) if missing else w_part), RowChoices(*filled)  # type: ignore[arg-type]


def _filled(values: Any, size: int, value: Any) -> np.ndarray:
    return np.pad(values, (0, size - len(values)), constant_values=value)


def _length(name: str, rows: int, spec: ColumnSpec) -> tuple[int, int]:
    """The axis of a result's rows, or tiles, and how many there are."""
    tiles = name == "stats" and spec.grid.quantized_stats
    return (0 if name == "loss" else 1), rows // spec.grid.stats_group_size if tiles else rows


def _first_rows(array: Any, name: str, rows: int, spec: ColumnSpec) -> np.ndarray:
    axis, length = _length(name, rows, spec)
    return np.asarray(array)[(*[slice(None)] * axis, slice(0, length))]


def _in_host_memory(solved: SolvedColumns, rows: int, spec: ColumnSpec) -> SolvedColumns:
    """Results of one device without rows behind `rows`."""
    fields = zip(SolvedColumns._fields, solved, strict=True)
    return SolvedColumns(*(_first_rows(array, name, rows, spec) for name, array in fields))  # type: ignore[arg-type]


def _from_devices(mesh: Mesh, name: str, array: jax.Array, rows: int, spec: ColumnSpec) -> Any:
    return devices.to_host(mesh, array, *_length(name, rows, spec))


def _side_by_side(parts: list[SolvedColumns]) -> SolvedColumns:
    """Rows of several parts together: they are the second axis, or the only one."""
    fields = zip(*parts, strict=True)
    return SolvedColumns(*(np.concatenate(field, axis=min(field[0].ndim - 1, 1)) for field in fields))  # type: ignore[arg-type]


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
