"""Arithmetic that Python has no operator for, and what the lanes of a warp do together."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from pallas_kernels.machine.dialects import f32, i32, instruction, several
from pallas_kernels.machine.values import Float, Pair, Word, plain_word


def and_or(a: Word, mask: int, bits: int) -> Word:
    """(a & mask) | bits in one instruction; from the two operators the compiler makes two, as both are immediates."""
    return Word(instruction(i32(), [a.mlir], f"lop3.b32 $0, $1, {mask}, {bits}, 0xEA;", "=r,r"))


def merge(mask: int, a: Word, b: Word) -> Word:
    """The bits of `a` where the mask has ones, else those of `b`, in one instruction."""
    return Word(instruction(i32(), [a.mlir, b.mlir], f"lop3.b32 $0, {mask}, $1, $2, 0xCA;", "=r,r,r"))


def fma(a: Float, b: Float, c: Float) -> Float:
    """a * b + c, rounded once."""
    return Float(instruction(f32(), [a.mlir, b.mlir, c.mlir], "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f"))


def fma_pair(a: Pair, b: Pair, c: Pair) -> Pair:
    """a * b + c of both float16, each rounded once."""
    operands = [v.word().mlir for v in (a, b, c)]
    return Word(instruction(i32(), operands, "fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r")).pair()


def larger(a: Float, b: Float) -> Float:
    """The larger of two float32, the number if one is a NaN."""
    return Float(instruction(f32(), [a.mlir, b.mlir], "max.f32 $0, $1, $2;", "=f,f,f"))


def larger_bfloat16(a: Word, b: Word) -> Word:
    """The larger of two bfloat16, in both halves."""
    return Word(instruction(i32(), [a.mlir, b.mlir], "max.bf16x2 $0, $1, $2;", "=r,r,r"))


def exp2(a: Float) -> Float:
    """2 to the a, to about 2 units in the last place."""
    return Float(instruction(f32(), [a.mlir], "ex2.approx.ftz.f32 $0, $1;", "=f,f"))


def product(a: Float, b: Float) -> Float:
    """a * b, rounded: the compiler must not join it with an addition that follows."""
    return Float(instruction(f32(), [a.mlir, b.mlir], "mul.rn.f32 $0, $1, $2;", "=f,f,f"))


def reciprocal(a: Float) -> Float:
    """1 / a, to 1 unit in the last place."""
    return Float(instruction(f32(), [a.mlir], "rcp.approx.ftz.f32 $0, $1;", "=f,f"))


def as_pair(low: Float, high: Float) -> Pair:
    """Two float32 rounded to float16."""
    rounded = instruction(i32(), [high.mlir, low.mlir], "cvt.rn.f16x2.f32 $0, $1, $2;", "=r,f,f")
    return Word(rounded).pair()


def as_bfloat16(low: Float, high: Float) -> Word:
    """Two float32 rounded to bfloat16, `low` in the low half."""
    return Word(instruction(i32(), [high.mlir, low.mlir], "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f"))


def tree_sum(values: Sequence[Float]) -> Float:
    """The sum in a fixed order, pairs first."""
    values = list(values)
    while len(values) > 1:
        pairs = [values[i : i + 2] for i in range(0, len(values), 2)]
        values = [functools.reduce(lambda a, b: a + b, pair) for pair in pairs]
    return values[0]


def mma(a: Sequence[Word], b: Sequence[Word], c: Sequence[Float]) -> list[Float]:
    """The warp's product of float16 [16, 16] and [16, 8], plus float32 [16, 8] (mma.m16n8k16).

    Lane 4 r + c holds of `a` words (r, 2c), (r + 8, 2c), (r, 2c + 8), (r + 8, 2c + 8), each two columns; of `b` rows
    2c, 2c + 1 and 2c + 8, 2c + 9 of column r; of the sum elements (r, 2c), (r, 2c + 1), (r + 8, 2c), (r + 8, 2c + 1).
    """
    text = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
    operands = [v.mlir for v in (*a, *b, *c)]
    constraints = "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f"
    return [Float(v) for v in several(4, f32(), operands, text, constraints, False)]


def mma_half(a: Sequence[Word], b: Word, c: Sequence[Float]) -> list[Float]:
    """As `mma`, of float16 [16, 8] and [8, 8]: the first two words of `a` and the first of `b` (mma.m16n8k8)."""
    text = "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {$0,$1,$2,$3}, {$4,$5}, {$6}, {$7,$8,$9,$10};"
    operands = [v.mlir for v in (*a, b, *c)]
    return [Float(v) for v in several(4, f32(), operands, text, "=f,=f,=f,=f,r,r,r,f,f,f,f", False)]


def from_lane(value: Word, lane: Word | int, width: int = 32) -> Word:
    """The value that another lane has; `lane` counts within lanes of `width`, a power of two."""
    clamp = (32 - width) << 8 | 0x1F
    text = f"shfl.sync.idx.b32 $0, $1, $2, {clamp}, -1;"
    return Word(instruction(i32(), [value.mlir, plain_word(lane)], text, "=r,r,r", pinned=True))


def from_xor_lane(value: Word, mask: int) -> Word:
    """The value that lane ^ mask has."""
    text = f"shfl.sync.bfly.b32 $0, $1, {mask}, 31, -1;"
    return Word(instruction(i32(), [value.mlir], text, "=r,r", pinned=True))


def warp_sum(value: Float, lanes: int = 32) -> Float:
    """The sum over each `lanes` lanes that stand together, in every one of them; in a fixed order."""
    distance = lanes // 2
    while distance:
        value = value + from_xor_lane(value.word(), distance).float()
        distance //= 2
    return value


def warp_maximum(value: Word) -> Word:
    """The largest word of the warp, in all lanes."""
    return Word(instruction(i32(), [value.mlir], "redux.sync.max.u32 $0, $1, -1;", "=r,r", pinned=True))
