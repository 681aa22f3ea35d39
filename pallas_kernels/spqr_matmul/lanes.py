"""The packed layout of the TPU kernel: rows of the matrix lie along the lanes, columns along the sublanes.

A block is 32 groups of columns by `block` rows; three arrays hold of each:

  codes       int32 [parts * 2 * bits * 8, rows]: for each 16 groups' columns `bits` planes of 8
              sublanes, whose half-words are 16 columns of a step; see `fields` for which
              codes a half-word holds
  statistics  int32 [8, rows]: byte i of sublane r is group 8 i + r, scale code + 16 * zero code
  tiles       int32 [32, 128]: sublane g is a group; lane t is (scale of the scales, their
              zero) of tile t as two float16, and lane block/16 + t the same of the zeros

Two half-words of a lane are neighbouring sublanes of one bfloat16 register, so a packed
register turns into operands of the matrix unit by masks alone: with the exponent of
2^(7-p) above it, a code at bit p reads as 2^(7-p) + code.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.spqr_matmul.fields import STEPS, Field, planes_of

LANES = 128
GROUPS = 32
"""Groups of columns in a block."""

TILE = 16
"""Rows that share one second-level fit."""

MAX_BLOCK = 1024
"""Rows of a block at most: two words for each of 64 tiles fill 128 lanes."""

_MANTISSA = 7
_BIAS = 127


def fields(bits: int) -> list[Field]:
    """The field of each of 16 steps; with 3 bits the last one's plane is -1: it is spread over the highest bits."""
    found = []
    per_plane = STEPS // bits
    for step in range(STEPS):
        plane, f = divmod(step, per_plane)
        if plane == bits:
            found.append(Field(-1, 0, 0, _MANTISSA, _BIAS))
            continue
        start = f * bits
        shift = 0 if start + bits <= _MANTISSA else start // (_MANTISSA // bits * bits) * (_MANTISSA // bits * bits)
        if bits == 4:
            shift = (0, 1, 8, 9)[f]  # one field fits without a shift, at bit 0 or at bit 3
        found.append(Field(plane, shift, start - shift, _MANTISSA, _BIAS))
    return found


def code_sublanes(bits: int, group_size: int) -> int:
    """Sublanes of a block's codes."""
    return group_size // STEPS * 2 * bits * 8


def vmem_bytes(*, bits: int, group_size: int, block: int, depth: int, batch: int) -> int:
    """Vector memory that the kernel takes: what comes and goes twice, while one is worked on, and its scratch.

    Args:
      depth: column blocks of a grid step.
      batch: rows of activations, a multiple of 8.
    """
    words = depth * ((code_sublanes(bits, group_size) + 8) * block + GROUPS * LANES)
    activations = batch * depth * (GROUPS * group_size + LANES)  # bfloat16
    scratch = 2 * block * depth * GROUPS
    return 2 * (4 * words + 2 * activations + 4 * batch * block) + 4 * scratch


