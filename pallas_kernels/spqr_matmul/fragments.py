"""The packed layout of the tensor-core kernel: what a thread needs in one step lies together.

One *block* is 64 rows by 16 groups of columns. Two arrays hold of each, contiguously:

  codes       group_size/16 times `bits` planes of [128 threads, 4 words]
  statistics  [128 threads, 2 words], the scale and zero codes of the second level, and
              [4 tiles of 16 rows, 4 columns of threads, 8 words], the tiles' four float16

Words are int32. Thread 32 w + 4 r + c belongs to tile w and holds of it rows r and r + 8;
word h + 2 v of a plane has columns 8 c + 4 (step & 1) + 2 v, and one more in its upper
half, of row r + 8 h: exactly the operand A of ``mma.m16n8k16``, under a permutation of
the columns that `mosaic_gpu.fragment_x` applies to the activations. One 128-bit load is one operand.

A scale word belongs to row r + 8 h. Its bytes are, from the lowest, groups 2 c, 2 c + 8,
2 c + 1 and 2 c + 9, a byte being scale code + 16 * zero code; so the two half-words are
neighbours of one pair of float16 in the operand that multiplies the groups' sums of x.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.spqr_matmul.fields import STEPS, fields, planes_of

ROWS = 64
"""Rows of a block: four tiles of 16, one a warp."""

LINE = 128
"""Words a line of a block; one word a thread."""

GROUPS = 16
"""Groups of columns in a block."""

TILE = 16
"""Rows that share one second-level fit."""


STATISTICS_LINES = 3
"""Lines of a block's statistics."""


