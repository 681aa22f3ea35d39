"""What a thread has in registers: words, float32, pairs of float16 and predicates, with Python's operators."""

from __future__ import annotations

from typing import Any

import numpy as np

from pallas_kernels.machine.dialects import arith, f16x2, f32, i32, ir, llvm, vector


class Value:
    """What a thread has in a register: an MLIR value with operators."""

    __slots__ = ("mlir",)

    def __init__(self, mlir: Any) -> None:
        self.mlir = mlir


class Bool(Value):
    """A predicate."""

    def __and__(self, other: Bool) -> Bool:
        return Bool(arith.andi(self.mlir, other.mlir))

    def __or__(self, other: Bool) -> Bool:
        return Bool(arith.ori(self.mlir, other.mlir))

    def __invert__(self) -> Bool:
        i1 = self.mlir.type
        return Bool(arith.xori(self.mlir, arith.constant(i1, ir.IntegerAttr.get(i1, -1))))


class Word(Value):
    """32 bits, an unsigned integer where that matters. Operations that change nothing make no instruction."""

    def __add__(self, other: Word | int) -> Word:
        return self if _is(other, 0) else Word(arith.addi(self.mlir, plain_word(other)))

    def __sub__(self, other: Word | int) -> Word:
        return self if _is(other, 0) else Word(arith.subi(self.mlir, plain_word(other)))

    def __rsub__(self, other: int) -> Word:
        return Word(arith.subi(plain_word(other), self.mlir))

    def __mul__(self, other: Word | int) -> Word:
        if _is(other, 0):
            return word(0)
        return self if _is(other, 1) else Word(arith.muli(self.mlir, plain_word(other)))

    def __floordiv__(self, other: Word | int) -> Word:
        return self if _is(other, 1) else Word(arith.divui(self.mlir, plain_word(other)))

    def __mod__(self, other: Word | int) -> Word:
        return word(0) if _is(other, 1) else Word(arith.remui(self.mlir, plain_word(other)))

    def __and__(self, other: Word | int) -> Word:
        return Word(arith.andi(self.mlir, plain_word(other)))

    def __or__(self, other: Word | int) -> Word:
        return Word(arith.ori(self.mlir, plain_word(other)))

    def __xor__(self, other: Word | int) -> Word:
        return self if _is(other, 0) else Word(arith.xori(self.mlir, plain_word(other)))

    def __lshift__(self, other: Word | int) -> Word:
        return self if _is(other, 0) else Word(arith.shli(self.mlir, plain_word(other)))

    def __rshift__(self, other: Word | int) -> Word:
        return self if _is(other, 0) else Word(arith.shrui(self.mlir, plain_word(other)))

    __radd__, __rmul__, __rand__, __ror__, __rxor__ = __add__, __mul__, __and__, __or__, __xor__

    def __lt__(self, other: Word | int) -> Bool:
        return Bool(arith.cmpi(arith.CmpIPredicate.ult, self.mlir, plain_word(other)))

    def equals(self, other: Word | int) -> Bool:
        return Bool(arith.cmpi(arith.CmpIPredicate.eq, self.mlir, plain_word(other)))

    def signed_below(self, other: Word | int) -> Bool:
        """Whether it is less, both as signed integers."""
        return Bool(arith.cmpi(arith.CmpIPredicate.slt, self.mlir, plain_word(other)))

    def float(self) -> Float:
        """The same bits as a float32."""
        return Float(llvm.bitcast(f32(), self.mlir))

    def pair(self) -> Pair:
        """The same bits as two float16."""
        return Pair(llvm.bitcast(f16x2(), self.mlir))


class Float(Value):
    """A float32."""

    def __add__(self, other: Float | float) -> Float:
        return Float(arith.addf(self.mlir, plain_float(other)))

    def __sub__(self, other: Float | float) -> Float:
        return Float(arith.subf(self.mlir, plain_float(other)))

    def __mul__(self, other: Float | float) -> Float:
        return Float(arith.mulf(self.mlir, plain_float(other)))

    def __truediv__(self, other: Float | float) -> Float:
        return Float(arith.divf(self.mlir, plain_float(other)))

    __radd__, __rmul__ = __add__, __mul__

    def __lt__(self, other: Float | float) -> Bool:
        return Bool(arith.cmpf(arith.CmpFPredicate.OLT, self.mlir, plain_float(other)))

    def word(self) -> Word:
        """The same bits as a word."""
        return Word(llvm.bitcast(i32(), self.mlir))


class Pair(Value):
    """Two float16 in a word; element 0 is the low half."""

    def __add__(self, other: Pair) -> Pair:
        return Pair(arith.addf(self.mlir, other.mlir))

    def __sub__(self, other: Pair) -> Pair:
        return Pair(arith.subf(self.mlir, other.mlir))

    def __mul__(self, other: Pair) -> Pair:
        return Pair(arith.mulf(self.mlir, other.mlir))

    def __getitem__(self, element: int) -> Float:
        """Element 0 or 1 as a float32."""
        return Float(arith.extf(f32(), vector.extract(self.mlir, [], [element])))

    def both(self, element: int) -> Pair:
        """Element 0 or 1 twice."""
        half = vector.extract(self.mlir, [], [element])
        return Pair(vector.from_elements(f16x2(), [half, half]))

    def negated(self) -> Pair:
        return Pair(arith.negf(self.mlir))

    def word(self) -> Word:
        """The same bits as a word."""
        return Word(llvm.bitcast(i32(), self.mlir))


def _is(value: Word | int, number: int) -> bool:
    return isinstance(value, int) and value == number


def plain_word(value: Word | int) -> Any:
    """The MLIR value of a word or of a constant."""
    return word(value).mlir if isinstance(value, int) else value.mlir


def plain_float(value: Float | float) -> Any:
    """The MLIR value of a float32 or of a constant."""
    return value.mlir if isinstance(value, Float) else number(value).mlir


def word(value: int) -> Word:
    """A constant word."""
    value &= 0xFFFFFFFF
    return Word(arith.constant(i32(), ir.IntegerAttr.get(i32(), value - (1 << 32) if value >> 31 else value)))


def number(value: float) -> Float:
    """A constant float32."""
    return Float(arith.constant(f32(), ir.FloatAttr.get(f32(), float(value))))


def half_bits(low: float, high: float) -> int:
    """Two float16 as the integer of a word."""
    bits = [int(np.float16(v).view(np.uint16)) for v in (low, high)]
    return bits[0] | bits[1] << 16


def halves(low: float, high: float | None = None) -> Pair:
    """A constant pair; both the same where `high` is not given."""
    return word(half_bits(low, low if high is None else high)).pair()


def select(condition: Bool, a: Word | int, b: Word | int) -> Word:
    """`a` if the condition holds, else `b`."""
    return Word(arith.select(condition.mlir, plain_word(a), plain_word(b)))


def choose(condition: Bool, a: Float | float, b: Float | float) -> Float:
    """`a` if the condition holds, else `b`."""
    return Float(arith.select(condition.mlir, plain_float(a), plain_float(b)))


def minimum(a: Word | int, b: Word | int) -> Word:
    return Word(arith.minui(plain_word(a), plain_word(b)))


def maximum(a: Word | int, b: Word | int) -> Word:
    return Word(arith.maxui(plain_word(a), plain_word(b)))
