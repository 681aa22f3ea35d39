"""Instructions that compute in registers."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from support.ptx.operations import operation
from support.ptx.parsing import Program, PtxError
from support.ptx.values import UNSIGNED, source, target, width

Match = re.Match[str]
Action = Callable[..., Any]
_FLOAT = r"(f32|f64|f16x2|f16|bf16x2|bf16)"
_INT = r"([us](?:16|32|64))"


def elementwise(
    program: Program,
    operands: Sequence[str],
    compute: Callable[..., np.ndarray],
    to: str,
    *kinds: str,
    flush: bool = False,
) -> Action:
    """Writes ``compute(sources)`` of type `to`; sources have `kinds`. `flush`: subnormal float32 count as zero."""
    write = target(program, operands[0], to)
    reads = [source(program, operand, kind) for operand, kind in zip(operands[1:], kinds, strict=True)]

    def act(machine: Any, lanes: Any) -> None:
        values = [read(machine, lanes) for read in reads]
        if flush:
            values = [_flushed(value) if value.dtype == np.float32 else value for value in values]
        result = compute(*values)
        write(machine, lanes, _flushed(result) if flush else result)

    return act


def _flushed(value: np.ndarray) -> np.ndarray:
    value = np.asarray(value, np.float32)
    return np.where(np.abs(value) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), value), value)


def _ftz(match: Match, kind: str) -> bool:
    if not match["ftz"]:
        return False
    if kind != "f32":
        raise PtxError("subnormal numbers are flushed of f32 only")
    return True


_BINARY: dict[str, Callable[..., np.ndarray]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
}


@operation(rf"(add|sub)\.{_INT}", 3)
def _integers(program: Program, match: Match, operands: tuple[str, ...]) -> Action:
    kind = match[2]
    return elementwise(program, operands, _BINARY[match[1]], kind, kind, kind)


@operation(rf"(add|sub|mul)(\.rn)?(?P<ftz>\.ftz)?\.{_FLOAT}", 3)
def _floats(program: Program, match: Match, operands: tuple[str, ...]) -> Action:
    kind = match[4]
    return elementwise(program, operands, _BINARY[match[1]], kind, kind, kind, flush=_ftz(match, kind))


@operation(rf"fma\.rn(?P<ftz>\.ftz)?\.{_FLOAT}", 4)
def _fma(program: Program, match: Match, operands: tuple[str, ...]) -> Action:
    kind = match[2]

    def once_rounded(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        return a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)

    return elementwise(program, operands, once_rounded, kind, kind, kind, kind, flush=_ftz(match, kind))


def _high(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The upper half of products."""
    if a.itemsize < 8:
        wide = np.dtype(f"{a.dtype.kind}{2 * a.itemsize}")
        return (a.astype(wide) * b.astype(wide) >> wide.type(8 * a.itemsize)).astype(a.dtype)
    exact = a.astype(object) * b.astype(object)
    return ((exact >> 64) % (1 << 64)).astype(np.uint64).view(a.dtype)


