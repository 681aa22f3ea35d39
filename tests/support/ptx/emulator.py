"""Runs compiled PTX in NumPy, so that a kernel's numbers can be checked where there is no GPU.

All threads of a thread block advance in lockstep, an instruction at a time, apart from those
that a branch sets apart until they meet again; registers are arrays over the threads. Memory
is one flat space in which every buffer has its own bounds: a read or write outside of them
is an error. What ``cp.async`` copies arrives when it is waited for, not before, so a missing
wait is seen.

Not seen: a missing barrier between warps (they never run apart), and anything about speed.
Not there: TMA, mbarriers, wgmma; whatever is met and not known raises.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

SHARED = 1 << 40  # where shared memory begins
_TOGETHER = ("bar", "shfl", "mma")  # what all threads must reach together
_WIDTH = {"8": np.uint8, "16": np.uint16, "32": np.uint32, "64": np.uint64}
_FLOATS = {"f16": np.float16, "f32": np.float32, "f64": np.float64}


class PtxError(Exception):
    """The program does what it must not, or what the emulator does not know."""


@dataclasses.dataclass(frozen=True)
class Instruction:
    """``@predicate opcode operands``; `opcode` split at its dots."""

    text: str
    opcode: tuple[str, ...]
    operands: tuple[str, ...]
    predicate: str | None
    negated: bool


@dataclasses.dataclass(frozen=True)
class Program:
    """One kernel: its parameters' names, its instructions, and where its labels point."""

    parameters: tuple[str, ...]
    code: tuple[Instruction, ...]
    labels: Mapping[str, int]


def parse(ptx: str) -> Program:
    """The only kernel of a PTX file."""
    entries = re.findall(r"\.entry\s+([\w$]+)\s*\((.*?)\)", ptx, re.S)
    if len(entries) != 1:
        raise PtxError(f"one kernel expected, found {[name for name, _ in entries]}")
    parameters = tuple(re.findall(r"([\w$]+)(?:\s*,|\s*$)", entries[0][1].strip(), re.M))
    body = ptx[ptx.index("{", ptx.index(".entry")) + 1 :]
    body = re.sub(r"//[^\n]*", "", body)
    body = re.sub(r"^\s*\.(loc|file|section)\b[^\n]*$", "", body, flags=re.M)
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for statement in re.split(r";|(?<=:)\s*\n", body):
        for line in _statements(statement):
            if line.endswith(":"):
                labels[line[:-1]] = len(code)
            elif not line.startswith("."):
                code.append(_instruction(line))
    return Program(parameters, tuple(code), labels)


def _statements(text: str) -> list[str]:
    line = " ".join(text.split())
    if re.fullmatch(r"[{}\s]*", line):
        return []
    line = re.sub(r"^(\{ )+(?=[@.\w])", "", line)  # a scope of inline assembly
    if match := re.match(r"^(\$[\w$]+:)\s*(.+)$", line):
        return [match[1], *_statements(match[2])]
    return [line]


def _instruction(line: str) -> Instruction:
    match = re.match(r"^(?:@(!?)(%\w+)\s+)?([\w.:]+)\s*(.*)$", line)
    if match is None:
        raise PtxError(f"not an instruction: {line!r}")
    operands = tuple(part.strip() for part in re.split(r",(?![^{]*\})(?![^\[]*\])", match[4]) if part.strip())
    opcode = tuple(part for part in match[3].replace("::", ".").split("."))
    return Instruction(line, opcode, operands, match[2], match[1] == "!")


