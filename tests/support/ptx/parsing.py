"""PTX text to instructions: one kernel, its parameters, registers, shared memory and labels."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping


class PtxError(Exception):
    """The program does what it must not, or what the emulator does not know."""


@dataclasses.dataclass(frozen=True)
class Instruction:
    """``@predicate opcode operands``."""

    text: str
    opcode: str
    operands: tuple[str, ...]
    predicate: str | None
    negated: bool


@dataclasses.dataclass(frozen=True)
class Program:
    """One kernel.

    Attributes:
      parameters: names, in order.
      code: instructions.
      labels: name of a label -> index of the instruction that follows it.
      widths: bits of the declared registers (1: predicates), by name or, for ``%r<9>``, by prefix.
      shared: bytes from the start of a block's shared memory, for each of its variables.
      threads: of a block, where the kernel requires a number.
      most_threads: of a block, where the kernel bounds them.
      cluster: thread blocks of a cluster, where the kernel requires a number.
    """

    parameters: tuple[str, ...]
    code: tuple[Instruction, ...]
    labels: Mapping[str, int]
    widths: Mapping[str, int]
    shared: Mapping[str, int]
    threads: int | None
    most_threads: int | None
    cluster: int | None

    def width(self, register: str) -> int | None:
        """Bits of a register as declared; None where it is not."""
        return self.widths.get(register, self.widths.get(register.rstrip("0123456789") + "<>"))


_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)(.*?)\{", re.S)
_SILENT = re.compile(r'\.((loc|file)\b|pragma\s+"nounroll")[^;\n]*')
_VARIABLE = re.compile(r"\.shared\s+(?:\.align\s+(\d+)\s+)?\.[bsuf](\d+)\s+([\w$]+)\s*(\[\s*(\d*)\s*\])?")


def parse(ptx: str) -> Program:
    """The only kernel of a PTX file.

    Raises:
      PtxError: another number of kernels, a directive or a line that is not known.
    """
    text = re.sub(r"/\*.*?\*/|//[^\n]*", "", ptx, flags=re.S)
    entries = list(_ENTRY.finditer(text))
    if len(entries) != 1:
        raise PtxError(f"one kernel expected, found {[match[1] for match in entries]}")
    entry = entries[0]
    parameters = tuple(re.findall(r"([\w$]+)(?:\s*,|\s*$)", entry[2].strip(), re.M))
    builder = _Builder()
    for match in re.finditer(r"\.extern\s+" + _VARIABLE.pattern, text[: entry.start()]):
        builder.variable(match[0].removeprefix(".extern").strip())
    for line in _lines(_body(text, entry.end())):
        builder.line(line)
    directives = entry[3]
    return Program(
        parameters,
        tuple(builder.code),
        builder.labels,
        builder.widths,
        builder.shared,
        _required(directives, "reqntid"),
        _required(directives, "maxntid"),
        _required(directives, "reqnctapercluster"),
    )


def _required(directives: str, name: str) -> int | None:
    if (match := re.search(rf"\.{name}\s+([\d,\s]+)", directives)) is None:
        return None
    total = 1
    for count in match[1].split(","):
        total *= int(count)
    return total


def _body(text: str, start: int) -> str:
    depth = 1
    for match in re.finditer(r"[{}]", text[start:]):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return text[start : start + match.start()]
    raise PtxError("the kernel's body does not end")


def _lines(body: str) -> list[str]:
    """Statements, labels with their colon, in order; braces of scopes left out."""
    lines = []
    body = re.sub(r"^\s*\.(loc|file)\b[^\n]*$", "", body, flags=re.M)
    for statement in body.split(";"):
        line = " ".join(statement.split())
        while line := line.lstrip("{} "):
            if label := re.match(r"([\w$]+:)(?!:)\s*", line):
                lines.append(label[1])
                line = line[label.end() :]
            else:
                lines.append(line)
                break
    return lines


class _Builder:
    def __init__(self) -> None:
        self.code: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self.widths: dict[str, int] = {}
        self.shared: dict[str, int] = {}
        self._shared_end: int | None = 0  # None: the last variable has no size

    def line(self, line: str) -> None:
        if line.endswith(":"):
            if line[:-1] in self.labels:
                raise PtxError(f"a label twice: {line}")
            self.labels[line[:-1]] = len(self.code)
        elif match := re.fullmatch(r"\.reg\s+\.(pred|[bsuf]\d+|f16x2)\s+(.*)", line):
            width = {"pred": 1, "f16x2": 32}.get(match[1]) or int(match[1][1:])
            for name in match[2].split(","):
                self.widths[re.sub(r"<\d+>$", "<>", name.strip())] = width
        elif line.startswith(".shared"):
            self.variable(line)
        elif line.startswith("."):
            if not _SILENT.fullmatch(line):
                raise PtxError(f"unknown: {line}")
        else:
            self.code.append(_instruction(line))

    def variable(self, line: str) -> None:
        """A variable in shared memory; one of at most one byte stands for what is asked for at the launch."""
        match = _VARIABLE.fullmatch(line)
        if match is None or self._shared_end is None:
            raise PtxError(f"unknown: {line}")
        align = int(match[1] or int(match[2]) // 8)
        size = int(match[2]) // 8 * int(match[5] or 1)
        self.shared[match[3]] = start = -(-self._shared_end // align) * align
        self._shared_end = None if size == 1 else start + size


def _instruction(line: str) -> Instruction:
    match = re.fullmatch(r"(?:@(!?)([%\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)", line)
    if match is None:
        raise PtxError(f"not an instruction: {line!r}")
    parts = re.split(r",(?![^{]*\})(?![^\[]*\])", match[4])
    operands = tuple(part.strip() for part in parts if part.strip())
    return Instruction(line, match[3], operands, match[2], match[1] == "!")