@operation(rf"(mul|mad)\.(lo|hi|wide)\.{_INT}", 3, 4)
def _products(program: Program, match: Match, operands: tuple[str, ...]) -> Action:
    name, part, kind = match.groups()
    if len(operands) != {"mul": 3, "mad": 4}[name]:
        raise PtxError("number of operands")
    to = kind
    if part == "wide":
        to = f"{kind[0]}{2 * width(kind)}"
        wide = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{width(kind) // 4}")

    def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        if part == "wide":
            return a.astype(wide) * b.astype(wide)
        return a * b if part == "lo" else _high(*np.broadcast_arrays(a, b))

    if name == "mul":
        return elementwise(program, operands, product, to, kind, kind)
    return elementwise(program, operands, lambda a, b, c: product(a, b) + c, to, kind, kind, to)


@operation(rf"(div|rem)\.{_INT}", 3)
def _quotients(program: Program, match: Match, operands: tuple[str, ...]) -> Action:
    name, kind = match.groups()

    def toward_zero(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        size = np.where(b == 0, 1, np.abs(b) if kind[0] == "s" else b).astype(a.dtype)
        up = np.abs(a) if kind[0] == "s" else a
        quotient = (up // size).astype(a.dtype)
        if kind[0] == "s":
            quotient = np.where((a < 0) ^ (b < 0), -quotient, quotient)
        result = quotient if name == "div" else a - quotient * b
        return np.where(b == 0, -1 if kind[0] == "s" else np.iinfo(a.dtype).max, result).astype(a.dtype)

    return elementwise(program, operands, toward_zero, kind, kind, kind)


@operation(r"div\.(rn|full|approx)(?P<ftz>\.ftz)?\.(f32|f64)", 3)
def _division(program: Program, match: Match, operands: tuple[str, ...]) -> Action:
    kind = match[3]
    return elementwise(program, operands, lambda a, b: a / b, kind, kind, kind, flush=_ftz(match, kind))


_FUNCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": lambda v: 1 / v,
    "sqrt": np.sqrt,
    "rsqrt": lambda v: 1 / np.sqrt(v),
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


@operation(r"(ex2|lg2|rcp|sqrt|rsqrt|sin|cos|tanh)\.approx(?P<ftz>\.ftz)?\.f32", 2)
@operation(r"(rcp|sqrt)\.rn(?P<ftz>\.ftz)?\.f32", 2)
@operation(r"(ex2|tanh)\.approx(?P<ftz>)\.(?P<half>f16x2|f16)", 2)
def _function(program: Program, match: Match, operands: tuple[str, ...]) -> Action:
    """Approximate ones are exact here, but for the last rounding."""
    kind = match.groupdict().get("half") or "f32"
    function = _FUNCTIONS[match[1]]
    flush = _ftz(match, kind)
    return elementwise(program, operands, lambda v: function(v.astype(np.float64)), kind, kind, flush=flush)


@operation(rf"(min|max|abs|neg)\.{_INT}", 2, 3)
@operation(rf"(min|max|abs|neg)(?P<ftz>\.ftz)?(?P<nan>\.NaN)?\.{_FLOAT}", 2, 3)
def _extremes(program: Program, match: Match, operands: tuple[str, ...]) -> Action:
    name, kind = match[1], match[match.re.groups]
    if len(operands) != (3 if name in ("min", "max") else 2):
        raise PtxError("number of operands")
    flush = "ftz" in match.groupdict() and _ftz(match, kind)
    if name in ("abs", "neg"):
        return elementwise(program, operands, np.abs if name == "abs" else np.negative, kind, kind, flush=flush)
    plain = {"min": np.minimum, "max": np.maximum}[name]
    numbers = {"min": np.fmin, "max": np.fmax}[name]
    compute = numbers if "f" in kind and not match["nan"] else plain
    return elementwise(program, operands, compute, kind, kind, kind, flush=flush)


# ---- bits ----


@operation(r"(and|or|xor)\.(pred|b16|b32|b64)", 3)
def _logic(program: Program, match: Match, operands: tuple[str, ...]) -> Action:
    compute = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[match[1]]
    return elementwise(program, operands, compute, match[2], match[2], match[2])


@operation(r"not\.(pred|b16|b32|b64)", 2)
def _not(program: Program, match: Match, operands: tuple[str, ...]) -> Action:
    return elementwise(program, operands, np.invert, match[1], match[1])


@operation(r"(popc|clz)\.(b32|b64)", 2)
def _bit_counts(program: Program, match: Match, operands: tuple[str, ...]) -> Action:
    bits = width(match[2])

    def count(value: np.ndarray) -> np.ndarray:
        each = value[:, None] >> np.arange(bits, dtype=value.dtype) & value.dtype.type(1)
        if match[1] == "popc":
            return each.sum(axis=1).astype(np.uint32)
        return np.where(value == 0, bits, np.argmax(each[:, ::-1], axis=1)).astype(np.uint32)

    return elementwise(program, operands, count, "u32", match[2])


@operation(r"(brev)\.(b32)", 2)
def _reversed(program: Program, match: Match, operands: tuple[str, ...]) -> Action:
    def reverse(value: np.ndarray) -> np.ndarray:
        result = np.zeros_like(value)
        for bit in range(32):
            result |= (value >> np.uint32(bit) & np.uint32(1)) << np.uint32(31 - bit)
        return result

    return elementwise(program, operands, reverse, "b32", "b32")


@operation(r"lop3\.b32", 5)
def _lop3(program: Program, match: Match, operands: tuple[str, ...]) -> Action:
    table = int(operands[4], 0)

    def compute(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        result = np.zeros(1, np.uint32)
        for case in range(8):
            if table >> case & 1:
                result = result | (a if case & 4 else ~a) & (b if case & 2 else ~b) & (c if case & 1 else ~c)
        return result

    return elementwise(program, operands[:4], compute, "b32", "b32", "b32", "b32")


def shifted(value: np.ndarray, by: np.ndarray, left: bool) -> np.ndarray:
    """Shifts; amounts of the value's width or more leave zeros, or signs."""
    bits = 8 * value.itemsize
    most = np.minimum(by, bits - 1).astype(value.dtype)
    if left:
        return np.where(by < bits, value << most, value.dtype.type(0))
    return np.where(by < bits, value >> most, np.where(value < 0, -1, 0).astype(value.dtype))


@operation(r"(shl)\.(b16|b32|b64)", 3)
@operation(r"(shr)\.([bus](?:16|32|64))", 3)
def _shifts(program: Program, match: Match, operands: tuple[str, ...]) -> Action:
    kind = match[2]
    return elementwise(program, operands, lambda v, by: shifted(v, by, match[1] == "shl"), kind, kind, "u32")


@operation(r"shf\.(l|r)\.(wrap|clamp)\.b32", 4)
def _funnel(program: Program, match: Match, operands: tuple[str, ...]) -> Action:
    def compute(low: np.ndarray, high: np.ndarray, by: np.ndarray) -> np.ndarray:
        both = high.astype(np.uint64) << np.uint64(32) | low
        amount = (by & np.uint32(31) if match[2] == "wrap" else np.minimum(by, np.uint32(32))).astype(np.uint64)
        if match[1] == "r":
            return (both >> amount).astype(np.uint32)
        return (both << amount >> np.uint64(32)).astype(np.uint32)

    return elementwise(program, operands, compute, "b32", "b32", "b32", "u32")


@operation(r"prmt\.b32", 4)
def _permute(program: Program, match: Match, operands: tuple[str, ...]) -> Action:
    def compute(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
        both = b.astype(np.uint64) << np.uint64(32) | a
        result = np.zeros(1, np.uint64)
        for i in range(4):
            nibble = selector.astype(np.uint64) >> np.uint64(4 * i) & np.uint64(15)
            byte = both >> (nibble & np.uint64(7)) * np.uint64(8) & np.uint64(255)
            sign = np.where(byte >= 128, np.uint64(255), np.uint64(0))
            result = result | np.where(nibble >= 8, sign, byte) << np.uint64(8 * i)
        return result.astype(np.uint32)

    return elementwise(program, operands, compute, "b32", "b32", "b32", "b32")


@operation(r"bfe\.([us](?:32|64))", 4)
def _extract(program: Program, match: Match, operands: tuple[str, ...]) -> Action:
    kind, bits = match[1], width(match[1])

    def compute(value: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
        start, length = start & np.uint32(255), np.minimum(length & np.uint32(255), bits)
        low = shifted(value, start, False)
        rest = (bits - np.minimum(length, bits)).astype(np.uint32)
        cut = shifted(shifted(low, rest, True), rest, False)
        return np.where(length == 0, value.dtype.type(0), cut)

    return elementwise(program, operands, compute, kind, kind, "u32", "u32")


@operation(r"bfi\.(b32|b64)", 5)
def _insert(program: Program, match: Match, operands: tuple[str, ...]) -> Action:
    bits = width(match[1])

    def compute(field: np.ndarray, value: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
        start, length = start & np.uint32(255), np.minimum(length & np.uint32(255), bits)
        ones = np.full(1, np.iinfo(UNSIGNED[bits]).max, UNSIGNED[bits])
        mask = shifted(~shifted(ones, length, True), start, True)
        return value & ~mask | shifted(field, start, True) & mask

    return elementwise(program, operands, compute, match[1], match[1], match[1], "u32", "u32")
