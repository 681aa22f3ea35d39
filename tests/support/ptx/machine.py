"""Thread blocks that run together: registers, who is where in the program, and who waits for whom.

Threads that are at the same instruction go on together. Those furthest behind go first; they go apart at
branches and meet again where they reach the same instruction. What a whole warp must do (shuffles, matrix
products) waits until all of its threads are there; warps wait for each other at barriers only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from support.ptx.barriers import Barriers
from support.ptx.costs import Counter
from support.ptx.memory import Global, Shared
from support.ptx.operations import Operation
from support.ptx.parsing import Instruction, Program, PtxError
from support.ptx.races import Races
from support.ptx.transfers import Copies
from support.ptx.values import source

ALL = slice(None)


class Machine:
    """The blocks of some clusters.

    Args:
      program: what they run, and `operations` for each of its instructions.
      device: device memory.
      parameters: values of the kernel's parameters.
      blocks: int64 [blocks, 3], places in the grid, clusters' blocks side by side.
      grid, block, cluster: blocks of the grid, threads of a block, blocks of a cluster; each by x, y, z.
      shared_bytes: of a block.
      races, counts: whether races are looked for, and costs counted.
      early: buffers that may be used before ``griddepcontrol.wait``; None: all.
    """

    def __init__(
        self,
        program: Program,
        operations: Sequence[Operation],
        device: Global,
        parameters: Sequence[int],
        blocks: np.ndarray,
        grid: Sequence[int],
        block: Sequence[int],
        cluster: Sequence[int],
        *,
        shared_bytes: int,
        races: bool,
        counts: bool,
        early: frozenset[int] | None,
    ):
        self.program, self.operations, self.device, self.parameters = program, operations, device, parameters
        self.per_block, self.per_cluster = int(np.prod(block)), int(np.prod(cluster))
        self.threads = len(blocks) * self.per_block
        self.registers: dict[str, np.ndarray] = {}
        self.all = np.arange(self.threads)
        self.block, self.warp = self.all // self.per_block, self.all // 32
        self.shared = Shared(len(blocks), shared_bytes, self.per_cluster)
        self.copies = Copies(self.threads)
        self.ended = np.zeros(self.threads, bool)
        self.waited, self._early = np.zeros(self.threads, bool), early
        self._places, self._sizes = blocks, (grid, block, cluster)
        self._special: dict[str, np.ndarray] = {}
        self._groups: dict[int, np.ndarray] = {0: np.ones(self.threads, bool)}
        opcodes = [instruction.opcode for instruction in program.code]
        warps = self.threads // 32
        texts = [instruction.text for instruction in program.code]
        self.counter = Counter(texts, opcodes, warps, len(blocks)) if counts else None
        self.races: Races | None = None
        if races:
            clusters = len(blocks) // self.per_cluster
            grain = _smallest(program)
            self.races = Races(clusters, self.per_cluster, self.per_block // 32, self.shared.size, grain)
        self.barriers = Barriers(self)

    # ---- what instructions ask ----

    def numbers(self, lanes: Any) -> np.ndarray:
        """The numbers of threads, ascending."""
        return self.all if isinstance(lanes, slice) else lanes

    def count(self, lanes: Any) -> int:
        """How many threads."""
        return self.threads if isinstance(lanes, slice) else len(lanes)

    def special(self, name: str) -> np.ndarray:
        """A special register, int64 [threads]."""
        if name not in self._special:
            self._special[name] = self._special_value(name)
        return self._special[name]

    def _special_value(self, name: str) -> np.ndarray:
        grid, block, cluster = self._sizes
        base, _, axis = name.removeprefix("%").partition(".")
        i = "xyz".find(axis)
        inside = self.all % self.per_block
        sizes = {"ntid": block, "nctaid": grid, "cluster_nctaid": cluster}
        sizes["nclusterid"] = [g // c for g, c in zip(grid, cluster, strict=True)]
        if base in sizes:
            return np.full(self.threads, sizes[base][i])
        if base == "tid":
            return inside // int(np.prod(block[:i], dtype=int)) % block[i]
        place, rank = self._places[self.block], self.block % self.per_cluster
        by_axis = {"ctaid": place, "cluster_ctaid": place % cluster, "clusterid": place // cluster}
        if base in by_axis:
            return by_axis[base][:, i]
        values = {"laneid": inside % 32, "warpid": inside // 32, "cluster_ctarank": rank}
        return values.get(base, np.full(self.threads, self.per_cluster))

    def ready(self, lanes: Any, buffers: Sequence[int], text: str) -> None:
        """Sees to it that nothing is used that the launch before may still write."""
        if self._early is None or self.waited[lanes].all() or all(buffer in self._early for buffer in buffers):
            return
        raise PtxError(f"a buffer is used before griddepcontrol.wait: {text}")

    def access_shared(self, lanes: Any, offsets: np.ndarray, size: int, text: str, *, write: bool) -> np.ndarray:
        """Places in shared memory of an access, which is counted and looked at for races."""
        threads = self.numbers(lanes)
        places, owner = self.shared.places(offsets, self.block[threads], size, text)
        if self.per_cluster > 1 and (offsets >> 24).any():
            alive = ~self.ended.reshape(-1, self.per_block).all(axis=1)
            if not alive[owner].all():
                raise PtxError(f"shared memory of a block that has ended: {text}")
        if self.counter is not None:
            self.counter.shared(text, threads, places, size)
        if self.races is not None:
            warp = self.warp[threads]
            if self.races.write(places, size, warp) if write else self.races.read(places, size, warp, owner):
                raise PtxError(f"a race: no barrier between this access and one of another warp: {text}")
        return places

    # ---- who is where ----

    def put(self, position: int, mask: np.ndarray) -> None:
        """Threads go on at an instruction."""
        if position >= len(self.program.code):
            raise PtxError("ran past the end")
        self._groups[position] = self._groups[position] | mask if position in self._groups else mask

    def run(self) -> None:
        """Runs to the end of all threads."""
        while self._groups:
            position, mask = self._next()
            self._go(position, mask)
        if not self.ended.all():
            raise PtxError(self.barriers.stuck())

    def _next(self) -> tuple[int, np.ndarray]:
        """The threads furthest behind that can go on."""
        for position in sorted(self._groups):
            mask = self._groups[position]
            able = self._able(position, mask)
            if able.any():
                del self._groups[position]
                if (rest := mask & ~able).any():
                    self._groups[position] = rest
                return position, able
        position = min(self._groups)
        raise PtxError(f"not all threads reach it: {self.program.code[position].text}")

    def _able(self, position: int, mask: np.ndarray) -> np.ndarray:
        operation = self.operations[position]
        if not operation.together:
            return mask
        needed = np.ones((self.threads // 32, 32), bool)
        if operation.members is not None and mask.any():
            lanes = np.flatnonzero(mask)
            named = np.broadcast_to(source(self.program, operation.members, "b32")(self, lanes), lanes.shape)
            bits = np.zeros(self.threads // 32, np.uint32)
            bits[lanes // 32] = named
            needed = (bits[:, None] >> np.arange(32, dtype=np.uint32) & np.uint32(1)).astype(bool)
            if not needed.reshape(-1)[lanes].all():
                raise PtxError(f"a thread that the mask does not name: {self.program.code[position].text}")
        here = mask.reshape(-1, 32)
        whole = ((here & needed) == needed).all(axis=1)
        return (here & whole[:, None]).reshape(-1)

    def _go(self, position: int, mask: np.ndarray) -> None:
        """Runs threads together until they branch, end, wait, or meet others."""
        whole = bool((mask.reshape(-1, 32).all(axis=1) == mask.reshape(-1, 32).any(axis=1)).all())
        lanes: Any = ALL if mask.all() else np.flatnonzero(mask)
        warps = np.flatnonzero(mask.reshape(-1, 32).any(axis=1))
        first = position
        code, operations = self.program.code, self.operations
        while True:
            operation = operations[position]
            if position != first and operation.together and (operation.members or not whole):
                self.put(position, mask)
                break
            if operation.control:
                position += 1
                self._issue(first, position, warps)
                self._control(position - 1, mask, lanes)
                return
            active = self._active(position, lanes)
            if active is not None:
                try:
                    operation.action(self, active)
                except PtxError as error:
                    raise _with_line(error, code[position]) from None
            position += 1
            if position in self._groups or position == len(code):
                self.put(position, mask)
                break
        self._issue(first, position, warps)

    def _issue(self, first: int, end: int, warps: np.ndarray) -> None:
        if self.counter is not None:
            self.counter.issue(first, end, warps)

    def _active(self, position: int, lanes: Any) -> Any:
        """The threads whose predicate holds; None if none."""
        instruction = self.program.code[position]
        if instruction.predicate is None:
            return lanes
        read = source(self.program, instruction.predicate, "pred")
        holds = np.broadcast_to(read(self, lanes) ^ instruction.negated, (self.count(lanes),))
        if holds.all():
            return lanes
        if not holds.any():
            return None
        active = self.numbers(lanes)[holds]
        if self.operations[position].together:
            warps = np.zeros((self.threads // 32, 32), bool)
            warps.reshape(-1)[active] = True
            before = np.zeros((self.threads // 32, 32), bool)
            before.reshape(-1)[self.numbers(lanes)] = True
            if (warps.any(axis=1)[:, None] & (warps != before)).any():
                raise PtxError(f"not all threads reach it: {instruction.text}")
        return active

    def _control(self, position: int, mask: np.ndarray, lanes: Any) -> None:
        active = self._active(position, lanes)
        rest = mask.copy()
        taken = np.zeros(self.threads, bool)
        if active is not None:
            taken[active] = True
            rest &= ~taken
            try:
                self.operations[position].action(self, position, taken)
            except PtxError as error:
                raise _with_line(error, self.program.code[position]) from None
        if rest.any():
            self.put(position + 1, rest)

    def end(self, mask: np.ndarray) -> None:
        """Threads end."""
        before = self.ended.reshape(-1, self.per_block).all(axis=1)
        self.ended |= mask
        after = self.ended.reshape(-1, self.per_block).all(axis=1)
        if self.races is not None and self.per_cluster > 1:
            for block in np.flatnonzero(after & ~before):
                if self.races.used_by_others(int(block)):
                    raise PtxError("a block ends whose shared memory another block may still use")
        self.barriers.released()


def _with_line(error: PtxError, instruction: Instruction) -> PtxError:
    known = f"{instruction.opcode} {', '.join(instruction.operands)}" in str(error)
    return error if known and instruction.operands else PtxError(f"{error}: {instruction.text}")


def _smallest(program: Program) -> int:
    """Bytes of the smallest access that may be one of shared memory."""
    sizes = [4]
    for instruction in program.code:
        name, _, rest = instruction.opcode.partition(".")
        if name in ("ld", "st") and "global" not in rest and "param" not in rest:
            sizes.append(int("".join(c for c in instruction.opcode.rpartition(".")[2] if c.isdigit())) // 8)
        elif name == "ldmatrix":
            sizes.append(4)
    return min(sizes)