def choose_block(out: int) -> int:
    """Rows a block, a multiple of 128 up to 1024: few rows of padding, and blocks that are not too small."""
    sizes = range(LANES, MAX_BLOCK + 1, LANES)
    return min(sizes, key=lambda size: (-(-out // size) * size * (1 + LANES / (8 * size)), -size))


def padded_inner(inner: int, group_size: int) -> int:
    """Columns, rounded up to whole blocks."""
    return -(-inner // (GROUPS * group_size)) * GROUPS * group_size


@functools.partial(jax.jit, static_argnames=("bits", "group_size", "block"))
def pack(
    codes: jax.Array,
    scales: jax.Array,
    zeros: jax.Array,
    tiles: jax.Array,
    *,
    bits: int,
    group_size: int,
    block: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Canonical parts to this layout; arguments as `fragments.pack`.

    Args:
      block: rows a block, to whole ones of which rows are padded.

    Returns:
      codes int32 [column blocks * code sublanes, rows], statistics int32
      [column blocks * 8, rows], tiles int32 [column blocks * 32, row blocks * 128].
    """
    out, groups = scales.shape
    rows, inner = -(-out // block) * block, padded_inner(groups * group_size, group_size)
    blocks = inner // (GROUPS * group_size)
    parts = group_size // STEPS
    width = GROUPS * parts * bits
    codes = jnp.pad(codes, ((0, rows - out), (0, blocks * width - codes.shape[1])))
    starts = [f.shift + f.position for f in fields(bits)[: STEPS // bits]]

    def column_block(block: jax.Array) -> jax.Array:
        # Steps of a part are of different groups: part p of half h has columns 16 p .. 16 p + 15 of groups 16 h ...
        runs = jax.lax.dynamic_slice_in_dim(codes, block * width, width, axis=1)
        runs = runs.reshape(rows, 2, STEPS, parts, bits).swapaxes(2, 3).astype(jnp.uint32)
        halves = planes_of(runs, bits, starts)  # rows, half, part, plane, 16 columns
        words = halves[..., 0::2] | halves[..., 1::2] << 16
        return words.reshape(rows, -1).T

    # a column of blocks at a time: unpacked, the whole would take many times its packed size
    words = jax.lax.map(column_block, jnp.arange(blocks)).reshape(-1, rows)

    bytes_ = scales.astype(jnp.uint32) | zeros.astype(jnp.uint32) << 4
    bytes_ = jnp.pad(bytes_, ((0, rows - out), (0, inner // group_size - groups))).reshape(rows, blocks, 4, 8)
    statistics = functools.reduce(jnp.bitwise_or, (bytes_[:, :, i] << (8 * i) for i in range(4))).reshape(rows, -1).T

    pairs = jax.lax.bitcast_convert_type(tiles, jnp.uint16).astype(jnp.uint32)
    pairs = jnp.pad(pairs, ((0, rows // TILE - tiles.shape[0]), (0, inner // group_size - groups), (0, 0)))
    pairs = pairs[..., 0::2] | pairs[..., 1::2] << 16
    pairs = (
        pairs.reshape(rows // block, block // TILE, -1, 2).transpose(2, 0, 3, 1).reshape(-1, rows // block, block // 8)
    )
    second = jnp.pad(pairs, ((0, 0), (0, 0), (0, LANES - block // 8))).reshape(pairs.shape[0], -1)
    words, statistics, second = (jax.lax.bitcast_convert_type(p, jnp.int32) for p in (words, statistics, second))
    return words, statistics, second


def second_level(tiles: jax.Array, block: int) -> jax.Array:
    """The words of all tiles side by side, int32 [groups, 2, tiles of 16 rows]."""
    words = tiles.reshape(tiles.shape[0], -1, LANES)[..., : block // 8]
    return words.reshape(tiles.shape[0], -1, 2, block // TILE).swapaxes(1, 2).reshape(tiles.shape[0], 2, -1)


def dequantize(codes: jax.Array, statistics: jax.Array, second: jax.Array, *, bits: int, group_size: int) -> jax.Array:
    """The dense part, float32 [rows, columns] in the packed order.

    Args:
      codes, statistics: as `pack` makes them, or the same rows of both.
      second: of `second_level`, of these rows.
    """
    rows, parts = codes.shape[1], group_size // STEPS
    right = jax.lax.shift_right_logical
    words = codes.reshape(-1, 2, parts, bits, 8, rows)
    halves = jnp.stack([words & 0xFFFF, right(words, 16)], axis=5)  # blocks, half, part, plane, 8, 2, rows
    mask = (1 << bits) - 1
    steps = []
    for field in fields(bits):
        if field.plane >= 0:
            steps.append(halves[:, :, :, field.plane] >> (field.shift + field.position) & mask)
        else:
            steps.append(functools.reduce(jnp.bitwise_or, ((halves[:, :, :, p] >> 15 & 1) << p for p in range(bits))))
    values = jnp.stack(steps, axis=2)  # blocks, half, step, part, 8, 2, rows
    values = values.reshape(-1, group_size, rows).astype(jnp.float32)  # groups, columns of one, rows
    bytes_ = statistics.reshape(-1, 8, rows)
    bytes_ = jnp.stack([right(bytes_, 8 * i) & 0xFF for i in range(4)], axis=1).reshape(-1, rows)
    halves = jnp.stack([second & 0xFFFF, right(second, 16)], axis=-1).astype(jnp.uint16)
    exact = jax.lax.bitcast_convert_type(halves, jnp.float16).astype(jnp.float32)  # groups, 2, tiles, 2
    ss, sz, zs, zz = (jnp.repeat(exact[:, i, :, j], TILE, axis=1) for i in (0, 1) for j in (0, 1))
    scale = ss * ((bytes_ & 15).astype(jnp.float32) - sz)
    zero = zs * ((bytes_ >> 4).astype(jnp.float32) - zz)
    return (scale[:, None] * (values - zero[:, None])).reshape(-1, rows).T
