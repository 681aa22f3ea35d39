"""What a mesh is given to solve, and what it has solved, in host memory: a device holds a few rows of it at a time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from spqr_jax.config import SpQRConfig
from spqr_jax.layout import ArrayLayout
from spqr_jax.packing import CODES_PER_RUN
from spqr_jax.solver import pieces
from spqr_jax.solver.columns import RowChoices, SolvedColumns
from spqr_jax.solver.pieces import Figures, Piece
from spqr_jax.solver.sparse import OutlierList

AT_ONCE = 2**25
"""Weights of a solved matrix that a device packs together."""


def stacked_by(stack: Callable[..., Any]) -> Callable[..., Any]:
    """The program that puts matrices side by side, with its results in host memory.

    Without a Hessian no number is computed, and NumPy does the same without a device.
    """

    def stacked(weights: Any, perm: Any, u: Any, taus: Any, maxqs: Any, layouts: Any, padded: Any) -> Any:
        if u is None and perm is None:
            return _stacked_by_numpy(weights, maxqs, layouts, padded)
        return jax.device_get(stack(weights, perm, u, taus, maxqs, layouts, padded))

    return stacked


def _stacked_by_numpy(
    weights: Sequence[Any], maxqs: np.ndarray, layouts: Sequence[ArrayLayout], padded: tuple[int, int]
) -> tuple[np.ndarray, RowChoices, list[bool]]:
    w_t, first, finite = np.zeros(padded, np.float32), 0, []
    maxq = np.ones(padded[1], np.float32)
    for w, layout, largest in zip(weights, layouts, maxqs, strict=True):
        w, (out, inner), end = np.asarray(w), layout.shape, first + layout.padded_out
        finite.append(bool(np.isfinite(w).all()))
        w_t[:inner, first : first + out] = w.T
        w_t[:inner, first + out : end] = w_t[:inner, first + out - 1, None]  # so that padding changes no tile's range
        maxq[first:end] = largest
        first = end
    threshold = np.full(padded[1], np.inf, np.float32)
    return w_t, RowChoices(threshold, maxq), finite  # type: ignore[arg-type]


def cut(
    solved: SolvedColumns, place: np.ndarray | None, layouts: Sequence[ArrayLayout], configs: Sequence[SpQRConfig]
) -> tuple[list[Piece], list[OutlierList], Figures]:
    """`pieces.cut` and `pieces.pack` of results in host memory, some rows at a time.

    Args:
      solved: NumPy arrays, of all matrices.
      place: where each input is in the order of visit; None for the same order.
      layouts, configs: of the matrices; the configurations differ in bits and thresholds only.

    Returns:
      Of each matrix its piece in host memory, with packed codes and without residuals; the outliers of each; and the
      figures.
    """
    results, lists, figures, first = [], [], [], 0
    for layout, config in zip(layouts, configs, strict=True):
        parts, part_lists = [], []
        for begin, part_layout in _row_ranges(layout, config):
            part = _part(solved, first + begin, part_layout, config)
            arguments = (config.outliers, config.stats_bits, config.stats_group_size)
            (piece,), figure = pieces.cut(part, place, (part_layout,), *arguments)
            figure = jax.device_get(figure)
            part_lists.append(pieces.listed(piece, figure.outliers, part_layout))
            packed = piece._replace(codes=pieces.pack(piece.codes, config.bits), residual=None, outliers=None)
            parts.append(jax.device_get(packed))
            figures.append(figure)
        results.append(_joined(parts))
        lists.append(_joined_lists(part_lists))
        first += layout.padded_out
    finite = np.array(all(figure.finite for figure in figures))
    return results, lists, Figures(finite, np.concatenate([figure.outliers for figure in figures]))  # type: ignore[arg-type]


def _row_ranges(layout: ArrayLayout, config: SpQRConfig) -> Iterator[tuple[int, ArrayLayout]]:
    """Where ranges of whole tiles begin in a matrix, and the layout of each."""
    unit = math.lcm(CODES_PER_RUN, config.stats_group_size if config.quantized_stats else 1)
    size, out = max(unit, AT_ONCE // layout.padded_in // unit * unit), layout.shape[0]
    for begin in range(0, out, size):
        is_last = begin + size >= out
        rows, padded = (out - begin, layout.padded_out - begin) if is_last else (size, size)
        yield begin, dataclasses.replace(layout, shape=(rows, layout.shape[1]), padded_out=padded)


def _part(solved: SolvedColumns, first: int, layout: ArrayLayout, config: SpQRConfig) -> SolvedColumns:
    """The results of some rows."""
    end, tile = first + layout.padded_out, config.stats_group_size if config.quantized_stats else 1
    part = {name: getattr(solved, name)[:, first:end] for name in solved._fields if name not in ("stats", "loss")}
    return SolvedColumns(**part, stats=solved.stats[:, first // tile : end // tile], loss=solved.loss[first:end])


_ROW_AXIS = {"scale_codes": 1, "zero_codes": 1}  # of a piece's field; else 0


def _joined(parts: Sequence[Piece]) -> Piece:
    if len(parts) == 1:
        return parts[0]
    fields: Any = zip(Piece._fields, zip(*parts, strict=True), strict=True)
    joined: Any = (None if rows[0] is None else np.concatenate(rows, _ROW_AXIS.get(name, 0)) for name, rows in fields)
    return Piece(*joined)


def _joined_lists(parts: Sequence[OutlierList]) -> OutlierList:
    """The lists of matrices one above the other."""
    before = np.cumsum([0, *(part.row_ptr[-1] for part in parts)])
    row_ptr = [part.row_ptr[1:] + first for part, first in zip(parts, before, strict=False)]
    cols, values = (np.concatenate(field) for field in ([p.cols for p in parts], [p.values for p in parts]))
    return OutlierList(np.concatenate([[0], *row_ptr]).astype(np.int32), cols, values)
