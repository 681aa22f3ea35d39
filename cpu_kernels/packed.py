"""`Packed`: a quantized matrix in the layout that the kernels read.

The layout is described where it is read, in `csrc/matrix.h`.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
from typing import Any

import jax
import numpy as np

from cpu_kernels.library import loaded

TILE = 16
BLOCK = 32
FORMATS = (2, 3, 4, 8)
"""Bits a code that the kernels read; others are stored in the next wider."""

_NIBBLES, _HALF, _FLOAT = 0, 1, 2
_MAGIC, _HEADER_WORDS, _ALIGN = 0x315251534C425053, 16, 64  # as in csrc/blob.h


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """A matrix [out, in] for :func:`matmul`. Make one with :func:`pack`, which checks what the kernels rely on.

    Attributes:
      data: uint8 [bytes], a header and all arrays (`csrc/blob.h`): a program that takes
        one array for a matrix starts sooner than one that takes eight.
      shape: (out, in).
      bits: of a code as it is held, one of `FORMATS`.
      int8_activations: whether :func:`matmul` rounds activations to 8 bits.
    """

    data: Any
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})
    bits: int = dataclasses.field(metadata={"static": True})
    int8_activations: bool = dataclasses.field(default=False, metadata={"static": True})

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
        """Bytes that are held."""
        return math.prod(self.data.shape)


def pack(
    *,
    shape: tuple[int, int],
    bits: int,
    group_size: int,
    codes: Any,
    scale_codes: Any,
    zero_codes: Any,
    tile_stats: Any,
    scale: Any,
    zero: Any,
    row_ptr: Any,
    cols: Any,
    values: Any,
    perm: Any,
    int8_activations: bool = False,
) -> Packed:
    """Turns a matrix's parts into the layout of the kernels. Columns are permuted ones throughout.

    A weight is scale · (code - zero), plus its outlier. The statistics are given in
    one of three forms: `scale_codes`, `zero_codes` below 16 and `tile_stats`; or
    `scale` and `zero` in float16; or those in float32.

    Args:
      shape: (out, in).
      bits: of a code, 2 to 8.
      group_size: columns that share a scale, a multiple of 8.
      codes: uint16 [out, words], runs of 16 codes: `bits` words hold a run as one
        little-endian bit stream; at least `in` codes.
      scale_codes: uint8 [rows, groups], or None; rows missing up to whole tiles count as 0.
      zero_codes: the same.
      tile_stats: float16 [tiles, groups, 4], of tiles of 16 rows: ss, sz, zs, zz;
        scale = ss (scale code - sz), zero = zs (zero code - zz).
      scale: [out, groups], or None with codes.
      zero: the same.
      row_ptr: int32 [out + 1], outliers before each row.
      cols: integers [entries], at least one, rising within a row.
      values: float16 [entries].
      perm: integers [in], or None for the identity.
      int8_activations: see `Packed`.

    Raises:
      ValueError: parts that do not fit together, or that the kernels could not read
        without leaving the arrays.
      LibraryError: no library.
    """
    out, inner = shape
    if out < 1 or inner < 1 or not 2 <= bits <= FORMATS[-1] or group_size < 8 or group_size % 8:
        raise ValueError(f"unsupported matrix: shape {shape}, {bits} bits, groups of {group_size}")
    width = next(width for width in FORMATS if width >= bits)
    group = group_size if group_size in (8, 16) or group_size % BLOCK == 0 else math.gcd(group_size, BLOCK)
    if scale_codes is not None:
        kind, stats = _NIBBLES, _nibble_stats(scale_codes, zero_codes, tile_stats, out)
    else:
        kind = _HALF if np.dtype(scale.dtype) == np.float16 else _FLOAT
        stats = _plain_stats(np.asarray(scale), np.asarray(zero))
    if stats.shape[1] * group_size < inner:
        raise ValueError(f"statistics of {stats.shape[1]} groups of {group_size} do not cover {inner} columns")
    wanted = -(-_whole(inner, BLOCK) // group)
    stats = np.repeat(stats, group_size // group, axis=1)[:, :wanted]
    stats = np.pad(stats, ((0, 0), (0, wanted - stats.shape[1]), (0, 0)))
    outliers = _pack_outliers(out, np.asarray(row_ptr), np.asarray(cols), np.asarray(values, np.float16))
    order = np.zeros(0, np.int32) if perm is None else np.asarray(perm).astype(np.int32)
    if order.shape not in ((0,), (inner,)):
        raise ValueError(f"perm has {order.shape[0]} entries, but the matrix has {inner} columns")
    header = np.zeros(_HEADER_WORDS, np.int64)
    header[:9] = (_MAGIC, out, inner, width, group, kind, outliers[0][-1], outliers[3].itemsize, perm is not None)
    data = _joined([header, _pack_codes(np.asarray(codes), out, inner, bits, width), stats, *outliers, order])
    if found := loaded().spqr_problem(data.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(data.size)):
        raise ValueError(f"matrix of shape {shape}: {found.decode()}")
    return Packed(jax.device_put(data), (int(out), int(inner)), width, int8_activations)


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    """Their bytes in one array, each from a multiple of 64 on."""
    data = np.zeros(sum(_whole(array.nbytes, _ALIGN) for array in arrays), np.uint8)
    at = 0
    for array in arrays:
        data[at : at + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        at += _whole(array.nbytes, _ALIGN)
    return data


def _whole(length: int, unit: int) -> int:
    return -(-length // unit) * unit


def _pack_codes(stored: np.ndarray, out: int, inner: int, bits: int, width: int) -> np.ndarray:
    stored = np.ascontiguousarray(stored, np.uint16)
    if stored.ndim != 2 or stored.shape[0] != out or stored.shape[1] < -(-inner // 16) * bits:
        raise ValueError(f"codes {stored.shape} do not hold {out} rows of {inner} codes of {bits} bits")
    packed = np.zeros((-(-out // TILE), -(-inner // BLOCK), width, TILE), np.uint32)
    loaded().spqr_pack_codes(
        stored.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_int64(out),
        ctypes.c_int64(inner),
        ctypes.c_int64(stored.shape[1]),
        ctypes.c_int32(bits),
        ctypes.c_int32(width),
        packed.ctypes.data_as(ctypes.c_void_p),
    )
    return packed


def _nibble_stats(scale_codes: Any, zero_codes: Any, tile_stats: Any, out: int) -> np.ndarray:
    """uint8 [tiles, groups, 24]."""
    tiles = -(-out // TILE)
    codes = np.asarray(scale_codes, np.uint8) | np.asarray(zero_codes, np.uint8) << np.uint8(4)
    floats = np.ascontiguousarray(np.asarray(tile_stats, np.float16)[:tiles])
    if codes.shape[0] < out or floats.shape[:2] != (tiles, codes.shape[1]):
        raise ValueError(f"statistics codes {codes.shape} and tile_stats {floats.shape} do not fit {out} rows")
    codes = codes[: tiles * TILE]
    codes = np.pad(codes, ((0, tiles * TILE - codes.shape[0]), (0, 0))).reshape(tiles, TILE, -1).transpose(0, 2, 1)
    return np.concatenate([codes, floats.view(np.uint8).reshape(*floats.shape[:2], 8)], axis=-1)


def _plain_stats(scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
    """uint8 [tiles, groups, 64 or 128]."""
    tiles = -(-scale.shape[0] // TILE)
    both = np.stack([scale, zero.astype(scale.dtype)])  # [2, out, groups]
    both = np.pad(both, ((0, 0), (0, tiles * TILE - scale.shape[0]), (0, 0))).reshape(2, tiles, TILE, -1)
    both = np.ascontiguousarray(both.transpose(1, 3, 0, 2))  # [tiles, groups, 2, 16]
    return both.reshape(*both.shape[:2], -1).view(np.uint8)


def _pack_outliers(out: int, row_ptr: np.ndarray, cols: np.ndarray, values: np.ndarray) -> list[np.ndarray]:
    """Start, counts, lanes, columns and values, as `csrc/matrix.h` has them."""
    tiles = -(-out // TILE)
    rising = row_ptr.shape == (out + 1,) and not np.any(row_ptr[1:] < row_ptr[:-1])  # differences may overflow
    if not rising or row_ptr[0] != 0 or row_ptr[-1] > len(cols):
        raise ValueError(f"row_ptr does not rise from 0 to at most {len(cols)} in {out + 1} steps")
    counts = np.zeros(tiles * TILE, np.int64)
    counts[:out] = np.diff(row_ptr)
    order = np.argsort(-counts.reshape(tiles, TILE), axis=1, kind="stable")
    lane_of_row = np.argsort(order, axis=1).astype(np.uint8)
    entries = int(row_ptr[-1])
    row = np.repeat(np.arange(tiles * TILE), counts)
    slot = np.arange(entries) - np.repeat(row_ptr[:-1].astype(np.int64), counts[:out])
    tile = row // TILE
    # Tile by tile, slot by slot, lane by lane: the order in which the kernels read.
    key = (tile * (int(counts.max(initial=0)) + 1) + slot) * TILE + lane_of_row.reshape(-1)[row]
    at = np.argsort(key, kind="stable")
    cols, values = (np.pad(each[at], (0, TILE)) for each in (cols, values))
    by_tile = counts.reshape(tiles, TILE)
    return [
        np.concatenate([[0], np.cumsum(by_tile.sum(axis=1))]).astype(np.int32),
        np.take_along_axis(by_tile, order, axis=1).astype(np.int32),
        lane_of_row,
        cols.astype(np.uint16 if cols.dtype == np.uint16 else np.int32),
        values.astype(np.float16),
    ]
