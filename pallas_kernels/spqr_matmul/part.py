"""`Part`: the canonical arrays of one matrix, what each layout can hold of them, and their checks."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import numpy as np

from pallas_kernels.spqr_matmul.entries import MAX_COLUMNS
from pallas_kernels.spqr_matmul.formats import BLOCK, MAX_BITS, STATISTICS_BITS, TILE

Layout = Literal["fragments", "rows", "lanes"]
LAYOUTS: tuple[Layout, ...] = ("fragments", "rows", "lanes")

BITS = (2, 3, 4)
"""Bits of a code that "rows" and "lanes" hold."""

MAX_GROUP_SIZE = 128
"""Columns a group that "rows" and "lanes" hold."""


@dataclasses.dataclass(frozen=True)
class Part:
    """One quantized matrix [out, in]. Columns are packed ones, in the order of `perm`.

    A weight is scale * (code - zero), plus its outlier. Either `scale_codes`, `zero_codes` and
    `tile_stats` are given: scale = ss (scale code - sz) and zero = zs (zero code - zz), with the
    four of a tile of 16 rows and one group. Or `scale` and `zero` are.

    Attributes:
      shape: (out, in).
      bits: of a code, 1 to 8 ("rows" and "lanes": 2 to 4).
      group_size: columns a group, a multiple of 16 ("rows" and "lanes": up to 128).
      codes: uint16 [out, words], runs of 16 codes: `bits` words hold a run as one
        little-endian bit stream.
      scale_codes: integers [at least out, groups], below 16.
      zero_codes: the same.
      tile_stats: float16 [tiles of 16 rows, groups, 4]: ss, sz, zs, zz.
      scale: floats [at least out, groups]; held as float16.
      zero: the same.
      row_ptr: int [out + 1], outliers before each row.
      cols: integers [entries], rising within a row.
      values: float16 [entries].
    """

    shape: tuple[int, int]
    bits: int
    group_size: int
    codes: Any
    scale_codes: Any
    zero_codes: Any
    tile_stats: Any
    scale: Any
    zero: Any
    row_ptr: Any
    cols: Any
    values: Any

    @property
    def groups(self) -> int:
        """Groups a row."""
        return -(-self.shape[1] // self.group_size)

    @property
    def statistics(self) -> tuple[Any, ...]:
        """Those that are given."""
        return (
            (self.scale, self.zero) if self.scale is not None else (self.scale_codes, self.zero_codes, self.tile_stats)
        )


class Outliers(NamedTuple):
    """A matrix's outliers on the host, as many as there are."""

    row_ptr: np.ndarray
    columns: np.ndarray
    values: np.ndarray


def why_unsupported(
    layout: Layout, *, bits: int, group_size: int, inner: int, statistics_bits: int | None, tile_rows: int
) -> str:
    """Why a layout cannot hold a format, and what it can; empty if it can.

    Args:
      layout: of the kernel.
      bits: of a code.
      group_size: columns that share a scale.
      inner: columns.
      statistics_bits: of a scale or zero code, the larger; None without a second level.
      tile_rows: rows that share a second-level fit.
    """
    if layout == "fragments":
        if bits > MAX_BITS:
            return f"codes of {bits} bits (the kernel reads up to {MAX_BITS})"
        if group_size % BLOCK:
            return f"groups of {group_size} (the kernel reads multiples of {BLOCK})"
        if inner > MAX_COLUMNS:
            return f"{inner} columns (the kernel reads up to {MAX_COLUMNS})"
        return ""
    if bits not in BITS:
        return f"codes of {bits} bits (the kernel reads {', '.join(map(str, BITS))})"
    if group_size % BLOCK or group_size > MAX_GROUP_SIZE:
        return f"groups of {group_size} (the kernel reads multiples of {BLOCK} up to {MAX_GROUP_SIZE})"
    if statistics_bits is None:
        return "statistics without a second level (the kernel reads scale and zero codes)"
    if statistics_bits > STATISTICS_BITS:
        return f"scale or zero codes of {statistics_bits} bits (the kernel reads up to {STATISTICS_BITS})"
    if tile_rows % TILE:
        return f"second-level groups of {tile_rows} rows (the kernel reads multiples of {TILE})"
    return ""


def checked(layout: Layout, part: Part) -> Outliers:
    """Checks what the kernels rely on, and brings the outliers to the host.

    Raises:
      NotImplementedError: the layout cannot hold this format; says why.
      ValueError: arrays that do not fit together.
    """
    with_codes = part.scale is None
    why = why_unsupported(
        layout,
        bits=part.bits,
        group_size=part.group_size,
        inner=part.shape[1],
        statistics_bits=STATISTICS_BITS if with_codes else None,
        tile_rows=TILE,
    )
    if why:
        raise NotImplementedError(why)
    out, inner = part.shape
    needed: dict[str, tuple[int, ...]] = {"codes": (out, -(-inner // BLOCK) * part.bits)}
    if with_codes:
        needed |= dict.fromkeys(("scale_codes", "zero_codes"), (out, part.groups))
        needed["tile_stats"] = (-(-out // TILE), part.groups, 4)
    else:
        needed |= dict.fromkeys(("scale", "zero"), (out, part.groups))
    for name, least in needed.items():
        if (array := getattr(part, name)) is None:
            raise ValueError(f"{name} is missing: give scale_codes, zero_codes and tile_stats, or scale and zero")
        sizes = tuple(array.shape)
        if len(sizes) != len(least) or any(size < need for size, need in zip(sizes, least, strict=True)):
            raise ValueError(
                f"{name} of shape {sizes} does not cover a matrix of {out} x {inner}: at least {least} is needed"
            )
    return _outliers(part)


def _outliers(part: Part) -> Outliers:
    out, inner = part.shape
    row_ptr, columns, values = (np.asarray(array) for array in (part.row_ptr, part.cols, part.values))
    if row_ptr.shape != (out + 1,) or row_ptr[0] != 0 or np.any(np.diff(row_ptr) < 0):
        raise ValueError(f"row_ptr of shape {row_ptr.shape} does not rise from 0 over {out} rows")
    entries = int(row_ptr[-1])
    if len(columns) < entries or len(values) < entries:
        raise ValueError(f"{entries} outliers, but {len(columns)} columns and {len(values)} values")
    columns, values = columns[:entries], values[:entries]
    if entries and not 0 <= int(columns.min()) <= int(columns.max()) < inner:
        raise ValueError(f"an outlier's column is outside 0..{inner - 1}")
    falls = columns[1:] <= columns[:-1]
    edges = row_ptr[(row_ptr > 0) & (row_ptr < entries)] - 1  # a new row may begin anywhere
    falls[edges] = False
    if np.any(falls):
        raise ValueError("columns of outliers do not rise within a row")
    return Outliers(row_ptr, columns, values.astype(np.float16, copy=False))
