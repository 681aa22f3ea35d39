"""One matrix in Hugging Face's SpQR format (``quant_method: "spqr"``), which the public CUDA kernel reads.

A 64-bit word holds 16 codes of a row and what is needed to undo them; w_s and w_z
are the row's scale and zero codes, q_j the codes of columns 16 g + j:

    bits  0- 2  w_s
          3- 5  w_z
          6-53  q_0 .. q_15
         54-61  a byte of the tile's second-level statistics
         62-63  0

Tiles of 16 rows are 16 words, group after group. Rows 2 k and 2 k + 1 of a tile both
carry byte k of its float16 statistics ss, zs, sz, zz. Arithmetic, each operation
rounded to float16:

    s = ss (w_s - sz)    z = zs (w_z - zz)    w = s (q - z)

Outliers are added, in float32, before W is rounded to float16. Columns are permuted:
column c of W meets input ``in_perm[c]``. Statistics and outliers mean what they mean
in `SpQRArray`, so both directions only move bits.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from spqr_jax.array import SpQRArray
from spqr_jax.errors import SpQRError
from spqr_jax.files.entries import shown
from spqr_jax.layout import column_dtype
from spqr_jax.packing import pack_codes, unpack_codes

BITS = 3
TILE = 16
"""Codes a group, rows a tile: the format has no others."""
MOST_COLUMNS = 32768
"""A column is a signed 16-bit number to the program that merges columns and values."""

_ADVICE = "quantize with --bits 3 --group-size 16 --stats-bits 3 --stats-group-size 16, or use --format dense"


@dataclasses.dataclass(frozen=True)
class WordMatrix:
    """A matrix [out, in] as the format's tensors.

    Attributes:
      dense_weights: int64 [out/16 · in/16 · 16], the words.
      row_offsets: int32, [out + 1] of outliers by row, or [out/16 + 1] of blocks of 16 rows (see `_rows_of`).
      col_vals: int32, an outlier's float16 bits above its column.
      in_perm: int32 [in/2], two uint16 each, the lower half first.
      shape: (out, in).
    """

    dense_weights: np.ndarray
    row_offsets: np.ndarray
    col_vals: np.ndarray
    in_perm: np.ndarray
    shape: tuple[int, int]

    def tensors(self) -> dict[str, np.ndarray]:
        """By the names that they have in a file, after the module's."""
        return {name: getattr(self, name) for name in TENSORS}


TENSORS = ("dense_weights", "row_offsets", "col_vals", "in_perm")


def why_unsupported(array: SpQRArray) -> str:
    """Why the format cannot hold an array, and what to choose instead; empty if it can."""
    out, inner = array.shape
    reasons = []
    if out % TILE or inner % TILE:
        reasons.append(f"its sizes {array.shape} are not multiples of {TILE}")
    if inner > MOST_COLUMNS:
        reasons.append(f"it has {inner} inputs, more than {MOST_COLUMNS}")
    if array.bits != BITS:
        reasons.append(f"its codes have {array.bits} bits, not {BITS}")
    if array.group_size != TILE or array.stats_group_size != TILE:
        reasons.append(f"its tiles are {array.stats_group_size} x {array.group_size}, not {TILE} x {TILE}")
    if not array.quantized_stats or array.scale_bits != BITS or array.zero_bits != BITS:
        reasons.append(f"its scales and zeros are not in {BITS} bits")
    return f"{', '.join(reasons)}: {_ADVICE}" if reasons else ""


