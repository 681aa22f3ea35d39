"""Weights cut into pieces of rows or columns, and put together again, as NumPy arrays on the host.

A piece of an `SpQRArray` is an `SpQRArray`: every kernel can multiply by it. A
piece of rows holds whole tiles of statistics, a piece of columns whole groups.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from spqr_jax.array import SpQRArray
from spqr_jax.errors import SpQRError
from spqr_jax.layout import array_layout, column_dtype, entry_capacity, round_up
from spqr_jax.models.weights import Weight
from spqr_jax.packing import CODES_PER_RUN, packed_words
from spqr_jax.quantized import is_quantized


class Split(NamedTuple):
    """How devices share one weight. Pieces have one size; several devices may hold the same piece.

    Attributes:
      axis: 0 for rows, 1 for columns.
      size: rows or columns of a piece.
      starts: first row or column of each device's piece. Rows past the last one are zero.
    """

    axis: int
    size: int
    starts: tuple[int, ...]


class Range(NamedTuple):
    """A piece's part of one leaf: [start, end) along an axis; zeros where the leaf ends before."""

    axis: int
    start: int
    end: int

    def of(self, leaf: np.ndarray) -> np.ndarray:
        """The part, zeros included."""
        index = [slice(None)] * leaf.ndim
        index[self.axis] = slice(self.start, self.end)
        part = leaf[tuple(index)]
        missing = [(0, 0)] * leaf.ndim
        missing[self.axis] = (0, self.end - self.start - part.shape[self.axis])
        return np.pad(part, missing) if missing[self.axis][1] else part


class Outliers(NamedTuple):
    """The sparse part of a matrix: where each row's outliers begin, their columns and values."""

    row_ptr: np.ndarray
    cols: np.ndarray
    values: np.ndarray


def row_unit(array: Any) -> int:
    """Rows of which a piece must be a multiple: a tile of statistics, and whole runs of their codes."""
    if not is_quantized(array) or array.scale_codes is None:
        return 1
    return math.lcm(array.stats_group_size, CODES_PER_RUN)


def cut(weight: Weight, split: Split, device: int) -> Weight:
    """One device's piece of a dense weight or an `SpQRArray`, its leaves as NumPy arrays.

    Raises:
      SpQRError: the piece would cut a tile or a group, or its inputs are ordered together with those of other pieces.
    """
    start = split.starts[device]
    if not is_quantized(weight):
        return Range(split.axis, start, start + split.size).of(np.asarray(weight))
    array = jax.tree.map(np.asarray, weight)
    leaves = {name: part.of(getattr(array, name)) for name, part in leaf_ranges(array, split, device).items()}
    outliers = cut_outliers(Outliers(array.outlier_row_ptr, array.outlier_cols, array.outlier_values), split, device)
    return piece_of(array, split, leaves, outliers, cut_order(array.perm, split, device))


def piece_of(
    whole: SpQRArray, split: Split, leaves: Mapping[str, Any], outliers: Outliers, perm: np.ndarray | None
) -> SpQRArray:
    """The `SpQRArray` of a piece from its leaves. Only the static attributes of `whole` are read."""
    out, inner = whole.shape
    by_rows = split.axis == 0
    return dataclasses.replace(
        whole,
        **leaves,
        outlier_row_ptr=outliers.row_ptr,
        outlier_cols=outliers.cols.astype(column_dtype(inner if by_rows else split.size)),
        outlier_values=outliers.values,
        perm=perm,
        shape=(split.size, inner) if by_rows else (out, split.size),
        group_size=whole.group_size if by_rows else min(whole.group_size, split.size),
    )


def leaf_ranges(array: SpQRArray, split: Split, device: int) -> dict[str, Range]:
    """A device's part of codes and statistics. Only static attributes and `scale_codes is None` are read.

    Raises:
      SpQRError: the piece would cut a tile or a group.
    """
    start, end = split.starts[device], split.starts[device] + split.size
    ranges = _row_ranges(array, start, end) if split.axis == 0 else _column_ranges(array, start, end)
    absent = ("scale_codes", "zero_codes") if array.scale_codes is None else ()
    return {name: part for name, part in ranges.items() if name not in absent}


