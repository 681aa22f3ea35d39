"""Matrix times one or two vectors on a GPU's ordinary cores, through Pallas's Triton backend.

JAX means to take that backend away; `api.why_no_triton` says whether it is still there.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.spqr_matmul import rows
from pallas_kernels.spqr_matmul.tuning import TritonConfig

MAX_BATCH = 2
LANES = 32
VECTOR = rows.BLOCK // LANES  # rows a thread


def multiply(
    codes: jax.Array,
    statistics: jax.Array,
    tiles: jax.Array,
    x: jax.Array,
    *,
    bits: int,
    group_size: int,
    config: TritonConfig,
    interpret: bool = False,
) -> jax.Array:
    """The dense part times activations that are already in the order of the packed columns.

    Args:
      codes, statistics, tiles: as `rows.pack` makes them, rows padded to 128 * config.blocks.
      x: [batch, columns], at most 2 rows; columns padded as the codes are.
      interpret: run in Pallas's interpreter.

    Returns:
      float32 [splits, batch, rows], to be added up over the splits.
    """
    batch = x.shape[0]
    x = x.astype(jnp.float32)
    steps = statistics.shape[0]
    per_split = -(-steps // config.splits)
    count = codes.shape[2]
    body = functools.partial(
        _kernel,
        bits=bits,
        group_size=group_size,
        batch=batch,
        steps=steps,
        per_split=per_split,
        blocks=config.blocks,
        arithmetic=_Interpreted() if interpret else _Assembly(),
    )
    operands = (codes, statistics, tiles, x, sums(x, bits, group_size))
    options = {} if interpret else {"compiler_params": _compiler_params()}
    return pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct((config.splits, batch, count), jnp.float32),
        grid=(count // (rows.BLOCK * config.blocks), config.splits),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY) for _ in operands],
        out_specs=pl.BlockSpec(memory_space=pl.ANY),
        interpret=interpret,
        name="spqr_matvec",
        **options,
    )(*operands)


def _compiler_params() -> Any:
    from jax.experimental.pallas import triton

    return triton.CompilerParams(num_warps=1, num_stages=1)


def sums(x: jax.Array, bits: int, group_size: int) -> jax.Array:
    """By group of columns: the sum of x, and minus the sum of x times what the codes are read with.

    Args:
      x: float32 [batch, columns].

    Returns:
      float32 [batch, groups, 2].
    """
    offsets = np.tile([rows.offset(position) for *_, position in rows.fields(bits)], x.shape[1] // rows.WORD_COLUMNS)
    grouped = x.reshape(x.shape[0], -1, group_size)
    weighted = (x * offsets.astype(np.float32)).reshape(grouped.shape)
    return jnp.stack([grouped.sum(-1), -weighted.sum(-1)], axis=-1)


def _kernel(
    codes: Any,
    statistics: Any,
    tiles: Any,
    x: Any,
    sums: Any,
    out: Any,
    *,
    bits: int,
    group_size: int,
    batch: int,
    steps: int,
    per_split: int,
    blocks: int,
    arithmetic: Any,
) -> None:
    block, split = pl.program_id(0), pl.program_id(1)
    lane = jnp.arange(LANES, dtype=jnp.int32)
    first = [(block * blocks + i) * rows.BLOCK for i in range(blocks)]
    at = [f + lane[:, None] * VECTOR + jnp.arange(VECTOR, dtype=jnp.int32)[None, :] for f in first]
    words_a_group = group_size // rows.WORD_COLUMNS  # 0 for groups of 16: two share their words

    def step(i: jax.Array, totals: Any) -> Any:
        totals = [list(t) for t in totals]
        for pair in range(rows.GROUPS * group_size // max(group_size, rows.WORD_COLUMNS)):
            groups_here = 1 if words_a_group else 2
            for b in range(blocks):
                parts = _group_sums(i, pair, b)
                for j in range(groups_here):
                    group = pair * groups_here + j
                    scale, zero = _statistics(i, group, b)
                    for row in range(batch):
                        total_x = sums[row, i * rows.GROUPS + group, 0]
                        corrected = arithmetic.fma(-zero, _spread(total_x), parts[row][j])
                        totals[b][row] = arithmetic.fma(scale, corrected, totals[b][row])
        return tuple(tuple(t) for t in totals)

    def _spread(value: jax.Array) -> jax.Array:
        return jnp.broadcast_to(value, (LANES, VECTOR))

    def _group_sums(i: jax.Array, pair: int, b: int) -> list[list[jax.Array]]:
        """Sums of (code + offset) * x less those of offset * x, by row of x and by group of the pair."""
        groups_here = 1 if words_a_group else 2
        parts = [
            [_spread(sums[row, i * rows.GROUPS + pair * groups_here + j, 1]) for j in range(groups_here)]
            for row in range(batch)
        ]
        for part in range(max(words_a_group, 1)):
            run = i * (rows.GROUPS * group_size // rows.WORD_COLUMNS) + pair * max(words_a_group, 1) + part
            words = [codes[run, word, at[b]] for word in range(bits)]
            sources = {(-1, 0): arithmetic.spare_word(words)} if bits == 3 else {}
            for column, word, shift, position in rows.fields(bits):
                if (word, shift) not in sources:
                    sources[word, shift] = arithmetic.shift(words[word], shift)
                for row in range(batch):
                    value = _spread(x[row, run * rows.WORD_COLUMNS + column])
                    j = column // group_size
                    parts[row][j] = arithmetic.read_fma(sources[word, shift], bits, position, value, parts[row][j])
        return parts

    def _statistics(i: jax.Array, group: int, b: int) -> tuple[jax.Array, jax.Array]:
        word = statistics[i, at[b]]
        tile = first[b] // rows.TILE + lane // (rows.TILE // VECTOR)
        found = []
        for which in (0, 1):
            pair = tiles[i * rows.GROUPS + group, which, tile]
            step_, base = (_half(pair), _half(lax.shift_right_logical(pair, jnp.int32(16))))
            moved = arithmetic.shift(word, _CODE_POSITION - 8 * group - 4 * which)
            constant = -step_ * (base + rows.offset(_CODE_POSITION))
            spread = (jnp.broadcast_to(v[:, None], (LANES, VECTOR)) for v in (step_, constant))
            found.append(arithmetic.read_fma(moved, 4, _CODE_POSITION, *spread))
        return found[0], found[1]

    zero = jnp.zeros((LANES, VECTOR), jnp.float32)
    start = split * per_split
    stop = jnp.minimum(start + per_split, steps)
    totals = lax.fori_loop(start, stop, step, ((zero,) * batch,) * blocks)
    for b in range(blocks):
        for row in range(batch):
            out[split, row, at[b]] = totals[b][row]


_CODE_POSITION = 16  # where a scale or zero code is moved to be read


def _half(word: jax.Array) -> jax.Array:
    """The lower float16 of each word, as float32."""
    return lax.bitcast_convert_type((word & 0xFFFF).astype(jnp.int16), jnp.float16).astype(jnp.float32)


class _Interpreted:
    """The kernel's arithmetic in jax.numpy."""

    def shift(self, word: jax.Array, by: int) -> jax.Array:
        """Left, or right if `by` is negative."""
        if by >= 0:
            return lax.shift_left(word, jnp.full_like(word, by)) if by else word
        return lax.shift_right_logical(word, jnp.full_like(word, -by))

    def fma(self, a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
        return a * b + c

    def read_fma(self, word: jax.Array, bits: int, position: int, x: jax.Array, total: jax.Array) -> jax.Array:
        """(offset + code at `position`) * x + total."""
        mask, exponent = ((1 << bits) - 1) << position, rows.exponent(position)
        return lax.bitcast_convert_type((word & mask) | exponent, jnp.float32) * x + total

    def spare_word(self, words: list[jax.Array]) -> jax.Array:
        return rows.spare_word(words)


class _Assembly(_Interpreted):
    """The same in PTX: Triton's own operators are not contracted to FMAs, nor AND and OR to one LOP3."""

    def _inline(self, text: str, constraints: str, result: Any, *args: jax.Array) -> jax.Array:
        from jax.experimental.pallas import triton

        shape = jax.ShapeDtypeStruct(args[0].shape, result)
        return triton.elementwise_inline_asm(
            text, args=args, constraints=constraints, pack=1, result_shape_dtypes=[shape]
        )[0]

    def fma(self, a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
        return self._inline("fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", jnp.float32, a, b, c)

    def read_fma(self, word: jax.Array, bits: int, position: int, x: jax.Array, total: jax.Array) -> jax.Array:
        mask, exponent = ((1 << bits) - 1) << position, rows.exponent(position)
        read = self._inline(f"lop3.b32 $0, $1, {mask}, {exponent}, 0xEA;", "=f,r", jnp.float32, word)
        return self.fma(read, x, total)

    def spare_word(self, words: list[jax.Array]) -> jax.Array:
        low, middle = self.shift(words[0], -14), self.shift(words[1], -12)
        merged = self._select(middle, low, 0x3 << 18)
        return self._select(self.shift(words[2], -10), merged, 0x3 << 20)

    def _select(self, a: jax.Array, b: jax.Array, mask: int) -> jax.Array:
        return self._inline(f"lop3.b32 $0, {mask}, $1, $2, 0xCA;", "=r,r,r", jnp.int32, a, b)
