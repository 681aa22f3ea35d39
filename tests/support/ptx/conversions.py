"""Instructions that move, convert, compare and select."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from support.ptx.arithmetic import elementwise
from support.ptx.memory import SHARED, WINDOW
from support.ptx.operations import operation
from support.ptx.parsing import Program, PtxError
from support.ptx.values import UNSIGNED, listed, source, target, width

Match = re.Match[str]
Action = Callable[..., Any]


@operation(r"mov\.(pred|[bus](?:16|32|64)|f32|f64)", 2)
def _mov(program: Program, match: Match, operands: tuple[str, ...]) -> Action:
    kind, (to, what) = match[1], operands
    if to.startswith("{"):
        return _unpack(program, kind, listed(to), what)
    if what.startswith("{"):
        return _pack(program, kind, to, listed(what))
    return elementwise(program, operands, lambda v: v, kind, kind)


def _unpack(program: Program, kind: str, names: list[str], what: str) -> Action:
    bits = width(kind) // len(names)
    writes = [target(program, name, f"b{bits}") for name in names]
    read = source(program, what, f"b{width(kind)}")

    def act(machine: Any, lanes: Any) -> None:
        parts = np.ascontiguousarray(read(machine, lanes)).view(UNSIGNED[bits]).reshape(-1, len(names))
        for i, write in enumerate(writes):
            write(machine, lanes, parts[:, i].copy())

    return act


def _pack(program: Program, kind: str, to: str, names: list[str]) -> Action:
    bits = width(kind) // len(names)
    reads = [source(program, name, f"b{bits}") for name in names]
    write = target(program, to, f"b{width(kind)}")

    def act(machine: Any, lanes: Any) -> None:
        parts = np.stack(np.broadcast_arrays(*[read(machine, lanes) for read in reads]), axis=1)
        write(machine, lanes, np.ascontiguousarray(parts).view(UNSIGNED[width(kind)])[:, 0])

    return act


@operation(r"cvta(\.to)?\.(global|shared|shared::cta|shared::cluster)\.u64", 2)
def _cvta(program: Program, match: Match, operands: tuple[str, ...]) -> Action:
    if match[2] == "global":
        return elementwise(program, operands, lambda v: v, "u64", "u64")
    base = np.uint64(SHARED)
    if match[1]:
        return elementwise(program, operands, lambda v: v - base, "u64", "u64")
    return elementwise(program, operands, lambda v: v + base, "u64", "u64")


@operation(r"mapa(?:\.shared::cluster)?\.(u32|u64)", 3)
def _mapa(program: Program, match: Match, operands: tuple[str, ...]) -> Action:
    kind = match[1]
    generic = np.uint64(0 if "shared::cluster" in match[0] else SHARED)

    def compute(address: np.ndarray, rank: np.ndarray) -> np.ndarray:
        offset = (address.astype(np.uint64) - generic) & np.uint64((1 << WINDOW) - 1)
        return offset + (rank.astype(np.uint64) + np.uint64(1) << np.uint64(WINDOW)) + generic

    return elementwise(program, operands, compute, kind, kind, "u32")


_INT = r"[us](?:8|16|32|64)"
_ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _convert(program: Program, operands: tuple[str, ...], compute: Callable[..., Any], to: str, of: str) -> Action:
    """As `elementwise`; the source may be in a wider register, and so may the result."""
    read, write = source(program, operands[1], of, narrow=True), target(program, operands[0], to, extend=True)
    return lambda machine, lanes: write(machine, lanes, compute(read(machine, lanes)))


@operation(rf"cvt(\.sat)?\.({_INT})\.({_INT})", 2)
def _between_integers(program: Program, match: Match, operands: tuple[str, ...]) -> Action:
    saturate, to, of = match.groups()
    signed = np.dtype(f"{'i' if to[0] == 's' else 'u'}{width(to) // 8}")
    limits = np.iinfo(signed)

    def compute(value: np.ndarray) -> np.ndarray:
        if saturate:
            span = np.iinfo(value.dtype)
            value = np.clip(value, max(limits.min, span.min), min(limits.max, span.max))
        return value.astype(signed)

    return _convert(program, operands, compute, to, of)


@operation(rf"cvt\.(rni|rzi|rmi|rpi)(?:\.ftz)?\.({_INT})\.(f16|f32|f64)", 2)
def _to_integer(program: Program, match: Match, operands: tuple[str, ...]) -> Action:
    rounding, to, of = match.groups()
    signed = np.dtype(f"{'i' if to[0] == 's' else 'u'}{width(to) // 8}")
    low, high = int(np.iinfo(signed).min), int(np.iinfo(signed).max)

    def compute(value: np.ndarray) -> np.ndarray:
        whole = np.nan_to_num(_ROUND[rounding](value.astype(np.float64)), nan=0.0, posinf=2.0**70, neginf=-(2.0**70))
        inside = (whole > float(low)) & (whole < float(high))
        clamped = np.where(whole >= float(high), high, low).astype(signed)
        return np.where(inside, np.where(inside, whole, 0).astype(signed), clamped)

    return _convert(program, operands, compute, to, of)


@operation(rf"cvt\.rn\.(f16|bf16|f32|f64)\.({_INT})", 2)
def _from_integer(program: Program, match: Match, operands: tuple[str, ...]) -> Action:
    kinds = {"f32": np.float32, "f16": np.float16}
    dtype = kinds.get(match[1], np.float64)
    return _convert(program, operands, lambda v: v.astype(dtype), match[1], match[2])


@operation(r"cvt\.(?P<round>rni|rzi|rmi|rpi)\.(?P<to>f16|f32|f64)\.(?P<of>f16|f32|f64)", 2)
@operation(r"cvt(?P<round>\.rn)?(?P<ftz>\.ftz)?\.(?P<to>f16|bf16|f32|f64)\.(?P<of>f16|bf16|f32|f64)", 2)
def _between_floats(program: Program, match: Match, operands: tuple[str, ...]) -> Action:
    to, of, rounding = match["to"], match["of"], match["round"]
    if rounding in _ROUND:
        if to != of:
            raise PtxError("rounding to an integer between types")
        return _convert(program, operands, _ROUND[rounding], to, of)
    if (rounding is None) == (width(to) < width(of)) or width(to) == width(of):
        raise PtxError("rounding")
    if match["ftz"] and "f32" not in (to, of):
        raise PtxError("subnormal numbers are flushed of f32 only")
    tiny = np.finfo(np.float32).tiny

    def compute(value: np.ndarray) -> np.ndarray:
        if match["ftz"] and of == "f32":
            return np.where(np.abs(value) < tiny, np.copysign(0, value), value)
        return value.astype(np.float64) if to == "f64" else value.astype(np.float32) if of != "f64" else value

    return _convert(program, operands, compute, to, of)


@operation(r"cvt\.rn\.(f16x2|bf16x2)\.f32", 3)
def _two_floats(program: Program, match: Match, operands: tuple[str, ...]) -> Action:
    def compute(high: np.ndarray, low: np.ndarray) -> np.ndarray:
        return np.stack(np.broadcast_arrays(low, high), axis=1)

    return elementwise(program, operands, compute, match[1], "f32", "f32")


# ---- predicates ----

_COMPARE = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal}
_COMPARE |= {"gt": np.greater, "ge": np.greater_equal}
_UNSIGNED = {"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}
_COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _comparison(name: str, kind: str) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """A comparison by its PTX name; those of floats that end in u are true of NaN, others (but num, nan) false."""
    if kind[0] == "b" and kind != "bf16" and name not in ("eq", "ne"):
        raise PtxError(f"{name} of bits")
    if kind[0] == "u" and name in _UNSIGNED:
        return _UNSIGNED[name]
    if "f" not in kind:
        if name not in _COMPARE:
            raise PtxError(f"{name} of {kind}")
        return _COMPARE[name]
    if name in ("num", "nan"):
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == (name == "nan")
    if name in ("equ", "neu", "ltu", "leu", "gtu", "geu"):
        return lambda a, b: _COMPARE[name[:2]](a, b) | np.isnan(a) | np.isnan(b)
    if name not in _COMPARE:
        raise PtxError(f"{name} of {kind}")
    return lambda a, b: _COMPARE[name](a, b) & ~(np.isnan(a) | np.isnan(b))


@operation(
    r"setp\.(?P<compare>[a-z]+)(?:\.(?P<combine>and|or|xor))?(?P<ftz>\.ftz)?"
    r"\.(?P<kind>[bus](?:16|32|64)|f16|bf16|f32|f64)",
    *(3, 4),
)
def _setp(program: Program, match: Match, operands: tuple[str, ...]) -> Action:
    """``p|q, a, b, c``: p takes the comparison (combined with c), q the opposite comparison (combined with c)."""
    kind, combine = match["kind"], match["combine"]
    if (len(operands) == 4) != (combine is not None) or match["ftz"]:
        raise PtxError("form")
    compare = _comparison(match["compare"], kind)
    writes = [target(program, name.strip(), "pred") for name in operands[0].split("|")]
    if len(writes) > 2:
        raise PtxError("form")
    a, b = (source(program, operand, kind) for operand in operands[1:3])
    other = source(program, operands[3], "pred") if combine else None

    def act(machine: Any, lanes: Any) -> None:
        holds = compare(a(machine, lanes), b(machine, lanes))
        results = [holds, ~holds][: len(writes)]
        if other is not None and combine is not None:
            c = other(machine, lanes)
            results = [_COMBINE[combine](result, c) for result in results]
        for write, result in zip(writes, results, strict=True):
            write(machine, lanes, result)

    return act


@operation(r"selp\.([bus](?:16|32|64)|f32|f64)", 4)
def _selp(program: Program, match: Match, operands: tuple[str, ...]) -> Action:
    kind = match[1]
    return elementwise(program, operands, lambda a, b, p: np.where(p, a, b), kind, kind, kind, "pred")
