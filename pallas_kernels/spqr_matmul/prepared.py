"""`Prepared`: a quantized matrix in the layout that one of the kernels reads."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from typing import Any, Literal

import jax
import numpy as np

from pallas_kernels.spqr_matmul import fragments, lanes, outliers, rows

Layout = Literal["fragments", "rows", "lanes"]
LAYOUTS: tuple[Layout, ...] = ("fragments", "rows", "lanes")

BITS = (2, 3, 4)
"""Bits of a code that the kernels read."""

TILE = 16
STATISTICS_BITS = 4
"""Bits of a scale or zero code at most: both of a group are held in a byte."""


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A matrix [out, in] for :func:`matmul`. Make one with :func:`prepare`.

    Attributes:
      arrays: the layout's: int32, see `fragments`, `rows` and `lanes`.
      sparse: the outliers.
      order: int32 [in], which input each packed column is; None if they are in order.
      shape: (out, in).
      bits: of a code.
      group_size: columns a group.
      layout: whose arrays these are.
      block: rows of a block, to whole ones of which rows are padded.
      order_key: equal for equal orders; "" for none.
    """

    arrays: tuple[Any, ...]
    sparse: outliers.Outliers
    order: Any
    shape: tuple[int, int]
    bits: int
    group_size: int
    layout: Layout
    block: int
    order_key: str

    @property
    def ndim(self) -> int:
        """Always 2."""
        return 2

    @property
    def dtype(self) -> np.dtype:
        """The type in which the matrix is defined: float32."""
        return np.dtype(np.float32)

    @property
    def nbytes(self) -> int:
        """Bytes that are held, paddings included."""
        return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(self))

    @property
    def padded_inner(self) -> int:
        """Columns that the arrays hold."""
        if self.layout == "fragments":
            return self.arrays[0].shape[1] * fragments.GROUPS * self.group_size
        module = rows if self.layout == "rows" else lanes
        return module.padded_inner(self.shape[1], self.group_size)

    @property
    def padded_out(self) -> int:
        """Rows that the arrays hold."""
        return -(-self.shape[0] // self.block) * self.block


jax.tree_util.register_dataclass(
    Prepared,
    data_fields=["arrays", "sparse", "order"],
    meta_fields=["shape", "bits", "group_size", "layout", "block", "order_key"],
)


def why_unsupported(*, bits: int, group_size: int, statistics_bits: int | None, tile_rows: int) -> str:
    """Why the kernels cannot read a format, and what they could; empty if they can.

    Args:
      bits: of a code.
      group_size: columns that share a scale.
      statistics_bits: of a scale or zero code, the larger; None without a second level.
      tile_rows: rows that share a second-level fit.
    """
    if bits not in BITS:
        return f"codes of {bits} bits (the kernels read {', '.join(map(str, BITS))})"
    if group_size % TILE or group_size > 128:
        return f"groups of {group_size} (the kernels read multiples of {TILE} up to 128)"
    if statistics_bits is None:
        return "statistics without a second level (the kernels read scale and zero codes)"
    if statistics_bits > STATISTICS_BITS:
        return f"scale or zero codes of {statistics_bits} bits (the kernels read up to {STATISTICS_BITS})"
    if tile_rows % TILE:
        return f"second-level groups of {tile_rows} rows (the kernels read multiples of {TILE})"
    return ""


def prepare(
    layout: Layout,
    *,
    shape: tuple[int, int],
    bits: int,
    group_size: int,
    codes: Any,
    scale_codes: Any,
    zero_codes: Any,
    tile_stats: Any,
    row_ptr: Any,
    cols: Any,
    values: Any,
    perm: Any,
) -> Prepared:
    """Turns a matrix's parts into a kernel's layout. Columns are permuted ones throughout.

    A weight is scale * (code - zero), plus its outlier; scale = ss (scale code - sz) and
    zero = zs (zero code - zz), with the four of a tile of 16 rows and one group.

    Args:
      layout: `fragments` for mosaic_gpu, `rows` for triton, `lanes` for tpu.
      shape: (out, in).
      bits: of a code, one of `BITS`.
      group_size: columns a group, a multiple of 16 up to 128.
      codes: uint16 [out, words], runs of 16 codes: `bits` words hold a run as one
        little-endian bit stream.
      scale_codes: uint8 [at least out, groups], below 16.
      zero_codes: the same.
      tile_stats: float16 [tiles of 16 rows, groups, 4]: ss, sz, zs, zz.
      row_ptr: int [out + 1], outliers before each row.
      cols: integers [entries], rising within a row.
      values: float16 [entries].
      perm: integers [in], or None for the identity: packed column j is input perm[j].

    Raises:
      NotImplementedError: the kernels do not read this format; says why.
      ValueError: parts that do not fit together.
    """
    out, inner = shape
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    if why := why_unsupported(bits=bits, group_size=group_size, statistics_bits=STATISTICS_BITS, tile_rows=TILE):
        raise NotImplementedError(why)
    groups = -(-inner // group_size)
    _check(out, inner, bits, groups, codes, scale_codes, zero_codes, tile_stats, row_ptr, cols, values, perm)
    parts = {
        "codes": codes[:, : groups * group_size // TILE * bits],
        "scales": scale_codes[:out, :groups],
        "zeros": zero_codes[:out, :groups],
        "tiles": tile_stats[: -(-out // TILE), :groups],
    }
    static = {"bits": bits, "group_size": group_size}
    if layout == "fragments":
        block, arrays = fragments.ROWS, fragments.pack(**parts, **static)
    elif layout == "rows":
        block, arrays = rows.BLOCK, rows.pack(**parts, **static)
    else:
        block = lanes.choose_block(out)
        arrays = lanes.pack(**parts, **static, block=block)
    order = None if perm is None else np.asarray(perm).astype(np.int32)
    return Prepared(
        arrays=tuple(arrays),
        sparse=outliers.pack(np.asarray(row_ptr), np.asarray(cols), np.asarray(values)),
        order=None if order is None else jax.device_put(order),
        shape=(int(out), int(inner)),
        bits=bits,
        group_size=group_size,
        layout=layout,
        block=block,
        order_key="" if order is None else hashlib.sha256(order.tobytes()).hexdigest()[:16],
    )


def _check(
    out: int,
    inner: int,
    bits: int,
    groups: int,
    codes: Any,
    scale_codes: Any,
    zero_codes: Any,
    tile_stats: Any,
    row_ptr: Any,
    cols: Any,
    values: Any,
    perm: Any,
) -> None:
    least = {
        "codes": (codes, (out, -(-inner // TILE) * bits)),
        "scale_codes": (scale_codes, (out, groups)),
        "zero_codes": (zero_codes, (out, groups)),
        "tile_stats": (tile_stats, (-(-out // TILE), groups, 4)),
    }
    for name, (array, wanted) in least.items():
        have = tuple(array.shape)
        if len(have) != len(wanted) or any(h < w for h, w in zip(have, wanted, strict=True)):
            raise ValueError(
                f"{name} of shape {have} does not cover a matrix of {out} x {inner}: at least {wanted} is needed"
            )
    row_ptr, cols = np.asarray(row_ptr), np.asarray(cols)
    if row_ptr.shape != (out + 1,) or row_ptr[0] != 0 or np.any(np.diff(row_ptr) < 0):
        raise ValueError(f"row_ptr of shape {row_ptr.shape} does not rise from 0 over {out} rows")
    entries = int(row_ptr[-1])
    if cols.shape[0] < entries or np.asarray(values).shape[0] < entries:
        raise ValueError(f"{entries} outliers, but {cols.shape[0]} columns and {np.asarray(values).shape[0]} values")
    if entries and not 0 <= int(cols[:entries].min()) <= int(cols[:entries].max()) < inner:
        raise ValueError(f"an outlier's column is outside 0..{inner - 1}")
    if perm is not None and not np.array_equal(np.sort(np.asarray(perm)), np.arange(inner)):
        raise ValueError(f"perm is not a permutation of {inner} columns")