class Memory:
    """Buffers at addresses of their own, and the shared memory of the block that runs."""

    def __init__(self, buffers: Sequence[np.ndarray], shared_bytes: int):
        self._regions: list[tuple[int, np.ndarray]] = []
        self.addresses = []
        at = 1 << 20
        for buffer in [*buffers, np.zeros(shared_bytes, np.uint8)]:
            start = SHARED if len(self._regions) == len(buffers) else at
            raw = np.ascontiguousarray(buffer).view(np.uint8).reshape(-1).copy()
            self._regions.append((start, raw))
            self.addresses.append(start)
            at += (len(raw) + 0xFFFFF) & ~0xFFFF

    def buffer(self, index: int) -> np.ndarray:
        """The bytes of a buffer."""
        return self._regions[index][1]

    def forget_shared(self) -> None:
        """Fills shared memory with a pattern that no sound kernel's result survives."""
        self._regions[-1][1][:] = 0xFF

    def at(self, address: np.ndarray, size: int, what: str) -> tuple[np.ndarray, np.ndarray]:
        """The bytes of a region, and the offsets in it of `size` bytes from each address on."""
        for start, raw in self._regions:
            if np.all((address >= start) & (address + size <= start + len(raw))):
                if np.any(address % size):
                    raise PtxError(f"{what}: an address is not a multiple of {size}")
                return raw, (address - start)[:, None] + np.arange(size)
        raise PtxError(f"{what}: an access is outside every buffer")