def pack_words(array: SpQRArray) -> WordMatrix:
    """The format's tensors of an array.

    Raises:
      SpQRError: the format cannot hold it.
    """
    if why := why_unsupported(array):
        raise SpQRError(f"the Hugging Face SpQR format cannot hold a weight of shape {array.shape}: {why}")
    out, inner = array.shape
    tiles, groups = out // TILE, inner // TILE
    codes = unpack_codes(np.asarray(array.codes), BITS).reshape(out, groups, TILE).astype(np.uint64)
    words = np.zeros((out, groups), np.uint64)
    for shift, field in enumerate((array.scale_codes, array.zero_codes)):
        words |= unpack_codes(np.asarray(field), BITS).T[:out].astype(np.uint64) << np.uint64(3 * shift)
    for j in range(TILE):
        words |= codes[..., j] << np.uint64(6 + 3 * j)
    ss, sz, zs, zz = np.moveaxis(np.asarray(array.tile_stats), -1, 0)
    stats = np.ascontiguousarray(np.stack([ss, zs, sz, zz], axis=-1)).view(np.uint8)  # [tiles, groups, 8]
    stats = np.repeat(stats.transpose(0, 2, 1), 2, axis=1).reshape(out, groups)
    words |= stats.astype(np.uint64) << np.uint64(54)
    columns = np.asarray(array.outlier_cols)[: array.nnz].astype(np.uint32)
    values = np.asarray(array.outlier_values)[: array.nnz].view(np.uint16).astype(np.uint32)
    perm = np.arange(inner) if array.perm is None else np.asarray(array.perm)
    return WordMatrix(
        dense_weights=words.reshape(tiles, TILE, groups).transpose(0, 2, 1).reshape(-1).view(np.int64),
        row_offsets=np.asarray(array.outlier_row_ptr).astype(np.int32),
        col_vals=(values << 16 | columns).view(np.int32),
        in_perm=perm.astype(np.uint16).view(np.int32),
        shape=array.shape,
    )


@dataclasses.dataclass(frozen=True)
class _Fields:
    """What the words hold."""

    codes: np.ndarray  # u8 [out, groups, 16]
    scale_codes: np.ndarray  # u8 [out, groups]
    zero_codes: np.ndarray
    stats: np.ndarray  # f16 [tiles, groups, 4]: ss, zs, sz, zz


