"""The "fragments" layout of the tensor-core kernel: what one warp reads at a time lies together.

A *tile* is 16 rows. A *step* is 16 rows x 256 columns of a tile: one warp reads it at a
time, into registers. Columns are padded to whole steps, rows to whole tiles. A group past
the last column has zeros for statistics, so its weights are 0; the result of a padding row
is of no use. `formats.Format` gives the number of words.

Row i of a tile is row 8 h + r: h in 0..1, r in 0..7. Column j of a step is in block
b = j // 16; inside of it, j % 16 = 8 v + 2 c + e: v and e in 0..1, c in 0..3. A lane of a warp
is 4 r + c. These are the places of operand A of ``mma.m16n8k16``. Words are int32,
and e picks the 16-bit half of a word: e = 1 is the upper one.

The words of a step, in this order:

  codes         `width` planes of [32 lanes (r, c), 4 words (v, h)]: lane 4 r + c, word h + 2 v.
                Block b's code is in each half e, at `Format.field(b)`.
  statistics    g is the group of a step: 16 groups of 16 columns, or 8 of 32.
    nibbles, 16 groups (96 words); g = 8 v + 2 c + e:
                [32 lanes (r, c), 2 words (h)]: a byte at bit 8 v + 16 e, scale code + 16 * zero code
                [4 (c), 2 (v), 4 (ss, sz, zs, zz)]: float16 in half e; the same for all rows
    nibbles, 8 groups (48 words); g = 2 c + e:
                [32 lanes (r, c)]: a byte at bit 8 h + 16 e
                [4 (c), 4 (ss, sz, zs, zz)]: float16 in half e
    halves, 16 groups (256 words); g = 8 v + 2 c + e:
                scale, then zero point: each [32 lanes (r, c), 4 words (v, h)], word h + 2 v,
                float16 in half e: operand A of ``mma.m16n8k16``
    halves, 8 groups (128 words); g = 2 c + e:
                [32 lanes (r, c), 4 words]: scale of h = 0, of h = 1, zero point of h = 0, of h = 1,
                float16 in half e: operands A of ``mma.m16n8k8``

With nibbles, scale = ss (scale code - sz) and zero = zs (zero code - zz). A weight is
scale * (code - zero), plus its outlier.

A *stack* is `count` matrices of one shape. If all its tiles have one format, `words` is
[count, tiles, steps, step_words]. If not, `words` is flat, and `spans` int32 [count, tiles, 2]
gives for each tile the offset of its first word, in units of 16 words, and the index of its
format; a tile's steps follow each other. `entries` holds the outliers.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.spqr_matmul.fields import run_codes
from pallas_kernels.spqr_matmul.formats import BLOCK, BLOCKS, SPARE_BIT, STEP_COLUMNS, TILE, Format


def num_steps(columns: int) -> int:
    """Steps that hold so many columns."""
    return -(-columns // STEP_COLUMNS)


def num_tiles(rows: int) -> int:
    """Tiles that hold so many rows."""
    return -(-rows // TILE)


# ---- packing --------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("shape", "bits", "group_size", "form"))
def pack(
    codes: jax.Array,
    statistics: tuple[jax.Array, ...],
    *,
    shape: tuple[int, int],
    bits: int,
    group_size: int,
    form: Format,
) -> jax.Array:
    """The words of a matrix: one program for each shape and format.

    Args:
      codes: uint16 [at least out, at least ceil(in / 16) * bits], runs of 16 codes as
        little-endian bit streams.
      statistics: for `nibbles` scale and zero codes, integers [at least out, at least groups]
        below 16, and float16 [at least ceil(out / 16), at least groups, 4] (ss, sz, zs, zz);
        for `halves` scale and zero point, floats [at least out, at least groups].
      shape: (out, in) of the matrix.
      bits: of a code.
      group_size: columns a group, a multiple of 16.
      form: of the words.

    Returns:
      int32 [1, tiles, steps, step_words].
    """
    out, inner = shape
    tiles, steps = num_tiles(out), num_steps(inner)
    codes = _padded(codes[:out, : -(-inner // BLOCK) * bits], tiles * TILE, steps * BLOCKS * bits)

    def step(number: jax.Array) -> jax.Array:
        runs = lax.dynamic_slice_in_dim(codes, number * BLOCKS * bits, BLOCKS * bits, axis=1)
        return _code_words(run_codes(runs.reshape(-1, BLOCKS, bits).astype(jnp.uint32), bits), form)

    # a step at a time: unpacked, the whole would take many times its packed size
    words = [lax.map(step, jnp.arange(steps)).swapaxes(0, 1)]
    spread = [_spread(part, shape, group_size, form) for part in statistics]
    words += _nibble_words(*spread) if form.statistics == "nibbles" else _half_words(*spread)
    joined = jnp.concatenate([w.reshape(1, tiles, steps, -1) for w in words], axis=3)
    return lax.bitcast_convert_type(joined, jnp.int32)


def _spread(part: jax.Array, shape: tuple[int, int], group_size: int, form: Format) -> jax.Array:
    """Statistics of rows, or of tiles if there are three axes, by the groups of the words.

    Returns:
      [tiles, h, r, steps, groups], or [tiles, steps, groups, 4].
    """
    out, inner = shape
    tiles, steps, by_row = num_tiles(out), num_steps(inner), part.ndim == 2
    part = part[: out if by_row else tiles, : -(-inner // group_size)]
    part = jnp.repeat(part, group_size // form.group_columns, axis=1)[:, : -(-inner // form.group_columns)]
    part = _padded(part, tiles * TILE if by_row else tiles, steps * form.groups)
    return part.reshape(tiles, *((2, 8) if by_row else ()), steps, form.groups, *part.shape[2:])


def _padded(array: jax.Array, rows: int, columns: int) -> jax.Array:
    sizes = (rows - array.shape[0], columns - array.shape[1])
    return jnp.pad(array, [(0, size) for size in sizes] + [(0, 0)] * (array.ndim - 2))


def _code_words(codes: jax.Array, form: Format) -> jax.Array:
    """Codes uint32 [16 * tiles, 16 blocks, 16] of one step to words [tiles, code_words]."""
    whole = form.width * form.fields_per_plane
    planes = codes[:, :whole].reshape(-1, form.width, form.fields_per_plane, BLOCK)
    halves = _or(planes << jnp.asarray(_bits(form), jnp.uint32)[:, None], 2)
    if whole < BLOCKS:
        bit = jnp.arange(form.width, dtype=jnp.uint32)[:, None]
        halves |= (codes[:, whole:] >> bit & 1) << SPARE_BIT
    halves = halves.reshape(-1, 2, 8, form.width, 2, 4, 2)  # tile, h, r, plane, v, c, e
    return _pairs(halves).transpose(0, 3, 2, 5, 4, 1).reshape(-1, form.code_words)


def _nibble_words(scales: jax.Array, zeros: jax.Array, second: jax.Array) -> list[jax.Array]:
    """Codes [tiles, h, r, steps, groups] and float16 [tiles, steps, groups, 4] to words [tiles, steps, ...]."""
    tiles, _, _, steps, groups = scales.shape
    bytes_ = scales.astype(jnp.uint32) & 15 | (zeros.astype(jnp.uint32) & 15) << 4
    bytes_ = bytes_.reshape(tiles, 2, 8, steps, groups // 8, 4, 2)  # tile, h, r, step, v, c, e
    second = second.reshape(tiles, steps, groups // 8, 4, 2, 4)  # tile, step, v, c, e, which
    words = _pairs(jnp.moveaxis(_bits_of(second), 4, -1)).transpose(0, 1, 3, 2, 4)
    if groups == 8:  # bytes by h, since there is no v
        return [_pairs(bytes_[:, 0] | bytes_[:, 1] << 8).transpose(0, 2, 1, 3, 4), words]
    by_v = bytes_[:, :, :, :, 0] | bytes_[:, :, :, :, 1] << 8
    return [_pairs(by_v).transpose(0, 3, 2, 4, 1), words]


def _half_words(scales: jax.Array, zeros: jax.Array) -> list[jax.Array]:
    """Floats [tiles, h, r, steps, groups] to words [tiles, steps, ...]."""
    tiles, _, _, steps, groups = scales.shape
    both = _bits_of(jnp.stack([scales, zeros]).astype(jnp.float16))
    words = _pairs(both.reshape(2, tiles, 2, 8, steps, groups // 8, 4, 2))  # which, tile, h, r, step, v, c
    order = (1, 4, 3, 6, 5, 0, 2) if groups == 8 else (1, 4, 0, 3, 6, 5, 2)
    return [words.transpose(order)]


def _bits(form: Format) -> list[int]:
    """Where the fields of a half-word begin, as stored."""
    return [form.width * slot for slot in range(form.fields_per_plane)]


def _bits_of(halves: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(halves, jnp.uint16).astype(jnp.uint32)


def _pairs(halves: jax.Array) -> jax.Array:
    """The last axis, e, to one word."""
    return halves[..., 0] | halves[..., 1] << 16


def _or(array: jax.Array, axis: int) -> jax.Array:
    return lax.reduce(array, np.uint32(0), lax.bitwise_or, (axis,))


# ---- reading, by XLA ------------------------------------------------------------------------------------------------


class RowWords(NamedTuple):
    """The words of steps, sorted by row; the lower axes as the format has them."""

    codes: jax.Array  # uint32 [..., rows, steps, planes, v, c]
    statistics: jax.Array  # uint32 [..., rows, steps, c] or, of halves, [..., rows, steps, which, v, c]
    second: jax.Array | None  # uint32 [..., steps, v, c, 4]


def by_row(words: jax.Array, form: Format) -> RowWords:
    """Sorts the words of tiles by row: int32 [..., steps, step_words] to 16 rows."""
    words = lax.bitcast_convert_type(words, jnp.uint32)
    lead, groups = words.shape[:-1], form.groups
    codes, words = words[..., : form.code_words], words[..., form.code_words :]
    codes = _rows_first(codes.reshape(*lead, form.width, 8, 4, 2, 2), "prcvh", "pvc")
    if form.statistics == "halves":
        form_axes = ((8, 4, 2, 2), "rcwh", "wc") if groups == 8 else ((2, 8, 4, 2, 2), "wrcvh", "wvc")
        statistics = _rows_first(words.reshape(*lead, *form_axes[0]), *form_axes[1:])
        return RowWords(codes, statistics.reshape(*statistics.shape[: len(lead) + 1], 2, groups // 8, 4), None)
    bytes_, second = words[..., : 4 * groups], words[..., 4 * groups :]
    if groups == 8:  # the upper rows' bytes stand above the lower ones'
        bytes_ = bytes_.reshape(*lead, 8, 4, 1) >> jnp.asarray([0, 8], jnp.uint32)
    second = jnp.swapaxes(second.reshape(*lead, 4, groups // 8, 4), -3, -2)
    return RowWords(codes, _rows_first(bytes_.reshape(*lead, 8, 4, 2), "rch", "c"), second)


def _rows_first(array: jax.Array, axes: str, rest: str) -> jax.Array:
    """[..., steps, axes] to [..., 16 rows (h, r), steps, rest]."""
    lead = array.ndim - len(axes)
    order = [lead + axes.index("h"), lead + axes.index("r"), lead - 1, *(lead + axes.index(axis) for axis in rest)]
    array = array.transpose(*range(lead - 1), *order)
    return array.reshape(*array.shape[: lead - 1], TILE, *array.shape[lead + 1 :])


def pick(words: RowWords, rows: jax.Array) -> RowWords:
    """One row of each tile, int32 [n] in 0..15, of the words of n tiles; the axis of rows has size 1."""

    def chosen(array: jax.Array) -> jax.Array:
        return jax.vmap(lambda tile, row: lax.dynamic_slice_in_dim(tile, row, 1, axis=0))(array, rows)

    return words._replace(codes=chosen(words.codes), statistics=chosen(words.statistics))


def decode(words: RowWords, form: Format) -> jax.Array:
    """The weights without outliers: float32 [..., rows, 256 * steps]."""
    halves = words.codes[..., None, None] >> _shifts(_bits(form), (0, 16))  # ..., plane, v, c, field, e
    lead = halves.ndim - 5
    codes = jnp.moveaxis(halves & (1 << form.width) - 1, -2, lead + 1)
    codes = codes.reshape(*codes.shape[:lead], -1, BLOCK)
    if codes.shape[-2] < BLOCKS:
        bits = words.codes[..., None] >> jnp.asarray([SPARE_BIT, SPARE_BIT + 16], jnp.uint32) & 1
        spare = _or(bits << jnp.arange(form.width, dtype=jnp.uint32)[:, None, None, None], lead)
        codes = jnp.concatenate([codes, spare.reshape(*codes.shape[:-2], 1, BLOCK)], axis=-2)
    scale, zero = _halves_of(words) if words.second is None else _nibbles_of(words, form)
    grouped = codes.reshape(*codes.shape[:-2], form.groups, form.group_columns).astype(jnp.float32)
    weights = scale[..., None] * (grouped - zero[..., None])
    return weights.reshape(*weights.shape[:-3], -1)


def _shifts(first: list[int], second: tuple[int, ...]) -> jax.Array:
    return jnp.asarray(np.add.outer(first, second), jnp.uint32)


def _nibbles_of(words: RowWords, form: Format) -> tuple[jax.Array, jax.Array]:
    """Scale and zero point, float32 [..., rows, steps, groups]."""
    assert words.second is not None
    lines = form.groups // 8
    bytes_ = words.statistics[..., None, None] >> _shifts([8 * v for v in range(lines)], (0, 16))  # ..., c, v, e
    bytes_ = jnp.swapaxes(bytes_, -3, -2)
    bytes_ = bytes_.reshape(*bytes_.shape[:-3], form.groups)
    second = jnp.moveaxis(_floats(words.second), -1, -2)  # ..., steps, v, c, e, which
    second = second.reshape(*second.shape[:-4], form.groups, 4)[..., None, :, :, :]  # for all rows of the tile
    ss, sz, zs, zz = (second[..., which] for which in range(4))
    return ss * ((bytes_ & 15).astype(jnp.float32) - sz), zs * ((bytes_ >> 4 & 15).astype(jnp.float32) - zz)


def _halves_of(words: RowWords) -> tuple[jax.Array, jax.Array]:
    """The same of halves."""
    both = _floats(words.statistics)  # ..., steps, which, v, c, e
    both = both.reshape(*both.shape[:-3], -1)
    return both[..., 0, :], both[..., 1, :]


def _floats(words: jax.Array) -> jax.Array:
    """Two float16 a word, as float32 on a new last axis."""
    halves = (words[..., None] >> jnp.asarray([0, 16], jnp.uint32)).astype(jnp.uint16)
    return lax.bitcast_convert_type(halves, jnp.float16).astype(jnp.float32)
