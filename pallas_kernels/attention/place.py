"""Which part of the work a thread of the kernel has, and how a head's dimensions lie in shared memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pallas_kernels import machine as m
from pallas_kernels.attention.plan import LOAD_BYTES, Plan
from pallas_kernels.attention.problem import Problem
from pallas_kernels.machine import Float, Shared, Word


def padded(problem: Problem, plan: Plan) -> int:
    """Dimensions of a head with those of idle lanes."""
    return plan.lanes * plan.chunks * LOAD_BYTES // problem.cache_dtype.itemsize


def shared_sizes(problem: Problem, plan: Plan) -> tuple[int, int, int]:
    """Floats in shared memory: the token's queries, key and value; the warps' sums; the warps' maxima and weights."""
    by_warp = plan.warps * plan.block_heads
    return (plan.block_heads + 2) * padded(problem, plan), by_warp * padded(problem, plan), by_warp * 2


class Place:
    """One thread's place.

    Attributes:
      thread, warp: indices in the block.
      group: of lanes that share a key, in the warp.
      lane: in the group.
      split, part: of the plan.
      rank: of the block in its cluster.
      text, kv_head: what the block reads.
      first_head: the block's first query head, of those that share the KV head.
      elements: of the cache that a lane loads at a time.
      head: dimensions of a head with those of idle lanes.
      token, sums, statistics: shared memory, as in `shared_sizes`.
    """

    def __init__(self, problem: Problem, plan: Plan, shared: Sequence[Any]):
        self.problem, self.plan = problem, plan
        self.elements, self.head = LOAD_BYTES // problem.cache_dtype.itemsize, padded(problem, plan)
        self.token, self.sums, self.statistics = (Shared(ref) for ref in shared)
        self.thread = m.thread_index()
        in_warp = self.thread & 31
        self.warp, self.group, self.lane = self.thread >> 5, in_warp // plan.lanes, in_warp & (plan.lanes - 1)
        block = m.block_index()
        self.split, block = block % plan.splits, block // plan.splits
        self.rank = self.split % plan.cluster
        self.part, block = block % plan.parts, block // plan.parts
        self.kv_head, self.text = block % problem.kv_heads, block // problem.kv_heads
        self.first_head = self.part * plan.block_heads

    # In shared memory a head's dimensions lie four by four, so that lanes side by side read words side by side.

    def position(self, dimension: Word) -> Word:
        """Where a dimension of a head stands in shared memory."""
        piece, inside = dimension // self.elements, dimension % self.elements
        chunk, lane = piece // self.plan.lanes, piece % self.plan.lanes
        fours = chunk * (self.elements // 4) + (inside >> 2)
        return (fours * self.plan.lanes + lane) * 4 + (inside & 3)

    def dimension(self, position: Word) -> Word:
        """The dimension that stands at a position."""
        lane, fours = (position >> 2) % self.plan.lanes, (position >> 2) // self.plan.lanes
        chunk, four = fours // (self.elements // 4), fours % (self.elements // 4)
        return (chunk * self.plan.lanes + lane) * self.elements + four * 4 + (position & 3)

    def position_of_lane(self, index: Word) -> Word:
        """Where the dimension stands that this lane has as its `index`-th."""
        return ((index >> 2) * self.plan.lanes + self.lane) * 4 + (index & 3)

    def of_lane(self, slot: int) -> list[Float]:
        """This lane's dimensions of the token's query `slot`; its key and its value come after the queries."""
        values: list[Float] = []
        for four in range(self.plan.chunks * self.elements // 4):
            words = self.token.load(self.lane * 4 + (slot * self.head + four * self.plan.lanes * 4), 4)
            values += [w.float() for w in words]
        return values