class _Block:
    """One thread block as it runs."""

    def __init__(self, program: Program, memory: Memory, parameters: Sequence[int], block: Sequence[int], threads: int):
        self.program, self.memory, self.threads = program, memory, threads
        self.parameters = dict(zip(program.parameters, parameters, strict=True))
        self.special = {f"%ctaid.{axis}": value for axis, value in zip("xyz", block, strict=True)}
        self.registers: dict[str, np.ndarray] = {}
        self.open_copies: list[Callable[[], None]] = []
        self.groups: list[list[Callable[[], None]]] = []
        self.executed = 0

    # ---- operands ----

    def read(self, operand: str, kind: str) -> np.ndarray:
        """An operand over the threads, as the type `kind` of PTX ("u32", "f16x2", "pred")."""
        dtype = _dtype(kind)
        if operand in self.special:
            return np.full(self.threads, self.special[operand], dtype)
        if operand.startswith("%tid"):
            return np.arange(self.threads).astype(dtype) if operand == "%tid.x" else np.zeros(self.threads, dtype)
        if operand.startswith("%"):
            if operand not in self.registers:
                raise PtxError(f"{operand} is read before it is written")
            value = self.registers[operand]
            if value.dtype == dtype:
                return value
            return value.view(dtype) if value.dtype.itemsize == dtype.itemsize else value.astype(dtype)
        if operand.startswith("0f"):
            return np.full(self.threads, np.uint32(int(operand[2:], 16)).view(np.float32)).astype(dtype)
        if re.fullmatch(r"-?(0x)?[0-9A-Fa-f]+", operand):
            bits = 8 * dtype.itemsize
            unsigned = _WIDTH[str(bits)](int(operand, 0) % (1 << bits))
            return np.full(self.threads, unsigned).view(dtype)
        return np.full(self.threads, SHARED, dtype)  # the name of the block's shared memory

    def write(self, operand: str, value: np.ndarray, active: np.ndarray) -> None:
        """Puts a value into a register of the active threads."""
        if not active.all() and operand not in self.registers:
            value = np.where(active, value, np.zeros(1, value.dtype))
        elif not active.all():
            old = self.registers[operand]
            value = np.where(active, value, old.view(value.dtype) if old.itemsize == value.itemsize else 0)
        self.registers[operand] = np.ascontiguousarray(value)

    def address(self, operand: str) -> np.ndarray:
        match = re.fullmatch(r"\[\s*(%?[\w$]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand)
        if match is None:
            raise PtxError(f"not an address: {operand}")
        return self.read(match[1], "u64").astype(np.int64) + int(match[2] or 0)

    # ---- the run ----

    def run(self) -> None:
        """Runs to the end. Of threads that stand apart after a branch, those furthest behind go on first."""
        end = len(self.program.code)
        positions = np.zeros(self.threads, np.int64)
        while True:
            position = int(positions.min())
            if position == end:
                return
            here = positions == position
            instruction = self.program.code[position]
            self.executed += 1
            active = here
            if instruction.predicate is not None:
                active = here & (self.read(instruction.predicate, "pred") ^ instruction.negated)
            positions[here] += 1
            name = instruction.opcode[0]
            if name in ("ret", "exit"):
                positions[active] = end
            elif name == "bra":
                positions[active] = self.program.labels[instruction.operands[0]]
            elif name in _TOGETHER and not active.all():
                raise PtxError(f"not all threads reach it: {instruction.text}")
            elif (handler := getattr(self, f"_do_{name}", None)) is not None:
                handler(instruction, active)
            else:
                raise PtxError(f"unknown: {instruction.text}")
            if position + 1 == end and name not in ("ret", "exit", "bra"):
                raise PtxError("ran past the end")

    # ---- memory ----

    def _do_ld(self, instruction: Instruction, active: np.ndarray) -> None:
        kind = instruction.opcode[-1]
        if "param" in instruction.opcode:
            name = re.fullmatch(r"\[(.*)\]", instruction.operands[1])
            self.write(instruction.operands[0], np.full(self.threads, self.parameters[name[1]], np.uint64), active)
            return
        registers = _listed(instruction.operands[0])
        size = _dtype(kind).itemsize
        addresses = self.address(instruction.operands[1])[active]
        raw, at = self.memory.at(addresses, size * len(registers), instruction.text)
        values = np.zeros((self.threads, size * len(registers)), np.uint8)
        values[active] = raw[at]
        for i, register in enumerate(registers):
            part = np.ascontiguousarray(values[:, i * size : (i + 1) * size])
            self.write(register, part.view(_dtype(kind))[:, 0], active)

    def _do_st(self, instruction: Instruction, active: np.ndarray) -> None:
        kind = instruction.opcode[-1]
        parts = [self.read(register, kind) for register in _listed(instruction.operands[1])]
        values = np.concatenate(
            [np.ascontiguousarray(p).view(np.uint8).reshape(self.threads, -1) for p in parts], axis=1
        )
        addresses = self.address(instruction.operands[0])[active]
        raw, at = self.memory.at(addresses, values.shape[1], instruction.text)
        raw[at] = values[active]

    def _do_cp(self, instruction: Instruction, active: np.ndarray) -> None:
        if instruction.opcode[:3] == ("cp", "async", "commit_group"):
            self.groups.append(self.open_copies)
            self.open_copies = []
        elif instruction.opcode[:3] == ("cp", "async", "wait_group"):
            keep = int(instruction.operands[0])
            while len(self.groups) > keep:
                for copy in self.groups.pop(0):
                    copy()
        elif instruction.opcode[:2] == ("cp", "async") and "bulk" not in instruction.opcode:
            size = int(instruction.operands[2])
            to, at = self.memory.at(self.address(instruction.operands[0])[active], size, instruction.text)
            source, source_at = self.memory.at(self.address(instruction.operands[1])[active], size, instruction.text)
            values = source[source_at]
            self.open_copies.append(lambda: to.__setitem__(at, values))
        else:
            raise PtxError(f"unknown: {instruction.text}")

    def _do_bar(self, instruction: Instruction, active: np.ndarray) -> None:
        """Threads that stand apart cannot be here, and others are never apart."""

    # ---- between threads ----

    def _do_shfl(self, instruction: Instruction, active: np.ndarray) -> None:
        to, source, lane, clamp, *_ = instruction.operands
        mode = instruction.opcode[2]
        lanes = np.arange(self.threads)
        control = self.read(clamp, "u32").astype(np.int64)
        segment = control >> 8 & 31  # bits of a lane that stay its own
        own = lanes % 32
        wanted = self.read(lane, "u32").astype(np.int64)
        target = {"idx": wanted & ~segment & 31, "bfly": own ^ wanted}.get(mode)
        if target is None:
            raise PtxError(f"unknown: {instruction.text}")
        if mode == "idx":
            target = (own & segment) | target
        self.write(to.split("|")[0], self.read(source, "b32")[lanes // 32 * 32 + target], active)

    def _do_mma(self, instruction: Instruction, active: np.ndarray) -> None:
        if instruction.opcode[2:] != ("aligned", "m16n8k16", "row", "col", "f32", "f16", "f16", "f32"):
            raise PtxError(f"unknown: {instruction.text}")
        d, a, b, c = (_listed(operand) for operand in instruction.operands)
        warps = self.threads // 32
        lane = np.arange(32)
        row, column = lane // 4, lane % 4

        def halves(register: str) -> np.ndarray:
            return self.read(register, "b32").view(np.float16).reshape(warps, 32, 2).astype(np.float64)

        left, right = np.zeros((warps, 16, 16)), np.zeros((warps, 16, 8))
        total = np.zeros((warps, 16, 8))
        for i, register in enumerate(a):
            for e in (0, 1):
                left[:, row + 8 * (i & 1), 2 * column + e + 8 * (i >> 1)] = halves(register)[..., e]
        for i, register in enumerate(b):
            for e in (0, 1):
                right[:, 2 * column + e + 8 * i, row] = halves(register)[..., e]
        for i, register in enumerate(c):
            total[:, row + 8 * (i >> 1), 2 * column + (i & 1)] = self.read(register, "f32").reshape(warps, 32)
        total = (total + left @ right).astype(np.float32)
        for i, register in enumerate(d):
            self.write(register, total[:, row + 8 * (i >> 1), 2 * column + (i & 1)].reshape(-1), active)

    # ---- arithmetic ----

    def _do_mov(self, instruction: Instruction, active: np.ndarray) -> None:
        kind = instruction.opcode[-1]
        to, source = instruction.operands
        if to.startswith("{"):
            registers = _listed(to)
            parts = self.read(source, kind).view(_WIDTH[str(8 * _dtype(kind).itemsize // len(registers))])
            for i, register in enumerate(registers):
                if register != "_":
                    self.write(register, parts.reshape(self.threads, -1)[:, i], active)
        elif source.startswith("{"):
            registers = _listed(source)
            width = f"b{8 * _dtype(kind).itemsize // len(registers)}"
            parts = np.stack([self.read(register, width) for register in registers], axis=1)
            self.write(to, np.ascontiguousarray(parts).view(_dtype(kind))[:, 0], active)
        else:
            self.write(to, self.read(source, kind), active)

    def _do_cvta(self, instruction: Instruction, active: np.ndarray) -> None:
        self._do_mov(instruction, active)

    def _do_cvt(self, instruction: Instruction, active: np.ndarray) -> None:
        to, source = (part for part in instruction.opcode[1:] if re.fullmatch(r"[busf]\d+", part))
        if to == source or (to[0] != "f" and source[0] == "f"):
            raise PtxError(f"unknown: {instruction.text}")  # rounds in a way that is not modelled
        self.write(instruction.operands[0], self.read(instruction.operands[1], source).astype(_dtype(to)), active)

    def _do_setp(self, instruction: Instruction, active: np.ndarray) -> None:
        compare = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal}
        compare |= {"gt": np.greater, "ge": np.greater_equal}
        kind = instruction.opcode[-1]
        a, b = (self.read(operand, kind) for operand in instruction.operands[1:])
        self.write(instruction.operands[0], compare[instruction.opcode[1]](a, b), active)

    def _do_selp(self, instruction: Instruction, active: np.ndarray) -> None:
        kind = instruction.opcode[-1]
        to, a, b, predicate = instruction.operands
        self.write(to, np.where(self.read(predicate, "pred"), self.read(a, kind), self.read(b, kind)), active)

    def _do_lop3(self, instruction: Instruction, active: np.ndarray) -> None:
        to, *sources, table = instruction.operands
        a, b, c = (self.read(source, "b32") for source in sources)
        result = np.zeros(self.threads, np.uint32)
        for case in range(8):
            if int(table, 0) >> case & 1:
                result |= (a if case & 4 else ~a) & (b if case & 2 else ~b) & (c if case & 1 else ~c)
        self.write(to, result, active)

    def _binary(self, instruction: Instruction, active: np.ndarray) -> None:
        name, kind = instruction.opcode[0], instruction.opcode[-1]
        to, *sources = instruction.operands
        if name in ("mul", "mad") and "wide" in instruction.opcode:
            wide = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{2 * _dtype(kind).itemsize}")
            a, b = (self.read(source, kind).astype(wide) for source in sources[:2])
            result = a * b if name == "mul" else a * b + self.read(sources[2], f"{kind[0]}{8 * wide.itemsize}")
            self.write(to, result, active)
            return
        values = [self.read(source, kind) for source in sources]
        if kind == "f16x2":
            values = [value.view(np.float16) for value in values]
        if name in ("fma", "mad") and values[0].dtype.kind == "f":  # rounded once
            values = [value.astype(np.float64) for value in values]
        with np.errstate(over="ignore", invalid="ignore"):
            result = _OPERATIONS[name](*values)
        if kind == "f16x2":
            result = np.ascontiguousarray(result.astype(np.float16)).view(np.uint32)
        self.write(to, result.astype(_dtype(kind), copy=False), active)

    _do_add = _do_sub = _do_mul = _do_fma = _do_mad = _do_and = _do_or = _do_xor = _binary
    _do_min = _do_max = _do_neg = _do_not = _binary

    def _do_shl(self, instruction: Instruction, active: np.ndarray) -> None:
        kind = instruction.opcode[-1]
        to, source, amount = instruction.operands
        value, by = self.read(source, kind), self.read(amount, "u32").astype(np.int64)
        bits = 8 * value.itemsize
        shifted = value << by.astype(value.dtype) if instruction.opcode[0] == "shl" else value >> by.astype(value.dtype)
        past = np.where(value < 0, -1, 0) if instruction.opcode[0] == "shr" and kind[0] == "s" else 0
        self.write(to, np.where(by < bits, shifted, past).astype(value.dtype), active)

    _do_shr = _do_shl


_OPERATIONS: dict[str, Callable[..., np.ndarray]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "fma": lambda a, b, c: a * b + c,
    "mad": lambda a, b, c: a * b + c,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "min": np.minimum,
    "max": np.maximum,
    "neg": lambda a: -a,
    "not": lambda a: ~a,
}


def _dtype(kind: str) -> np.dtype:
    if kind == "pred":
        return np.dtype(bool)
    if kind in ("f16x2", "b32"):
        return np.dtype(np.uint32)
    if kind in _FLOATS:
        return np.dtype(_FLOATS[kind])
    if match := re.fullmatch(r"([bus])(\d+)", kind):
        dtype = np.dtype(_WIDTH[match[2]])
        return np.dtype(f"i{dtype.itemsize}") if match[1] == "s" else dtype
    raise PtxError(f"unknown type {kind}")


def _listed(operand: str) -> list[str]:
    return [part.strip() for part in operand.strip("{} ").split(",")]


def launch(
    program: Program,
    parameters: Sequence[np.ndarray],
    *,
    grid: Sequence[int],
    threads: int,
    shared_bytes: int = 1 << 18,
) -> tuple[list[np.ndarray], int]:
    """Runs a kernel over a grid.

    Args:
      program: from :func:`parse`.
      parameters: one array each, in the order of the program's parameters.
      grid: thread blocks along x, y, z.
      threads: of a block.
      shared_bytes: shared memory of a block.

    Returns:
      The arrays as they are afterwards, and the number of instructions that blocks ran.

    Raises:
      PtxError: an access out of bounds, an unwritten register, an unknown instruction.
    """
    memory = Memory(parameters, shared_bytes)
    executed = 0
    for z in range(grid[2]):
        for y in range(grid[1]):
            for x in range(grid[0]):
                memory.forget_shared()
                block = _Block(program, memory, memory.addresses[:-1], (x, y, z), threads)
                block.run()
                executed += block.executed
    results = [memory.buffer(i).view(p.dtype).reshape(p.shape) for i, p in enumerate(parameters)]
    return results, executed
