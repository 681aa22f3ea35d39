"""Counts what a compiled GPU program launches, from the text of its optimized HLO (``compiled.as_text()``).

Every instruction that works on the device counts as one launch: a fusion, a kernel of ours, a library call, a copy.
Parameters, tuples and bitcasts cost nothing. A loop's instructions are counted once, apart from those around it.
Needs neither JAX nor a GPU.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterator

FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "opt-barrier", "after-all"),
    *("partition-id", "replica-id", "get-dimension-size", "add-dependency"),
}
"""Instructions without work on the device."""
KERNEL_TARGETS = frozenset(("mosaic_gpu_v2", "mosaic_gpu", "__gpu$xla.gpu.triton", "tpu_custom_call"))
"""Custom calls that are Pallas kernels."""

_CALLED = ("body", "condition", "to_apply", "calls", "true_computation", "false_computation")


@dataclasses.dataclass(frozen=True)
class Launch:
    """One instruction that works on the device.

    Attributes:
      name: of the instruction.
      kind: its opcode; for a custom call its target.
      shape: type and dimensions of the result, without layouts.
      meaning: the ``op_name`` of its metadata, "" without one.
    """

    name: str
    kind: str
    shape: str
    meaning: str

    @property
    def is_kernel(self) -> bool:
        """Whether this is a Pallas kernel."""
        return self.kind in KERNEL_TARGETS


@dataclasses.dataclass(frozen=True)
class Loop:
    """A while loop: what one turn launches, without the loops inside.

    Attributes:
      name: of the loop's body.
      trips: how often it turns, None if only the run decides.
      body: launches of one turn; those of the condition, if it is evaluated, are the last.
      loops: the loops inside.
    """

    name: str
    trips: int | None
    body: tuple[Launch, ...]
    loops: tuple[Loop, ...]


@dataclasses.dataclass(frozen=True)
class Program:
    """A whole program: `entry` holds launches outside of loops, `loops` the outermost loops."""

    entry: tuple[Launch, ...]
    loops: tuple[Loop, ...]

    def all_loops(self) -> Iterator[Loop]:
        """Every loop, an outer one before those inside."""
        waiting = list(self.loops)
        while waiting:
            loop = waiting.pop(0)
            yield loop
            waiting = [*loop.loops, *waiting]

    def loop_of(self, trips: int) -> Loop | None:
        """The innermost loop that turns this often, for example once a layer; None if there is none."""
        return next((loop for loop in reversed(list(self.all_loops())) if loop.trips == trips), None)


def kinds(launches: tuple[Launch, ...]) -> dict[str, int]:
    """How many launches there are of each kind, most first."""
    return dict(collections.Counter(launch.kind for launch in launches).most_common())


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    rest: str


def program(text: str) -> Program:
    """Reads the text of an optimized HLO module.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations = _computations(text)
    if "ENTRY" not in computations:
        raise ValueError("this is not the text of an HLO module: it has no ENTRY computation")
    launches, loops = _walk("ENTRY", computations)
    return Program(launches, loops)


def _walk(name: str, computations: dict[str, list[_Instruction]]) -> tuple[tuple[Launch, ...], tuple[Loop, ...]]:
    launches: list[Launch] = []
    loops: list[Loop] = []
    for step in computations.get(name, []):
        if step.opcode in FREE or step.opcode.endswith(("-done", "-update")):
            continue
        called = _called(step.rest)
        if step.opcode == "while":
            body, inner = _walk(called["body"], computations)
            trips = _trips(step.rest)
            # XLA does not evaluate the condition of a loop whose number of turns it knows
            condition = () if trips is not None else _walk(called["condition"], computations)[0]
            loops.append(Loop(called["body"], trips, body + condition, inner))
        elif step.opcode == "call":
            inside, inner = _walk(called["to_apply"], computations)
            launches += inside
            loops += inner
        elif step.opcode == "conditional":
            branches = [_walk(branch, computations) for branch in _branches(step.rest)]
            largest = max(branches, key=lambda branch: len(branch[0]), default=((), ()))
            launches += largest[0]
            loops += largest[1]
        else:
            launches.append(_launch(step))
    return tuple(launches), tuple(loops)


def _launch(step: _Instruction) -> Launch:
    target = re.search(r'custom_call_target="([^"]*)"', step.rest)
    meaning = re.search(r'op_name="([^"]*)"', step.rest)
    shape = re.sub(r"\{[^{}]*\}", "", step.shape)
    return Launch(step.name, target[1] if target else step.opcode, shape, meaning[1] if meaning else "")


def _called(rest: str) -> dict[str, str]:
    return {key: name for key, name in re.findall(r"\b(\w+)=%?([\w.\-]+)", rest) if key in _CALLED}


def _branches(rest: str) -> list[str]:
    if listed := re.search(r"branch_computations=\{([^}]*)\}", rest):
        return [name.strip().lstrip("%") for name in listed[1].split(",")]
    called = _called(rest)
    return [called[key] for key in ("true_computation", "false_computation") if key in called]


def _trips(rest: str) -> int | None:
    count = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', rest)
    return int(count[1]) if count else None


def _computations(text: str) -> dict[str, list[_Instruction]]:
    """{name: instructions}; the entry computation is called ENTRY."""
    computations: dict[str, list[_Instruction]] = {}
    current: list[_Instruction] | None = None
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if header := re.match(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$", line):
            current = computations.setdefault("ENTRY" if header[1] else header[2], [])
        elif line.startswith("}"):
            current = None
        elif current is not None and (step := _instruction(line)):
            current.append(step)
    return computations


def _instruction(line: str) -> _Instruction | None:
    begin = re.match(r"^\s+(?:ROOT )?%?([\w.\-]+) = ", line)
    if not begin:
        return None
    shape, rest = _split_shape(line[begin.end() :])
    opcode, _, rest = rest.partition("(")
    return _Instruction(begin[1], shape, opcode.strip(), rest)


def _split_shape(text: str) -> tuple[str, str]:
    """The result's type, which may be a tuple with parentheses inside, and what follows it."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter in "({") - (letter in ")}")
        if letter == " " and not depth:
            return text[:place], text[place + 1 :]
    return text, ""
