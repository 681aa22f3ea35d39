"""Registers and operands: arrays over threads, kept as unsigned integers and looked at as PTX's types."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from support.ptx.memory import RESERVED
from support.ptx.parsing import Program, PtxError

if TYPE_CHECKING:
    from support.ptx.machine import Machine

Lanes = Any  # slice(None) for all threads, or their numbers, ascending
Getter = Callable[["Machine", Lanes], np.ndarray]
Setter = Callable[["Machine", Lanes, np.ndarray], None]

UNSIGNED = {1: np.dtype(bool)} | {bits: np.dtype(f"u{bits // 8}") for bits in (8, 16, 32, 64)}
_FLOATS = {"f16": np.float16, "f32": np.float32, "f64": np.float64}
_PACKED = {"f16x2": "f16", "bf16x2": "bf16"}
_SPECIAL = re.compile(r"%(n?tid|n?ctaid|cluster_n?ctaid|n?clusterid)\.[xyz]|%(laneid|warpid|cluster_n?ctarank)")
_INTEGER = re.compile(r"-?(0[xX][0-9A-Fa-f]+|\d+)U?")


def width(kind: str) -> int:
    """Bits of a PTX type ("u32", "f16x2", "pred")."""
    if kind == "pred":
        return 1
    return 32 if kind in _PACKED else int(re.sub(r"\D", "", kind))


def from_bits(raw: np.ndarray, kind: str) -> np.ndarray:
    """Unsigned integers as a type; packed types become [threads, 2], bfloat16 float32."""
    if kind in _FLOATS:
        return raw.view(_FLOATS[kind])
    if kind in _PACKED:
        return from_bits(np.ascontiguousarray(raw).view(np.uint16).reshape(-1, 2), _PACKED[kind])
    if kind == "bf16":
        return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return raw.view(f"i{raw.itemsize}") if kind[0] == "s" else raw


def to_bits(value: np.ndarray, kind: str) -> np.ndarray:
    """The reverse of :func:`from_bits`; floats are rounded to nearest even."""
    if kind in _PACKED:
        halves = np.ascontiguousarray(to_bits(value, _PACKED[kind]))
        return halves.view(np.uint32).reshape(-1)
    if kind == "bf16":
        bits = np.ascontiguousarray(value, np.float32).view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        return np.where(np.isnan(value), 0x7FFF, rounded).astype(np.uint16)
    if kind in _FLOATS:
        return np.ascontiguousarray(value, _FLOATS[kind]).view(UNSIGNED[width(kind)])
    wanted = UNSIGNED[width(kind)]
    return value if value.dtype == wanted else value.astype(wanted)


def listed(operand: str) -> list[str]:
    """The parts of ``{a, b}``, or the operand alone."""
    return [part.strip() for part in operand.strip("{} ").split(",")]


def is_register(program: Program, name: str) -> bool:
    """Whether a name is declared as a register, or looks like nothing but one."""
    return program.width(name) is not None or bool(re.fullmatch(r"%(r|rd|rs|f|fd|p|h|hh)\d+|%z", name))


def constant(operand: str, kind: str) -> np.ndarray | None:
    """A literal, as [1]; None where it is none."""
    bits = width(kind)
    if match := re.fullmatch(r"0[fF]([0-9A-Fa-f]{8})|0[dD]([0-9A-Fa-f]{16})", operand):
        digits = match[1] or match[2]
        if 4 * len(digits) != bits:
            raise PtxError(f"the literal {operand} has not {bits} bits")
        return from_bits(np.array([int(digits, 16)], UNSIGNED[bits]), kind)
    if _INTEGER.fullmatch(operand):
        value = int(operand.rstrip("U"), 0)
        if kind == "pred":
            return np.array([value != 0])
        if "f" in kind and value:
            raise PtxError(f"an integer where a float is needed: {operand}")
        return from_bits(np.array([value % (1 << bits)], UNSIGNED[bits]), kind)
    return None


def source(program: Program, operand: str, kind: str, narrow: bool = False) -> Getter:
    """What reads an operand as a type; `narrow` allows a wider register, whose low bits count.

    Raises:
      PtxError: the operand is not known, or (when read) its register has another width or no value.
    """
    if operand.startswith("!") and kind == "pred":
        plain = source(program, operand[1:], kind)
        return lambda machine, lanes: ~plain(machine, lanes)
    if is_register(program, operand):
        bits = program.width(operand) or width(kind)
        if bits != width(kind) and (not narrow or bits < width(kind)):
            raise PtxError(f"{operand} has {bits} bits, not those of {kind}")
        return _register(operand, kind, narrow)
    if (value := constant(operand, kind)) is not None:
        return lambda machine, lanes: value
    if _SPECIAL.fullmatch(operand):
        dtype = UNSIGNED[width(kind)]
        return lambda machine, lanes: from_bits(machine.special(operand)[lanes].astype(dtype), kind)
    if (match := re.fullmatch(r"([\w$]+)(?:\s*\+\s*(\d+))?", operand)) and match[1] in program.shared:
        start = RESERVED + program.shared[match[1]] + int(match[2] or 0)
        known = from_bits(np.array([start], UNSIGNED[width(kind)]), kind)
        return lambda machine, lanes: known
    raise PtxError(f"unknown operand {operand}")


def _register(name: str, kind: str, narrow: bool) -> Getter:
    wanted = UNSIGNED[width(kind)]

    def read(machine: Machine, lanes: Lanes) -> np.ndarray:
        raw = machine.registers.get(name)
        if raw is None:
            raise PtxError(f"{name} is read before it is written")
        if raw.dtype != wanted:
            if not narrow or raw.itemsize < wanted.itemsize or raw.dtype == bool:
                raise PtxError(f"{name} has {8 * raw.itemsize} bits, not those of {kind}")
            raw = raw.astype(wanted)
        return from_bits(raw[lanes], kind)

    return read


def target(program: Program, name: str, kind: str, extend: bool = False) -> Setter:
    """What writes a register (``_`` takes nothing); `extend` fills a wider one."""
    if name == "_":
        return lambda machine, lanes, value: None
    if not is_register(program, name):
        raise PtxError(f"not a register: {name}")
    bits = program.width(name) or max(width(kind), 16 if kind != "pred" else 1)
    if bits != width(kind) and (not extend or bits < width(kind)):
        raise PtxError(f"{name} has {bits} bits, not those of {kind}")
    wanted = UNSIGNED[bits]

    def write(machine: Machine, lanes: Lanes, value: np.ndarray) -> None:
        raw = to_bits(value, kind)
        if raw.dtype != wanted:
            raw = from_bits(raw, kind).astype(f"i{wanted.itemsize}").view(wanted) if kind[0] == "s" else raw
        store = machine.registers.get(name)
        if store is None or store.dtype != wanted:
            store = machine.registers[name] = np.empty(machine.threads, wanted)
            store.view(np.uint8)[:] = 1 if wanted.kind == "b" else 0xFF  # threads that do not write
        store[lanes] = raw

    return write


def address(program: Program, operand: str) -> Getter:
    """Addresses of an operand ``[register+offset]``, as int64."""
    match = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand)
    if match is None:
        raise PtxError(f"not an address: {operand}")
    offset, name = int(match[2] or 0), match[1]
    if is_register(program, name):

        def read(machine: Machine, lanes: Lanes) -> np.ndarray:
            raw = machine.registers.get(name)
            if raw is None:
                raise PtxError(f"{name} is read before it is written")
            return raw[lanes].astype(np.int64) + offset

        return read
    base = source(program, name, "u64")
    return lambda machine, lanes: np.full(machine.count(lanes), base(machine, lanes).astype(np.int64) + offset)
