"""Barriers of thread blocks and clusters, branches and ends: where threads go on, and when."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from support.ptx.operations import operation
from support.ptx.parsing import Program, PtxError
from support.ptx.values import source

Match = re.Match[str]
Action = Callable[..., Any]


@dataclasses.dataclass
class _Gathering:
    """Threads at one barrier of one block."""

    arrived: np.ndarray
    waiting: np.ndarray
    expected: int
    published: np.ndarray | None = None


class Barriers:
    """Of the blocks and clusters of a machine."""

    def __init__(self, machine: Any):
        self._machine = machine
        self._open: dict[tuple[int, int], _Gathering] = {}
        self._resume = np.zeros(machine.threads, np.int64)
        self._per_cluster = machine.per_block * machine.per_cluster
        self._arrivals = np.zeros(machine.threads, np.int64)  # at barriers of the cluster
        self._waits = np.zeros(machine.threads, np.int64)
        self._waiting = np.zeros(machine.threads, bool)
        self._published: dict[tuple[int, int], np.ndarray] = {}
        self._reached: dict[tuple[int, int], np.ndarray] = {}

    def stuck(self) -> str:
        """What threads wait for that does not come."""
        waiting = self._waiting.copy()
        for gathering in self._open.values():
            waiting |= gathering.waiting
        if not waiting.any():
            return "threads are lost"
        position = int(self._resume[waiting].min()) - 1
        return f"not all threads reach it: {self._machine.program.code[position].text}"

    # ---- of a block ----

    def arrive(
        self, position: int, mask: np.ndarray, number: np.ndarray, counts: np.ndarray | None, wait: bool
    ) -> None:
        """Threads of any blocks arrive at barriers `number`, for `counts` threads (None: the block's)."""
        machine = self._machine
        threads = np.flatnonzero(mask)
        keys = np.unique(np.stack([machine.block[threads], np.broadcast_to(number, threads.shape)]), axis=1)
        for block, barrier in keys.T:
            chosen = (machine.block[threads] == block) & (np.broadcast_to(number, threads.shape) == barrier)
            now = threads[chosen]
            expected = machine.per_block
            if counts is not None:
                expected = int(np.broadcast_to(counts, threads.shape)[chosen][0])
            self._arrive_one((int(block), int(barrier)), position, now, expected, wait)

    def _arrive_one(self, key: tuple[int, int], position: int, now: np.ndarray, expected: int, wait: bool) -> None:
        machine = self._machine
        text = machine.program.code[position].text
        none = np.zeros(machine.threads, bool)
        gathering = self._open.setdefault(key, _Gathering(none, none.copy(), expected))
        if gathering.expected != expected or expected % 32:
            raise PtxError(f"threads expect different numbers of threads, or no whole warps: {text}")
        if gathering.arrived[now].any():
            raise PtxError(f"a thread arrives twice: {text}")
        gathering.arrived[now] = True
        if machine.races is not None:
            cluster, warps = self._places(now)
            published = machine.races.arrive(cluster, warps)
            before = gathering.published
            gathering.published = published if before is None else np.maximum(before, published)
        if wait:
            gathering.waiting[now] = True
            self._resume[now] = position + 1
        else:
            self._go_on(now, position + 1)
        count = int(gathering.arrived.sum())
        if count > expected:
            raise PtxError(f"{count} threads at a barrier for {expected}: {text}")
        if count == expected:
            del self._open[key]
            waiting = np.flatnonzero(gathering.waiting)
            if len(waiting):
                self._leave(waiting, gathering.published)

    def _places(self, threads: np.ndarray) -> tuple[int, np.ndarray]:
        """The cluster of threads, and their warps' numbers in it."""
        return int(threads[0]) // self._per_cluster, np.unique(threads % self._per_cluster // 32)

    def _leave(self, threads: np.ndarray, published: np.ndarray | None) -> None:
        machine = self._machine
        if machine.counter is not None:
            machine.counter.pass_barrier(np.unique(machine.warp[threads]))
        if machine.races is not None and published is not None:
            cluster, warps = self._places(threads)
            machine.races.leave(cluster, warps, published)
        for position in np.unique(self._resume[threads]):
            self._go_on(threads[self._resume[threads] == position], int(position))

    def _go_on(self, threads: np.ndarray, position: int) -> None:
        mask = np.zeros(self._machine.threads, bool)
        mask[threads] = True
        self._machine.put(position, mask)

    # ---- of a cluster ----

    def cluster_arrive(self, position: int, mask: np.ndarray, relaxed: bool) -> None:
        """Threads arrive; what they did before is seen by those that wait, unless `relaxed`."""
        machine = self._machine
        if (self._arrivals[mask] != self._waits[mask]).any():
            raise PtxError(f"a thread arrives twice: {machine.program.code[position].text}")
        if machine.races is not None:
            threads = np.flatnonzero(mask)
            for cluster in np.unique(threads // self._per_cluster):
                some = threads[threads // self._per_cluster == cluster]
                arrive = machine.races.arrive_relaxed if relaxed else machine.races.arrive
                published = arrive(int(cluster), self._places(some)[1])
                key = (int(cluster), int(self._arrivals[some[0]]))
                self._reached[key] = np.maximum(self._reached.get(key, 0), published)
                if not relaxed:
                    self._published[key] = np.maximum(self._published.get(key, 0), published)
        self._arrivals[mask] += 1
        machine.put(position + 1, mask)
        self.released()

    def cluster_wait(self, position: int, mask: np.ndarray) -> None:
        """Threads wait for all of the cluster that have not ended."""
        if (self._arrivals[mask] != self._waits[mask] + 1).any():
            raise PtxError(f"a thread waits that has not arrived: {self._machine.program.code[position].text}")
        self._waiting |= mask
        self._resume[mask] = position + 1
        self.released()

    def released(self) -> None:
        """Lets threads go on for which all have arrived."""
        if not self._waiting.any():
            return
        endless = np.where(self._machine.ended, np.iinfo(np.int64).max, self._arrivals)
        least = endless.reshape(-1, self._per_cluster).min(axis=1)
        free = self._waiting & (self._waits < np.repeat(least, self._per_cluster))
        threads = np.flatnonzero(free)
        self._waiting &= ~free
        for cluster in np.unique(threads // self._per_cluster):
            some = threads[threads // self._per_cluster == cluster]
            key = (int(cluster), int(self._waits[some[0]]))
            self._waits[some] += 1
            if self._machine.races is not None and key in self._reached:
                self._machine.races.pass_cluster(key[0], self._reached[key])
            self._leave(some, self._published.get(key))


# ---- instructions ----


@operation(r"bra(\.uni)?", 1, control=True)
def _branch(program: Program, match: Match, operands: tuple[str, ...]) -> Action:
    if operands[0] not in program.labels:
        raise PtxError(f"no label {operands[0]}")
    where = program.labels[operands[0]]
    return lambda machine, position, mask: machine.put(where, mask)


@operation(r"(ret|exit)(\.uni)?", 0, control=True)
def _end(program: Program, match: Match, operands: tuple[str, ...]) -> Action:
    return lambda machine, position, mask: machine.end(mask)


@operation(r"trap", 0, control=True)
def _trap(program: Program, match: Match, operands: tuple[str, ...]) -> Action:
    def act(machine: Any, position: int, mask: np.ndarray) -> None:
        raise PtxError("a trap is reached")

    return act


@operation(r"bar(?:\.cta)?\.(sync|arrive)", 1, 2, control=True, together=True)
@operation(r"barrier(?:\.cta)?\.(sync|arrive)\.aligned", 1, 2, control=True, together=True)
@operation(r"barrier(?:\.cta)?\.(sync|arrive)", 1, 2, control=True)
def _block_barrier(program: Program, match: Match, operands: tuple[str, ...]) -> Action:
    number = source(program, operands[0], "u32")
    count = source(program, operands[1], "u32") if len(operands) > 1 else None
    wait = match[1] == "sync"
    if not wait and count is None:
        raise PtxError("a number of threads is needed")

    def act(machine: Any, position: int, mask: np.ndarray) -> None:
        lanes = np.flatnonzero(mask)
        expected = None if count is None else count(machine, lanes)
        machine.barriers.arrive(position, mask, number(machine, lanes), expected, wait)

    return act


@operation(r"barrier\.cluster\.arrive(\.release|\.relaxed)?\.aligned", 0, control=True, together=True)
@operation(r"barrier\.cluster\.arrive(\.release|\.relaxed)?", 0, control=True)
def _cluster_arrive(program: Program, match: Match, operands: tuple[str, ...]) -> Action:
    relaxed = match[1] == ".relaxed"
    return lambda machine, position, mask: machine.barriers.cluster_arrive(position, mask, relaxed)


@operation(r"barrier\.cluster\.wait(\.acquire)?\.aligned", 0, control=True, together=True)
@operation(r"barrier\.cluster\.wait(\.acquire)?", 0, control=True)
def _cluster_wait(program: Program, match: Match, operands: tuple[str, ...]) -> Action:
    return lambda machine, position, mask: machine.barriers.cluster_wait(position, mask)
