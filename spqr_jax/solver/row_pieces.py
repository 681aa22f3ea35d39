"""Matrices that are solved some rows at a time, by a mesh or one part after another: cut up, and put together in host
memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from spqr_jax.layout import ArrayLayout
from spqr_jax.packing import packed_words
from spqr_jax.solver import pieces
from spqr_jax.solver.columns import RowChoices, SolvedColumns
from spqr_jax.solver.pieces import Figures, Piece


class Cutting(NamedTuple):
    """How results become pieces, however many rows they have.

    Attributes:
      layout: of one of the matrices, whose columns count.
      has_outliers, stats_bits, tile: as `pieces.cut` has them.
      place: where each input is in the order of visit, int [in]; None for the same order.
    """

    layout: ArrayLayout
    has_outliers: bool
    stats_bits: int
    tile: int
    place: Any = None

    @property
    def has_second_level(self) -> bool:
        return self.stats_bits < 16

    @property
    def unit(self) -> int:
        """Rows of a tile."""
        return self.tile if self.has_second_level else 1

    def cut(self, solved: SolvedColumns, rows: int, program: Callable[..., Any] = pieces.cut) -> tuple[Piece, Figures]:
        """`pieces.cut` of so many rows as if they were one matrix; `program` is it, or what it compiles."""
        layout = dataclasses.replace(self.layout, shape=(rows, self.layout.shape[1]), padded_out=rows)
        options = (self.has_outliers, self.stats_bits, self.tile)
        (piece,), figures = program(solved, self.place, (layout,), *options)
        return piece, figures

    def extent(self, name: str, rows: int) -> tuple[int, int]:
        """The axis of a `Piece`'s field that the first `rows` rows are along, and how much of it they take."""
        if name in ("scale_codes", "zero_codes"):
            return 1, packed_words(rows, self.stats_bits) if self.has_second_level else rows
        return 0, rows // self.tile if name == "tile_stats" and self.has_second_level else rows

    def first(self, part: tuple[Piece, Figures], rows: int) -> tuple[Piece, Figures]:
        """The first rows, in host memory."""
        piece, figures = part
        finite: Any = np.asarray(figures.finite)
        outliers: Any = np.asarray(figures.outliers)[:rows]
        return self._between(piece, 0, rows, rows), Figures(finite, outliers)

    def split(self, whole: Piece, layouts: Sequence[ArrayLayout]) -> list[Piece]:
        """The matrices of a stack: parts of `whole`, not copied."""
        result, first = [], 0
        for layout in layouts:
            result.append(self._between(whole, first, layout.shape[0], layout.padded_out))
            first += layout.padded_out
        return result

    def _between(self, piece: Piece, first: int, rows: int, padded: int) -> Piece:
        """`rows` rows from `first` on; statistics of whole tiles are those of `padded` rows."""

        def part(name: str, field: Any) -> Any:
            is_by_tile = self.has_second_level and name in ("scale_codes", "zero_codes", "tile_stats")
            axis, begin = self.extent(name, first)
            end = self.extent(name, first + (padded if is_by_tile else rows))[1]
            return np.asarray(field)[(*[slice(None)] * axis, slice(begin, end))]

        fields: Any = (None if field is None else part(name, field) for name, field in piece._asdict().items())
        return Piece(*fields)


def joined(parts: Sequence[tuple[Piece, Figures]]) -> tuple[Piece, Figures]:
    """Parts one above the other."""
    if len(parts) == 1:
        return parts[0]
    fields: Any = zip(Piece._fields, zip(*(piece for piece, _ in parts), strict=True), strict=True)
    rows = ("scale_codes", "zero_codes")
    piece: Any = (None if of[0] is None else np.concatenate(of, 1 if name in rows else 0) for name, of in fields)
    finite: Any = np.all([figures.finite for _, figures in parts])
    outliers: Any = np.concatenate([figures.outliers for _, figures in parts])
    return Piece(*piece), Figures(finite, outliers)


def stacked_by(stack: Callable[..., Any]) -> Callable[..., Any]:
    """The program that puts matrices side by side; without a Hessian NumPy does the same in host memory."""

    def stacked(weights: Any, perm: Any, u: Any, taus: Any, maxqs: Any, layouts: Any, padded: Any) -> Any:
        if u is None and perm is None:
            return _stacked_by_numpy(weights, maxqs, layouts, padded)
        return stack(weights, perm, u, taus, maxqs, layouts, padded)

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
