"""Outliers where there are many rows of x: added to the decoded weights, so that `mma` multiplies them.

A warp has room in shared memory for the weights of one step, float16 in the order of operand A, all zeros between
steps. Two lanes share a row of the tile. For each step they store the outliers that are in it, all lanes load their
operand's words and add them to the weights, and the same outliers are overwritten with zeros.
"""

from __future__ import annotations

from pallas_kernels import machine
from pallas_kernels.machine import Pair, Word
from pallas_kernels.spqr_matmul.entries import quarter_steps
from pallas_kernels.spqr_matmul.formats import STEP_COLUMNS, TILE
from pallas_kernels.spqr_matmul.mosaic.thread import Thread

HELD = 5
"""Outliers of a lane in registers; more are read again for each step."""

_LANES = 2  # of a row
_STEP_BITS = 12  # of a place among a step's weights, in half-words


class Scattered:
    """A lane's outliers of one chunk."""

    def __init__(self, thread: Thread) -> None:
        plan = thread.plan
        self.thread, self.plan = thread, plan
        self._shared = thread.shared["scattered"]
        self._room = thread.warp * (TILE * STEP_COLUMNS // 2)  # words
        row = thread.lane >> 1
        self._at_row = self._room * 2 + ((row & 7) << 5) + ((row >> 3) << 1)
        self._held: list[Word] = []
        self._rest = (machine.word(0), machine.word(0))

    def clear(self) -> None:
        """Zeros to the warp's room."""
        zeros = [machine.word(0)] * 4
        for i in range(TILE * STEP_COLUMNS // 2 // 128):
            self._shared.store(self._room + self.thread.lane * 4 + 128 * i, zeros)

    def bounds(self) -> tuple[Word, Word]:
        """The lane's first entry in the thread block's part of the columns, and the end of its row's."""
        plan, thread = self.plan, self.thread
        quarter = quarter_steps(plan.steps)
        row = thread.first_row + thread.tile * TILE + (thread.lane >> 1)
        row = machine.minimum(row, plan.rows - 1)
        starts = thread.address["starts"].times(thread.matrix, 4 * (4 * plan.rows + 1)).at(row, 16)
        edges = [thread.first_step, thread.first_step + (plan.part + quarter - 1)]
        policy = thread.policy(machine.CONSTANT)
        first, last = (machine.load(starts.at(machine.minimum(edge // quarter, 4)), policy=policy)[0] for edge in edges)
        return first + (thread.lane & 1), last

    def load(self, chunk: Word | int, first: Word, last: Word) -> Word:
        """Loads a chunk's outliers; returns the first entry of the next chunk."""
        end = last
        if self.plan.chunks > 1:
            stop = (self.thread.chunk_first(chunk) + self.plan.chunk) * STEP_COLUMNS

            def count(i: Word, end: Word) -> Word:
                [entry] = self._entry(i, last)
                return machine.select((entry & 0xFFFF) < stop, i + _LANES, end)

            end = machine.loop(first, last, _LANES, first, count)
        self._held = [self._code(chunk, *self._entry(first + _LANES * i, end)) for i in range(HELD)]
        self._rest = first + _LANES * HELD, end
        return end

    def _entry(self, entry: Word, end: Word) -> list[Word]:
        thread = self.thread
        at = thread.address["entries"].times(thread.matrix, 4 * self.plan.capacity).at(entry)
        return machine.load(at, when=entry < end, policy=thread.policy(machine.CONSTANT))

    def _code(self, chunk: Word | int, entry: Word) -> Word:
        """Step of the chunk and place among its weights in the low half, the value in the high half; else 0."""
        place = (entry & 0xFFFF) - self.thread.chunk_first(chunk) * STEP_COLUMNS
        inside = ((place & 0xE0) << 3) + ((place & 4) << 9) + (place & 0x19) + ((place & 2) << 1)
        code = (entry & 0xFFFF0000) | (place >> 8) << _STEP_BITS | inside
        return machine.select(place < self.thread.steps_of_chunk(chunk) * STEP_COLUMNS, code, 0)

    def _put(self, code: Word, step: Word, *, zero: bool) -> None:
        place = (code & 0xFFFF) - (step << _STEP_BITS)
        inside = (place < 1 << _STEP_BITS) & ~(code < 1 << 16)  # what is no outlier has value 0
        value = machine.word(0) if zero else code >> 16
        self._shared.store_half_bits(self._at_row + place, value, inside)

    def _put_all(self, chunk: Word | int, step: Word, *, zero: bool) -> None:
        for code in self._held:
            self._put(code, step, zero=zero)
        first, end = self._rest

        def more(i: Word) -> None:
            self._put(self._code(chunk, *self._entry(i, end)), step, zero=zero)

        machine.for_each(first, end, _LANES, more)

    def begin(self, chunk: Word | int, step: Word) -> None:
        """Stores a step's outliers."""
        self._put_all(chunk, step, zero=False)
        machine.warp_barrier()

    def block(self, block: int) -> list[Pair]:
        """A block's outliers as the four words of operand A."""
        return [w.pair() for w in self._shared.load(self._room + self.thread.lane * 4 + 128 * block, 4)]

    def end(self, chunk: Word | int, step: Word) -> None:
        """Takes a step's outliers away."""
        machine.warp_barrier()
        self._put_all(chunk, step, zero=True)
        machine.warp_barrier()
