"""The packed layout of the matrix-vector kernel: threads lie along the rows.

  codes       int32 [columns / 32, bits, rows]: `bits` words hold 32 columns of a row
  statistics  int32 [columns / 4 groups, rows]: a byte a group, scale code + 16 * zero code
  tiles       int32 [groups, 2, tiles of 16 rows]: the float16 pairs (scale of the scales,
              their zero) and (scale of the zeros, their zero)

All that a tile of 16 rows shares and every activation are then the same for neighbouring
threads, and no sum runs across them. In a word, field f of b bits begins at bit b * f and
is column f of the word; three bits leave two bits over in each of three words, and these,
from the lowest, are the codes of columns 30 and 31.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

TILE = 16
"""Rows that share one second-level fit."""

WORD_COLUMNS = 32
"""Columns that `bits` words of a row hold."""

BLOCK = 128
"""Rows of a warp: four a thread, so that it loads 128 bits of codes at a time."""

GROUPS = 4
"""Groups of a word of statistics."""

_MANTISSA = 23  # bits of a float32's mantissa
_BIAS = 127  # of its exponent


def fields(bits: int) -> Iterator[tuple[int, int, int, int]]:
    """Of each of the 32 columns: (column, word, left shift or minus right shift, position afterwards).

    After the shift the field lies in a float32's mantissa, at bit 11 or higher: with the
    exponent of 2^(23 - position) above, the word reads as that power of two plus the code,
    and a float32 sum over the offsets loses 12 bits of 24 at most. Columns of the spare
    bits have word -1 and are found in `spare_word`.
    """
    a_word = WORD_COLUMNS // bits
    for column in range(bits * a_word):
        word, f = divmod(column, a_word)
        start = bits * f
        low = 11 if bits != 2 else 12  # where the lowest field of a shifted word comes to stand
        high = _MANTISSA - bits
        direct = [g for g in range(a_word) if low <= bits * g <= high]
        if f < direct[0]:
            shift = high - bits * (direct[0] - 1)
        elif f > direct[-1]:
            shift = high - bits * (a_word - 1)
        else:
            shift = 0
        yield column, word, shift, start + shift
    for column in range(bits * a_word, WORD_COLUMNS):
        yield column, -1, 0, SPARE_POSITION + bits * (column - bits * a_word)


SPARE_POSITION = 16
"""Bit at which the first code of the spare bits begins in `spare_word`."""


def offset(position: int) -> float:
    """What a code at `position` has in front of it when read as a float32."""
    return float(1 << (_MANTISSA - position))


def exponent(position: int) -> int:
    """The bits of a float32 that make that so."""
    return (_BIAS + _MANTISSA - position) << _MANTISSA


def padded_inner(inner: int, group_size: int) -> int:
    """Columns, rounded up to whole words of statistics."""
    return -(-inner // (GROUPS * group_size)) * GROUPS * group_size


def padded_rows(out: int, block: int) -> int:
    """Rows, rounded up to whole blocks of a kernel."""
    return -(-out // block) * block


@functools.partial(jax.jit, static_argnames=("bits", "group_size"))
def pack(
    codes: jax.Array,
    scales: jax.Array,
    zeros: jax.Array,
    tiles: jax.Array,
    *,
    bits: int,
    group_size: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Canonical parts to this layout; arguments as `fragments.pack`. Rows are padded to whole blocks.

    Returns:
      (codes, statistics, tiles), see the module.
    """
    out, groups = scales.shape
    rows, inner = padded_rows(out, BLOCK), padded_inner(groups * group_size, group_size)
    runs = codes.reshape(out, -1, bits).astype(jnp.uint32)
    runs = jnp.pad(runs, ((0, rows - out), (0, inner // TILE - runs.shape[1]), (0, 0)))
    pairs = runs.reshape(rows, inner // WORD_COLUMNS, 2 * bits)
    words = [jnp.zeros(pairs.shape[:2], jnp.uint32) for _ in range(bits)]
    for column, word, shift, position in fields(bits):
        code = _code(pairs, column, bits)
        if word >= 0:
            words[word] |= code << (position - shift)
            continue
        for bit in range(bits):
            number = bits * (column - bits * (WORD_COLUMNS // bits)) + bit  # of the spare bits, two a word
            words[number // 2] |= (code >> bit & 1) << (30 + number % 2)
    packed = jnp.stack(words, axis=-1).transpose(1, 2, 0)

    bytes_ = scales.astype(jnp.uint32) | zeros.astype(jnp.uint32) << 4
    bytes_ = jnp.pad(bytes_, ((0, rows - out), (0, inner // group_size - groups))).reshape(rows, -1, GROUPS)
    statistics = functools.reduce(jnp.bitwise_or, (bytes_[..., i] << (8 * i) for i in range(GROUPS))).T

    halves = jax.lax.bitcast_convert_type(tiles, jnp.uint16).astype(jnp.uint32)
    halves = jnp.pad(halves, ((0, rows // TILE - tiles.shape[0]), (0, inner // group_size - groups), (0, 0)))
    second = (halves[..., 0::2] | halves[..., 1::2] << 16).transpose(1, 2, 0)
    packed, statistics, second = (jax.lax.bitcast_convert_type(p, jnp.int32) for p in (packed, statistics, second))
    return packed, statistics, second


def _code(pairs: jax.Array, column: int, bits: int) -> jax.Array:
    """One of 32 columns out of two canonical runs of 16."""
    run, j = divmod(column, TILE)
    word, shift = divmod(j * bits, 16)
    value = pairs[..., run * bits + word] >> shift
    if shift + bits > 16:
        value |= pairs[..., run * bits + word + 1] << (16 - shift)
    return value & ((1 << bits) - 1)


def spare_word(words: list[jax.Array]) -> jax.Array:
    """The spare bits of three words of 3-bit codes: the codes of columns 30 and 31 from bit 16 on."""
    right = jax.lax.shift_right_logical
    low = jnp.bitwise_and(right(words[0], 30), 3)
    middle = jnp.bitwise_and(right(words[1], 28), 12)
    high = jnp.bitwise_and(right(words[2], 26), 48)
    return (low | middle | high) << SPARE_POSITION


def dequantize(codes: jax.Array, statistics: jax.Array, tiles: jax.Array, *, bits: int, group_size: int) -> jax.Array:
    """The dense part, float32 [rows, columns] in the packed order, of arrays as `pack` makes them."""
    words = [codes[:, word, :] for word in range(bits)]
    mask = (1 << bits) - 1
    columns = []
    for _, word, shift, position in fields(bits):
        source = spare_word(words) if word < 0 else words[word]
        columns.append(jax.lax.shift_right_logical(source, position - shift) & mask)
    values = jnp.stack(columns, axis=1).reshape(-1, codes.shape[2]).T.astype(jnp.float32)  # [rows, columns]
    bytes_ = jnp.stack([jax.lax.shift_right_logical(statistics, 8 * i) & 0xFF for i in range(GROUPS)], axis=1)
    bytes_ = bytes_.reshape(-1, statistics.shape[1]).T  # [rows, groups]
    halves = jnp.stack([tiles & 0xFFFF, jax.lax.shift_right_logical(tiles, 16)], axis=-1).astype(jnp.uint16)
    second = jax.lax.bitcast_convert_type(halves, jnp.float16).astype(jnp.float32)  # groups, 2, tiles, 2
    ss, sz, zs, zz = (jnp.repeat(second[:, i, :, j].T, TILE, axis=0) for i in (0, 1) for j in (0, 1))
    scale = ss * ((bytes_ & 15).astype(jnp.float32) - sz)
    zero = zs * ((bytes_ >> 4).astype(jnp.float32) - zz)
    values = values.reshape(values.shape[0], -1, group_size)
    return (scale[..., None] * (values - zero[..., None])).reshape(values.shape[0], -1)