def code_lines(bits: int, group_size: int) -> int:
    """Lines of a block's codes."""
    return 4 * bits * (group_size // STEPS)


def activation_lines(group_size: int, batch: int) -> int:
    """Lines that the activations of a block's columns take, for up to 8 rows of them; padded to whole fours."""
    pairs = GROUPS * group_size // (2 * STEPS) + 1  # of steps; the last is the sums of the groups
    columns = min(1 << (batch - 1).bit_length(), 8)
    return 4 * -(-pairs * columns * 16 // (4 * LINE))


def shared_bytes(*, bits: int, group_size: int, batch: int, row_blocks: int, stages: int) -> int:
    """Shared memory of a thread block whose steps are kept `stages` at a time."""
    blocks = row_blocks * (code_lines(bits, group_size) + STATISTICS_LINES)
    return stages * 4 * LINE * (blocks + -(-batch // 8) * activation_lines(group_size, batch))


def num_blocks(out: int, inner: int, group_size: int) -> tuple[int, int]:
    """(blocks of rows, blocks of columns)."""
    return -(-out // ROWS), -(-inner // (GROUPS * group_size))


@functools.partial(jax.jit, static_argnames=("bits", "group_size"))
def pack(
    codes: jax.Array, scales: jax.Array, zeros: jax.Array, tiles: jax.Array, *, bits: int, group_size: int
) -> tuple[jax.Array, jax.Array]:
    """Canonical parts to blocks.

    Args:
      codes: uint16 [out, in / 16 * bits], runs of 16 codes as little-endian bit streams.
      scales, zeros: uint8 [out, groups], below 16.
      tiles: float16 [tiles of 16 rows, groups, 4].
      bits: of a code, 2 to 4.
      group_size: columns a group, a multiple of 16.

    Returns:
      Codes, int32 [row blocks, column blocks, code lines, 128]; statistics, int32
      [row blocks, column blocks, 3, 128].
    """
    rows, cols = num_blocks(codes.shape[0], scales.shape[1] * group_size, group_size)
    parts = group_size // STEPS
    codes = _pad(codes, (rows * ROWS, cols * GROUPS * parts * bits))
    starts = [f.shift + f.position for f in fields(bits)[: STEPS // bits] if f is not None]

    def column_block(block: jax.Array) -> jax.Array:
        width = GROUPS * parts * bits
        runs = jax.lax.dynamic_slice_in_dim(codes, block * width, width, axis=1)
        runs = runs.reshape(rows, ROWS, parts, STEPS, bits).astype(jnp.uint32)
        planes = planes_of(runs, bits, starts)  # rows, 64, parts, planes, 16
        # rows 64 = (tile, h, r), columns 16 = (v, c, e)
        planes = planes.reshape(rows, 4, 2, 8, parts, bits, 2, 4, 2)
        words = planes[..., 0] | planes[..., 1] << 16  # rows, w, h, r, parts, planes, v, c
        return words.transpose(0, 4, 5, 1, 3, 7, 6, 2).reshape(rows, -1, LINE)

    # a column of blocks at a time: unpacked, the whole would take many times its packed size
    words = jax.lax.map(column_block, jnp.arange(cols)).swapaxes(0, 1)

    nibbles = _pad(scales, (rows * ROWS, cols * GROUPS)) | _pad(zeros, (rows * ROWS, cols * GROUPS)) << 4
    nibbles = nibbles.reshape(rows, 4, 2, 8, cols, 2, 4, 2).astype(jnp.uint32)  # rows, w, h, r, cols, v, c, e
    halves = ((v, e) for v in (0, 1) for e in (0, 1))
    stats = functools.reduce(jnp.bitwise_or, (nibbles[..., v, :, e] << (8 * v + 16 * e) for v, e in halves))
    stats = stats.transpose(0, 4, 1, 3, 5, 2).reshape(rows, cols, -1, LINE)

    pairs = jax.lax.bitcast_convert_type(_pad(tiles, (rows * 4, cols * GROUPS, 4)), jnp.uint16).astype(jnp.uint32)
    pairs = pairs.reshape(rows, 4, cols, 2, 4, 2, 4)  # rows, w, cols, v, c, e, which
    second = (pairs[..., 0, :] | pairs[..., 1, :] << 16).transpose(0, 2, 1, 4, 3, 5).reshape(rows, cols, -1, LINE)
    statistics = jnp.concatenate([stats, second], axis=2)
    return jax.lax.bitcast_convert_type(words, jnp.int32), jax.lax.bitcast_convert_type(statistics, jnp.int32)


def _pad(array: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.pad(array, [(0, want - have) for have, want in zip(array.shape, shape, strict=True)])


# ---- the same blocks read as arrays: what the kernel's registers hold, for interpretation and for XLA ---------------


def codes_of(lines: jax.Array, bits: int) -> list[jax.Array]:
    """The codes of one part of a block: [..., 4 * bits, 128] words to 16 steps of [..., 64, 16] int32."""
    lead = lines.shape[:-2]
    words = lines.reshape(*lead, bits, 4, 8, 4, 2, 2)  # plane, w, r, c, v, h
    planes = jnp.stack([words & 0xFFFF, jax.lax.shift_right_logical(words, 16)], axis=-1)  # ..., e
    planes = jnp.moveaxis(planes, (-6, -2, -5, -3, -4, -1), range(len(lead) + 1, len(lead) + 7))  # w, h, r, v, c, e
    planes = planes.reshape(*lead, bits, ROWS, STEPS)
    mask = (1 << bits) - 1
    spare = jnp.zeros_like(planes[..., 0, :, :])
    for p in range(bits):
        spare |= (planes[..., p, :, :] >> 15 & 1) << p
    return [spare if f is None else planes[..., f.plane, :, :] >> (f.shift + f.position) & mask for f in fields(bits)]


def statistics_of(lines: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Scale and zero point of a block's groups: [..., 3, 128] words to [..., 64, 16] each, computed in `dtype`."""
    lead = lines.shape[:-2]
    words = lines[..., :2, :].reshape(*lead, 4, 8, 4, 2)  # w, r, c, h
    bytes_ = jnp.stack(
        [jax.lax.shift_right_logical(words, 8 * v + 16 * e) & 0xFF for v in (0, 1) for e in (0, 1)], axis=-1
    )
    bytes_ = bytes_.reshape(*lead, 4, 8, 4, 2, 2, 2)  # w, r, c, h, v, e
    n = len(lead)
    bytes_ = bytes_.transpose(*range(n), n, n + 3, n + 1, n + 4, n + 2, n + 5).reshape(*lead, ROWS, GROUPS)
    halves = lines[..., 2, :].reshape(*lead, 4, 4, 2, 4)  # w, c, v, which
    halves = jnp.stack([halves & 0xFFFF, jax.lax.shift_right_logical(halves, 16)], axis=-1)  # ..., e
    halves = jnp.moveaxis(halves, (-5, -3, -4, -1, -2), range(n, n + 5)).reshape(*lead, 4, GROUPS, 4)
    tiles = jax.lax.bitcast_convert_type(halves.astype(jnp.uint16), jnp.float16).astype(dtype)
    ss, sz, zs, zz = (jnp.repeat(tiles[..., i], TILE, axis=-2) for i in range(4))
    return ss * ((bytes_ & 15).astype(dtype) - sz), zs * ((bytes_ >> 4).astype(dtype) - zz)


def dequantize(codes: jax.Array, statistics: jax.Array, *, bits: int, group_size: int) -> jax.Array:
    """The dense part of some blocks of rows, in the order of the packed columns.

    Args:
      codes, statistics: of :func:`pack`.

    Returns:
      float32 [64 * row blocks, 16 * group_size * column blocks].
    """
    rows, cols = codes.shape[:2]
    parts = group_size // STEPS
    steps = jnp.stack(codes_of(codes.reshape(rows, cols, parts, 4 * bits, LINE), bits), axis=-2)
    # rows, cols, parts, 64, 16 steps, 16
    steps = steps.transpose(0, 3, 1, 2, 4, 5).reshape(rows, ROWS, cols, GROUPS, group_size)
    scale, zero = (v.transpose(0, 2, 1, 3)[..., None] for v in statistics_of(statistics, jnp.float32))
    return (scale * (steps.astype(jnp.float32) - zero)).reshape(rows * ROWS, -1)


def bits_a_weight(bits: int, group_size: int) -> float:
    """Bits of a block a weight, without outliers."""
    return 32 * LINE * (code_lines(bits, group_size) + STATISTICS_LINES) / (ROWS * GROUPS * group_size)
