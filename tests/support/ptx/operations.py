"""The register of operations: an instruction's opcode must match a pattern as a whole, or it is refused."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

from support.ptx.parsing import Instruction, Program, PtxError

Builder = Callable[[Program, "re.Match[str]", tuple[str, ...]], Callable[..., Any]]


@dataclasses.dataclass(frozen=True)
class Operation:
    """What an instruction does.

    Attributes:
      action: takes the machine and the threads that do it; of control, also the instruction's index.
      control: it says where threads go on.
      together: all threads of a warp must reach it.
      members: where that is true of some threads only: the operand that names them.
    """

    action: Callable[..., Any]
    control: bool = False
    together: bool = False
    members: str | None = None


@dataclasses.dataclass(frozen=True)
class _Known:
    pattern: re.Pattern[str]
    counts: tuple[int, ...]
    build: Builder
    control: bool
    together: bool
    members: int | None


_KNOWN: dict[str, list[_Known]] = {}


def operation(
    pattern: str,
    *counts: int,
    control: bool = False,
    together: bool = False,
    members: int | None = None,
) -> Callable[[Builder], Builder]:
    """Registers what builds an operation for opcodes that match `pattern` and have one of `counts` operands.

    `members` is the place of the operand that names the threads that take part (a mask over the warp).
    """

    def register(build: Builder) -> Builder:
        alternatives = re.match(r"\(?([\w|]+)", pattern)
        assert alternatives is not None
        for name in alternatives[1].split("|"):
            known = _Known(re.compile(pattern), counts, build, control, together or members is not None, members)
            _KNOWN.setdefault(name, []).append(known)
        return build

    return register


def decode(program: Program, instruction: Instruction) -> Operation:
    """The operation of an instruction.

    Raises:
      PtxError: the opcode, a modifier or an operand is not known; with the line.
    """
    for known in _KNOWN.get(instruction.opcode.split(".")[0], ()):
        match = known.pattern.fullmatch(instruction.opcode)
        if match and len(instruction.operands) in known.counts:
            try:
                action = known.build(program, match, instruction.operands)
            except PtxError as error:
                raise PtxError(f"unknown: {instruction.text} ({error})") from None
            members = None if known.members is None else instruction.operands[known.members]
            whole = members in ("-1", "0xffffffff", "0xFFFFFFFF", "4294967295")
            return Operation(action, known.control, known.together, None if whole else members)
    raise PtxError(f"unknown: {instruction.text}")