def _row_ranges(array: SpQRArray, start: int, end: int) -> dict[str, Range]:
    ranges = {"codes": Range(0, start, end)}
    if array.scale_codes is None:
        return ranges | {"tile_stats": Range(0, start, end)}
    unit, tile = row_unit(array), array.stats_group_size
    if start % unit or (end % unit and end < array.shape[0]):
        raise SpQRError(
            f"pieces of {end - start} rows of {array.shape[0]} are not whole tiles of {unit}, which share statistics: "
            "use fewer devices, or quantize with stats_bits=16"
        )
    end = round_up(end, unit)
    for name, bits in (("scale_codes", array.scale_bits), ("zero_codes", array.zero_bits)):
        ranges[name] = Range(1, packed_words(start, bits), packed_words(end, bits))
    return ranges | {"tile_stats": Range(0, start // tile, end // tile)}


def _column_ranges(array: SpQRArray, start: int, end: int) -> dict[str, Range]:
    group, size = array.group_size, end - start
    whole_groups, within_group = size % group == 0, group % size == 0
    if size % CODES_PER_RUN or not (whole_groups or within_group):
        raise SpQRError(
            f"pieces of {size} inputs of {array.shape[1]} are not whole groups of {math.lcm(group, CODES_PER_RUN)}: "
            "use fewer devices, or quantize with a smaller group_size"
        )
    groups = (start // group, end // group if whole_groups else start // group + 1)
    return {
        "codes": Range(1, packed_words(start, array.bits), packed_words(end, array.bits)),
        "scale_codes": Range(0, *groups),
        "zero_codes": Range(0, *groups),
        "tile_stats": Range(1, *groups),
    }


def cut_outliers(outliers: Outliers, split: Split, device: int) -> Outliers:
    """A device's outliers, without unused entries; columns are counted from the piece's first."""
    row_ptr, cols, values = outliers
    start, end = split.starts[device], split.starts[device] + split.size
    if split.axis == 0:
        row_ptr = row_ptr[np.minimum(np.arange(start, end + 1), len(row_ptr) - 1)]
        entries = slice(row_ptr[0], row_ptr[-1])
        return Outliers(row_ptr - row_ptr[0], cols[entries], values[entries])
    used = int(row_ptr[-1])
    inside = (cols[:used] >= start) & (cols[:used] < end)
    before = np.concatenate([[0], np.cumsum(inside)]).astype(np.int32)
    return Outliers(before[row_ptr], cols[:used][inside] - cols.dtype.type(start), values[:used][inside])


def cut_order(perm: np.ndarray | None, split: Split, device: int) -> np.ndarray | None:
    """A device's input order, counted from its first input.

    Raises:
      SpQRError: the range holds inputs of other pieces.
    """
    if perm is None or split.axis == 0:
        return perm
    start = split.starts[device]
    part = perm[start : start + split.size].astype(np.int64) - start
    if part.min() < 0 or part.max() >= split.size:
        devices = len(split.starts)
        raise SpQRError(
            f"its inputs are ordered by activation across the ranges of {devices} devices: quantize with "
            f"--input-shards {devices} or a multiple of it (SpQRConfig.input_shards), or with --order identity"
        )
    return part.astype(column_dtype(split.size))


def with_equal_lists(pieces: Sequence[Weight], most: int) -> list[Weight]:
    """Pieces with outlier lists of one length, which holds `most` outliers."""
    capacity = entry_capacity(most)
    return [piece.with_capacity(capacity) if is_quantized(piece) else piece for piece in pieces]


# ---- together again -------------------------------------------------------------------------------


def join(pieces: Sequence[Weight], split: Split, shape: tuple[int, ...], group_size: int | None) -> Weight:
    """The weight of which each device has a piece, as `cut` was given it.

    Args:
      pieces: of all devices, their leaves as NumPy arrays.
      split: how it was cut.
      shape: of the whole.
      group_size: of the whole; None for a dense weight.
    """
    kept = [split.starts.index(start) for start in sorted(set(split.starts))]  # one copy of each piece
    starts, parts = [split.starts[index] for index in kept], [pieces[index] for index in kept]
    if not is_quantized(parts[0]):
        whole = np.concatenate(parts, axis=split.axis)
        return whole[: shape[0]]
    first, (out, inner) = parts[0], shape
    assert group_size is not None
    second = first.scale_codes is not None
    padded_out = array_layout((out, inner), group_size, first.stats_group_size if second else None).padded_out
    rows = {"codes": out, "tile_stats": padded_out // first.stats_group_size if second else out}

    def joined(name: str, axis: int) -> np.ndarray:
        return np.concatenate([getattr(part, name) for part in parts], axis=axis)

    if split.axis == 0:
        leaves = {name: joined(name, 0)[:count] for name, count in rows.items()}
        if second:
            for name, bits in (("scale_codes", first.scale_bits), ("zero_codes", first.zero_bits)):
                leaves[name] = joined(name, 1)[:, : packed_words(padded_out, bits)]
    else:
        every = group_size // first.group_size  # pieces that share a group hold copies of its statistics
        leaves = {"codes": joined("codes", 1), "tile_stats": joined("tile_stats", 1)[:, ::every]}
        if second:
            leaves |= {name: joined(name, 0)[::every] for name in ("scale_codes", "zero_codes")}
    outliers = _joined_outliers(parts, starts, split.axis, out, inner)
    perm = first.perm
    if split.axis == 1 and perm is not None:
        orders = [part.perm.astype(np.int64) + start for part, start in zip(parts, starts, strict=True)]
        perm = np.concatenate(orders).astype(column_dtype(inner))
    array = dataclasses.replace(
        first,
        **leaves,
        outlier_row_ptr=outliers.row_ptr,
        outlier_cols=outliers.cols,
        outlier_values=outliers.values,
        perm=perm,
        shape=(out, inner),
        group_size=group_size,
    )
    return array.with_capacity(entry_capacity(len(outliers.cols)))


def _joined_outliers(parts: Sequence[SpQRArray], starts: Sequence[int], axis: int, out: int, inner: int) -> Outliers:
    """Outliers of all pieces, sorted by row, then by column."""
    rows, cols, values = [], [], []
    for part, start in zip(parts, starts, strict=True):
        own_rows = np.repeat(np.arange(part.shape[0]), np.diff(part.outlier_row_ptr))
        rows.append(own_rows + (start if axis == 0 else 0))
        cols.append(part.outlier_cols[: part.nnz].astype(np.int64) + (start if axis == 1 else 0))
        values.append(part.outlier_values[: part.nnz])
    row, col, value = (np.concatenate(each) for each in (rows, cols, values))
    order = np.lexsort((col, row))
    row_ptr = np.searchsorted(row[order], np.arange(out + 1)).astype(np.int32)
    return Outliers(row_ptr, col[order].astype(column_dtype(inner)), value[order])
