"""TPU: masks make the codes operands of the matrix unit, and scales come after it.

The unit multiplies 128 columns at a time, which is eight groups of 16. To get the eight
sums apart, each row of activations goes in as eight rows, of which each has one group's
columns and zeros elsewhere. The unit has time for that while the codes are unpacked, up
to 8 rows; above, three groups of eight are scaled before the product and share its rows.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.spqr_matmul import lanes
from pallas_kernels.spqr_matmul.fields import STEPS
from pallas_kernels.spqr_matmul.lanes import GROUPS, LANES

MAX_BATCH = 16
SUBLANES = 8
_UNIT = 128 // STEPS  # steps that the matrix unit multiplies at once


def multiply(
    codes: jax.Array,
    statistics: jax.Array,
    tiles: jax.Array,
    x: jax.Array,
    *,
    bits: int,
    group_size: int,
    block: int,
    depth: int = 1,
    interpret: Any = False,
) -> jax.Array:
    """The dense part times activations that are already in the order of the packed columns.

    Args:
      codes, statistics, tiles: as `lanes.pack` makes them.
      x: bfloat16 [batch, columns], at most 16 rows; columns padded as the codes are.
      depth: column blocks of a grid step, a divisor of their number.
      interpret: False, True, or `pltpu.InterpretParams`.

    Returns:
      float32 [batch, rows].
    """
    batch, inner = x.shape
    rows = codes.shape[1]
    size = -(-batch // SUBLANES) * SUBLANES
    x = jnp.pad(x, ((0, size - batch), (0, 0)))
    width = depth * GROUPS * group_size
    ordered = operand_order(x, group_size)
    out = pl.pallas_call(
        functools.partial(
            _kernel,
            bits=bits,
            parts=group_size // STEPS,
            size=size,
            block=block,
            depth=depth,
            interpret=interpret is not False,
        ),
        grid=(rows // block, inner // width),
        in_specs=[
            pl.BlockSpec((depth * lanes.code_sublanes(bits, group_size), block), lambda n, k: (k, n)),
            pl.BlockSpec((depth * SUBLANES, block), lambda n, k: (k, n)),
            pl.BlockSpec((depth * GROUPS, LANES), lambda n, k: (k, n)),
            pl.BlockSpec((size, width), lambda n, k: (0, k)),
            pl.BlockSpec((size, depth * LANES), lambda n, k: (0, k)),
        ],
        out_specs=pl.BlockSpec((size, block), lambda n, k: (0, n)),
        out_shape=jax.ShapeDtypeStruct((size, rows), jnp.float32),
        scratch_shapes=[pltpu.VMEM((block // LANES * depth * GROUPS, LANES), jnp.float32)] * 2,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="spqr_matmul",
    )(codes, statistics, tiles, ordered, group_sums(x, group_size, scaled_before(size)))
    return out[:batch]


def operand_order(x: jax.Array, group_size: int) -> jax.Array:
    """Columns as the kernel takes them: of a block's halves and parts, 16 steps of 16."""
    x4 = x.reshape(x.shape[0], -1, 2, STEPS, group_size // STEPS, STEPS)
    return x4.swapaxes(3, 4).reshape(x.shape)


def group_sums(x: jax.Array, group_size: int, before: int) -> jax.Array:
    """Sums of each group's activations in two bfloat16, for three products that together are a float32 one.

    The first `before` of eight groups get zeros: their codes lose their offsets before the product.

    Returns:
      bfloat16 [batch, column blocks * 128]: 32 high parts, 32 low parts, 32 high parts, zeros.
    """
    sums = x.astype(jnp.float32).reshape(x.shape[0], -1, GROUPS, group_size).sum(-1)
    sums = jnp.where(jnp.arange(GROUPS) % SUBLANES < before, 0.0, sums)
    high = sums.astype(jnp.bfloat16)
    low = (sums - high.astype(jnp.float32)).astype(jnp.bfloat16)
    return jnp.concatenate([high, low, high, jnp.zeros_like(high)], axis=-1).reshape(x.shape[0], -1)


def scaled_before(size: int) -> int:
    """Of eight groups, how many are scaled before the product: what balances vector and matrix unit."""
    return 0 if size <= SUBLANES else 3


def _kernel(
    codes: Any,
    statistics: Any,
    tiles: Any,
    x: Any,
    sums: Any,
    out: Any,
    scales: Any,
    bases: Any,
    *,
    bits: int,
    parts: int,
    size: int,
    block: int,
    depth: int,
    interpret: bool,
) -> None:
    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        out[...] = jnp.zeros_like(out)

    spread = _Spread(x, size)
    second = [_halves(tiles[g : g + SUBLANES, :]) for g in range(0, depth * GROUPS, SUBLANES)]
    per_block = GROUPS // SUBLANES
    for first in range(0, block, LANES):
        lane = pl.ds(first, LANES)
        total = out[:, lane]
        for d in range(depth):
            terms = []
            for octet in range(per_block):
                bytes_ = lax.shift_right_logical(
                    statistics[d * SUBLANES : (d + 1) * SUBLANES, lane], jnp.int32(8 * octet)
                )
                scale, zero = _statistics(bytes_, second[d * per_block + octet], first, block)
                base = zero + _offsets(bits, octet % 2)
                half = 2 * d + octet // 2
                # Rows are broadcast by loading them: the load slots are idle, the vector unit is not.
                at = ((first // LANES * depth + d) * per_block + octet) * SUBLANES
                scales[at : at + SUBLANES, :] = scale
                if scaled_before(size):
                    bases[at : at + SUBLANES, :] = base
                total = total + _octet(codes, spread, scales, bases, at, half, octet % 2, parts, bits, lane, interpret)
                terms.append(scale * base)
            lanes_of_sums = sums[:, d * LANES : (d + 1) * LANES]
            total = total - jnp.dot(lanes_of_sums, _high_low(terms), preferred_element_type=jnp.float32)
        out[:, lane] = total


def _octet(
    codes: Any,
    spread: _Spread,
    scales: Any,
    bases: Any,
    at: int,
    half: int,
    octet: int,
    parts: int,
    bits: int,
    lane: Any,
    interpret: bool,
) -> jax.Array:
    """Eight groups' part of the result but for the offsets of those that are scaled after the product."""
    before = scaled_before(spread.size)
    acc: Any = 0.0
    for part in range(parts):
        unit = half * parts + part
        planes = [codes[pl.ds((unit * bits + p) * SUBLANES, SUBLANES), lane] for p in range(bits)]
        operands = _operands(planes, bits, range(octet * _UNIT, (octet + 1) * _UNIT))
        for i in range(before):
            exact = operands[i].astype(jnp.float32) - _row(bases, at + i, STEPS, interpret)
            operands[i] = (exact * _row(scales, at + i, STEPS, interpret)).astype(jnp.bfloat16)
        acc += jnp.dot(spread[2 * unit + octet], jnp.concatenate(operands, axis=0), preferred_element_type=jnp.float32)
    rows = spread.size
    total = acc[:rows] if before else _row(scales, at, rows, interpret) * acc[:rows]
    for i in range(max(before, 1), _UNIT):
        start = (i - max(before - 1, 0)) * rows
        total = total + _row(scales, at + i, rows, interpret) * acc[start : start + rows]
    return total


def _row(ref: Any, index: int, times: int, interpret: bool) -> jax.Array:
    """A row, repeated along the sublanes: a load with stride 0, which the interpreter does not know."""
    if interpret:
        return jnp.broadcast_to(ref[index : index + 1, :], (times, LANES))
    return jnp.concatenate([ref[pl.ds(index, SUBLANES, stride=0), :]] * (times // SUBLANES), axis=0)


def _high_low(terms: list[jax.Array]) -> jax.Array:
    """Float32 terms of 32 groups as the bfloat16 that meet `group_sums`, [128, 128]."""
    exact = jnp.concatenate(terms, axis=0)
    high = exact.astype(jnp.bfloat16)
    low = (exact - high.astype(jnp.float32)).astype(jnp.bfloat16)
    return jnp.concatenate([high, high, low, jnp.zeros_like(low)], axis=0)


class _Spread:
    """128 columns of activations, in a row for each group that is scaled after the product; made once a step."""

    def __init__(self, x: Any, size: int):
        self.x, self.size = x, size
        self.made: dict[int, jax.Array] = {}

    def __getitem__(self, unit: int) -> jax.Array:
        if unit not in self.made:
            x = self.x[:, unit * 128 : (unit + 1) * 128]
            group = lax.broadcasted_iota(jnp.int32, x.shape, 1) // STEPS
            before = scaled_before(self.size)
            where = [group < before] if before else []
            where += [group == i for i in range(before, _UNIT)]
            self.made[unit] = jnp.concatenate([jnp.where(w, x, jnp.zeros_like(x)) for w in where], axis=0)
        return self.made[unit]


def _operands(planes: list[jax.Array], bits: int, steps: range) -> list[jax.Array]:
    """Codes plus their offsets, bfloat16 [16 columns, 128 rows] for each of some steps."""
    mask, found, shifted = (1 << bits) - 1, [], {}
    for field in lanes.fields(bits)[steps.start : steps.stop]:
        if field.plane < 0:
            right = lax.shift_right_logical
            word = (right(planes[0], jnp.int32(15)) & 0x10001) | (right(planes[1], jnp.int32(14)) & 0x20002)
            word |= right(planes[2], jnp.int32(13)) & 0x40004
        else:
            if (field.plane, field.shift) not in shifted:
                word = planes[field.plane]
                shifted[field.plane, field.shift] = (
                    lax.shift_right_logical(word, jnp.int32(field.shift)) if field.shift else word
                )
            word = shifted[field.plane, field.shift] & (mask * 0x10001 << field.position)
        found.append(pltpu.bitcast(word | (field.exponent * 0x10001), jnp.bfloat16))
    return found


def _offsets(bits: int, octet: int) -> jax.Array:
    """What the codes of eight steps are read with, float32 [8, 1]."""
    step = lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 0)
    values = [field.offset for field in lanes.fields(bits)][octet * SUBLANES : (octet + 1) * SUBLANES]
    result = jnp.full((SUBLANES, LANES), values[0], jnp.float32)
    for i, value in enumerate(values[1:], 1):
        result = jnp.where(step == i, value, result)
    return result


def _halves(words: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The lower and the upper float16 of each word, as float32 (TPUs do not know float16)."""

    def widen(half: jax.Array) -> jax.Array:
        bits = ((half & 0x7FFF) << 13) | ((half & 0x8000) << 16)
        return lax.bitcast_convert_type(bits, jnp.float32) * jnp.float32(2.0**112)  # exponents differ by 112 in bias

    return widen(words & 0xFFFF), widen(lax.shift_right_logical(words, jnp.int32(16)))


def _statistics(
    bytes_: jax.Array, second: tuple[jax.Array, jax.Array], first: int, block: int
) -> tuple[jax.Array, jax.Array]:
    """Scale and zero point of eight groups of 128 rows, float32 [8, 128], from codes in the words' lowest bytes."""
    index = lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 1) // lanes.TILE
    found = []
    for which in (0, 1):
        at = index + (first + which * block) // lanes.TILE
        step, base = (jnp.take_along_axis(v, at, axis=1, mode="promise_in_bounds") for v in second)
        code = (lax.shift_right_logical(bytes_, jnp.int32(4 * which)) & 15).astype(jnp.float32)
        found.append(step * (code - base))
    return found[0], found[1]
