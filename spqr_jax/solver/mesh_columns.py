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
from spqr_jax.solver import columns, panels, pieces
from spqr_jax.solver.columns import ColumnSpec, RowChoices, SolvedColumns
from spqr_jax.solver.pieces import Figures, Piece
from spqr_jax.solver.row_pieces import Cutting, joined

_UNIT = 64  # a CPU device's rows come in multiples; those of 32 are enough for equal results
ROWS_AT_ONCE = 512
"""Rows that an accelerator of a mesh solves together, however many there are."""


def spec_for(spec: ColumnSpec) -> ColumnSpec:
    """The same choices for a mesh, on which an accelerator solves fewer rows at once."""
    return dataclasses.replace(spec, rows_at_once=ROWS_AT_ONCE)


def solve_columns(
    mesh: Mesh,
    w: Any,
    u: jax.Array | None,
    valid: np.ndarray,
    choices: RowChoices,
    spec: ColumnSpec,
    cutting: Cutting,
    rows: int,
) -> tuple[Piece, Figures]:
    """`columns.solve_columns` and `pieces.cut` on all devices. Every process must call it with the same arrays.

    Args:
      mesh: of devices.
      w, choices: in host memory, or on this process's first device; another one is given its rows only.
      u, valid, spec: as there; U is on this process's first device, and is copied to all.
      cutting: how results are cut.
      rows: that count, whole tiles; those behind them are padding.

    Returns:
      All rows as one matrix in host memory, its codes not packed; and the figures. No device ever holds all of it.
    """
    unit = devices.size(mesh) * (spec.chunk if spec.grid.at_once else math.lcm(_UNIT, cutting.unit))
    solve = _solve_panels if spec.grid.at_once else _solve_parts
    parts = solve(mesh, w, u, valid, choices, spec, cutting, rows, round_up(rows, unit))
    return joined(parts)


Part = tuple[Piece, Figures]


def _solve_parts(
    mesh: Mesh,
    w: Any,
    u: jax.Array | None,
    valid: np.ndarray,
    choices: RowChoices,
    spec: ColumnSpec,
    cutting: Cutting,
    rows: int,
    padded: int,
) -> list[Part]:
    size, w = padded // devices.size(mesh), np.asarray(w)

    @cache
    def leaves(index: int) -> tuple[list[Any], Any]:
        w_part, choices_part = _rows(w, choices, index * size, size)
        solved = columns.solve_columns(jnp.asarray(w_part), u, valid, choices_part, spec)
        return jax.tree.flatten(cutting.cut(solved, size))

    firsts = range(0, rows, size)  # parts of padding alone are left out
    if jax.process_count() == 1:
        parts = [jax.tree.unflatten(leaves(first // size)[1], leaves(first // size)[0]) for first in firsts]
    else:
        here = next(i for i, device in enumerate(mesh.devices.flat) if device.process_index == jax.process_index())
        number, tree = len(leaves(here)[0]), leaves(here)[1]
        stacks = [devices.put_parts(mesh, lambda i, k=k: leaves(i)[0][k]) for k in range(number)]  # type: ignore[misc]
        every = [devices.to_host(mesh, stack) for stack in stacks]
        parts = [jax.tree.unflatten(tree, [stack[first // size] for stack in every]) for first in firsts]
    return [cutting.first(part, min(size, rows - first)) for part, first in zip(parts, firsts, strict=True)]


def _solve_panels(
    mesh: Mesh,
    w: Any,
    u: jax.Array | None,
    valid: np.ndarray,
    choices: RowChoices,
    spec: ColumnSpec,
    cutting: Cutting,
    rows: int,
    padded: int,
) -> list[Part]:
    u = None if u is None else devices.put_everywhere(mesh, u)
    place = None if cutting.place is None else devices.put_everywhere(mesh, cutting.place)
    step, parts, programs = spec.chunk * devices.size(mesh), [], _panel_programs(mesh, spec)
    cut = _cut_program(mesh, cutting._replace(place=None), spec.chunk)
    for first in range(0, padded, step):
        count = min(step, rows - first)
        w_part, choices_part = (
            w[:, first : first + count],
            (np.asarray(choice)[first : first + count] for choice in choices),
        )
        filled = (_filled(choice, step, value) for choice, value in zip(choices_part, _OF_NOTHING, strict=True))
        cut_choices = RowChoices(*(devices.cut(mesh, choice) for choice in filled))
        w_cut = devices.cut(mesh, w_part, axis=1, length=step)
        solved = panels.solve_chunk(w_cut, u, valid, cut_choices, spec, programs)
        piece, figures = cut(solved, place)
        in_host_memory = {
            name: None if field is None else devices.to_host(mesh, field, *cutting.extent(name, count))
            for name, field in piece._asdict().items()
        }
        outliers = devices.to_host(mesh, figures.outliers, length=count)
        finite = devices.to_host(mesh, figures.finite).all()
        parts.append((Piece(**in_host_memory), Figures(finite, outliers)))  # type: ignore[arg-type]
    return parts


@lru_cache(maxsize=64)
def _cut_program(mesh: Mesh, cutting: Cutting, rows: int) -> Any:
    """(results of all devices, place) -> their pieces and figures, `rows` a device."""

    def run(solved: SolvedColumns, place: jax.Array | None) -> Part:
        program: Any = pieces.cut
        piece, figures = cutting._replace(place=place).cut(solved, rows, program.__wrapped__)
        return piece, Figures(figures.finite[None], figures.outliers)

    by_row: Any = devices.cut_along(mesh)
    specs = Piece(*(devices.cut_along(mesh, cutting.extent(name, rows)[0]) for name in Piece._fields))  # type: ignore[arg-type]
    return devices.mesh_jit(mesh, run, (_specs(mesh)[2], devices.EVERYWHERE), (specs, Figures(by_row, by_row)))


_OF_NOTHING = (np.inf, 1.0)  # what rows of padding choose


def _rows(w: np.ndarray, choices: RowChoices, first: int, size: int) -> tuple[np.ndarray, RowChoices]:
    """Some rows of Wᵀ [in, rows], and their choices; with rows of zeros behind the last."""
    w_part = w[:, first : first + size]
    parts = (np.asarray(choice)[first : first + size] for choice in choices)
    filled = (_filled(part, size, value) for part, value in zip(parts, _OF_NOTHING, strict=True))
    missing = size - w_part.shape[1]
    return (np.pad(w_part, ((0, 0), (0, missing))) if missing else w_part), RowChoices(*filled)  # type: ignore[arg-type]


def _filled(values: Any, size: int, value: Any) -> np.ndarray:
    return np.pad(values, (0, size - len(values)), constant_values=value)


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