def _fields(matrix: WordMatrix) -> _Fields:
    out, inner = matrix.shape
    tiles, groups = out // TILE, inner // TILE
    words = matrix.dense_weights.view(np.uint64).reshape(tiles, groups, TILE).transpose(0, 2, 1).reshape(out, groups)

    def bits(first: int, count: int) -> np.ndarray:
        return (words >> np.uint64(first) & np.uint64((1 << count) - 1)).astype(np.uint8)

    pieces = bits(54, 8).reshape(tiles, TILE // 2, 2, groups)
    if np.any(pieces[:, :, 0] != pieces[:, :, 1]) or np.any(bits(62, 2)):
        raise SpQRError(
            "the statistics in dense_weights are inconsistent: the file is damaged, or in another version of the format"
        )
    stats = np.ascontiguousarray(pieces[:, :, 0].transpose(0, 2, 1)).view(np.float16)
    codes = np.stack([bits(6 + 3 * j, 3) for j in range(TILE)], axis=-1)
    return _Fields(codes, bits(0, 3), bits(3, 3), stats)


def _check_sizes(matrix: WordMatrix) -> None:
    """Types and sizes of all tensors, before anything is computed from them."""
    out, inner = matrix.shape if len(matrix.shape) == 2 else (0, 0)
    if out < TILE or inner < TILE or out % TILE or inner % TILE or inner > MOST_COLUMNS:
        raise SpQRError(
            f"the shape must be two multiples of {TILE} with at most {MOST_COLUMNS} inputs, got "
            f"{shown(list(matrix.shape))}"
        )
    sizes = {"dense_weights": out * inner // TILE, "in_perm": inner // 2}
    for name, value in matrix.tensors().items():
        dtype, size = np.dtype(np.int64 if name == "dense_weights" else np.int32), sizes.get(name)
        if value.dtype != dtype or value.ndim != 1 or size not in (None, value.size):
            wanted = "(any length,)" if size is None else f"({size},)"
            raise SpQRError(f"{name} must be {dtype} {wanted}, but is {value.dtype} {value.shape}")
    offsets = matrix.row_offsets
    if offsets.size not in (out + 1, out // TILE + 1):
        raise SpQRError(f"row_offsets must have {out + 1} or {out // TILE + 1} entries, but has {offsets.size}")
    if offsets[0] != 0 or np.any(offsets[1:] < offsets[:-1]) or offsets[-1] > matrix.col_vals.size:
        raise SpQRError(
            f"row_offsets must rise from 0 to at most {matrix.col_vals.size}, the number of entries in col_vals"
        )


def _outliers(matrix: WordMatrix) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row, column (permuted) and float16 value of each outlier, by row and then column.

    With an offset a row the entries lie row by row. With an offset a block of 16 rows, entry e of a block
    belongs to its row e % 16, and a row ends at its first entry that is 0.
    """
    out, inner = matrix.shape
    offsets = matrix.row_offsets.astype(np.int64)
    entries = matrix.col_vals[: offsets[-1]].astype(np.int32).view(np.uint32)
    columns, values = entries & 0xFFFF, (entries >> 16).astype(np.uint16).view(np.float16)
    if len(offsets) == out + 1:
        rows, there = np.repeat(np.arange(out), np.diff(offsets)), np.ones(len(entries), bool)
    else:
        place = np.arange(len(entries)) - np.repeat(offsets[:-1], np.diff(offsets))
        rows = np.repeat(TILE * np.arange(out // TILE), np.diff(offsets)) + place % TILE
        first_end = np.full(out, np.iinfo(np.int64).max)
        np.minimum.at(first_end, rows[entries == 0], place[entries == 0])
        there = place < first_end[rows]
    rows, columns, values = rows[there], columns[there].astype(np.int64), values[there]
    order = np.lexsort((columns, rows))
    rows, columns, values = rows[order], columns[order], values[order]
    if np.any(columns >= inner):
        raise SpQRError(f"outlier columns go up to {columns.max()}, but the matrix has {inner} inputs")
    if np.any((np.diff(rows) == 0) & (np.diff(columns) == 0)):
        raise SpQRError("a weight has two outliers: the file is damaged")
    return rows, columns, values


def unpack_words(matrix: WordMatrix) -> SpQRArray:
    """The array that the format's tensors hold.

    Raises:
      SpQRError: tensors of other types or sizes, or whose values contradict each other.
    """
    _check_sizes(matrix)
    fields = _fields(matrix)
    out, inner = matrix.shape
    ss, zs, sz, zz = np.moveaxis(fields.stats, -1, 0)
    rows, columns, values = _outliers(matrix)
    perm, nnz = matrix.in_perm.view(np.uint16), len(rows)
    array = SpQRArray(
        codes=pack_codes(fields.codes.reshape(out, inner), BITS),
        scale_codes=pack_codes(np.ascontiguousarray(fields.scale_codes.T), BITS),
        zero_codes=pack_codes(np.ascontiguousarray(fields.zero_codes.T), BITS),
        tile_stats=np.stack([ss, sz, zs, zz], axis=-1),
        outlier_cols=(columns if nnz else np.zeros(1)).astype(column_dtype(inner)),
        outlier_values=values if nnz else np.zeros(1, np.float16),
        outlier_row_ptr=np.searchsorted(rows, np.arange(out + 1)).astype(np.int32),
        perm=None if np.array_equal(perm, np.arange(inner)) else perm.astype(column_dtype(inner)),
        shape=matrix.shape,
        bits=BITS,
        group_size=TILE,
        stats_group_size=TILE,
        scale_bits=BITS,
        zero_bits=BITS,
    )
    return jax.device_put(array.validate())


def dequantize_words(matrix: WordMatrix) -> np.ndarray:
    """W [out, in] in float16, permuted columns, rounded as the public kernel rounds.

    `SpQRArray.to_dense` of `unpack_words` is the same in float32, without the roundings between.

    Raises:
      SpQRError: as `unpack_words`.
    """
    _check_sizes(matrix)
    fields = _fields(matrix)
    ss, zs, sz, zz = np.moveaxis(np.repeat(fields.stats, TILE, axis=0), -1, 0)
    scale = ss * (fields.scale_codes.astype(np.float16) - sz)
    zero = zs * (fields.zero_codes.astype(np.float16) - zz)
    dense = scale[..., None] * (fields.codes.astype(np.float16) - zero[..., None])
    dense = dense.reshape(matrix.shape).astype(np.float32)
    rows, columns, values = _outliers(matrix)
    dense[rows, columns] += values.astype(np.float32)
    return dense.astype(np.float16)
