"""The outliers' part of the product: threads by rows of W, values of x from shared memory, sums in a fixed order.

An equal number of threads shares each row's outliers; a thread has every `per_row`-th of them and a sum for each row
of x, of up to 32. With more rows of x there are twice as many threads, half of the rows of x each, or more turns.
"""

from __future__ import annotations

from pallas_kernels import machine
from pallas_kernels.machine import Float, Word
from pallas_kernels.spqr_matmul.entries import quarter_steps
from pallas_kernels.spqr_matmul.formats import STEP_COLUMNS, TILE
from pallas_kernels.spqr_matmul.mosaic import activations
from pallas_kernels.spqr_matmul.mosaic.thread import Thread

MOST_ROWS = 32
"""Rows of x that a thread has sums for."""


class Outliers:
    """A thread's outliers: those of one row of W, in a chunk of the columns."""

    def __init__(self, thread: Thread) -> None:
        plan = thread.plan
        self.thread, self.plan = thread, plan
        rows = TILE * plan.tiles
        self.halves = -(-plan.n // MOST_ROWS)  # of the rows of x: 1 or 2
        self.count = plan.n if self.halves == 1 else plan.columns_b // 2  # rows of x that this thread has
        self.per_row = min(32, 1 << (max(plan.threads // (rows * self.halves), 1)).bit_length() - 1)
        self.turns = -(-rows * self.halves * self.per_row // plan.threads)
        self.quarter = quarter_steps(plan.steps)
        # a chunk that is no whole number of quarters has only some of its quarters' entries
        cuts = [plan.chunk] * (plan.chunks > 1) + [plan.part] * (plan.config.cluster > 1)
        self.filtered = any(cut % self.quarter for cut in cuts)

    def _worker(self, turn: int) -> tuple[Word, Word, Word]:
        """(row of the thread block's, half of the rows of x, place among the threads of this row) in a turn."""
        worker = self.thread.index + turn * self.plan.threads
        shared = worker // self.per_row
        return shared // self.halves, shared % self.halves, worker % self.per_row

    def bounds(self, chunk: Word | int, turn: int = 0) -> tuple[Word, Word]:
        """The thread's first entry of a chunk, and the end of its row's."""
        plan, thread = self.plan, self.thread
        row, _, place = self._worker(turn)
        first_step = thread.chunk_first(chunk)
        quarters = [
            machine.minimum(first_step // self.quarter, 4),
            machine.minimum((first_step + plan.chunk + (self.quarter - 1)) // self.quarter, 4),
        ]
        mine = row < TILE * plan.tiles
        row = machine.minimum(thread.first_row + row, plan.rows - 1)
        starts = thread.address["starts"].times(thread.matrix, 4 * (4 * plan.rows + 1)).at(row, 16)
        policy = thread.policy(machine.CONSTANT)
        first, last = (machine.load(starts.at(q), when=mine, policy=policy)[0] for q in quarters)
        return first + place, last

    def load(self, entry: Word, last: Word) -> Word:
        """An entry; zeros past the last."""
        at = self.thread.address["entries"].times(self.thread.matrix, 4 * self.plan.capacity).at(entry)
        return machine.load(at, when=entry < last, policy=self.thread.policy(machine.STREAMED))[0]

    def early(self, entry: Word, last: Word) -> list[Word]:
        """The thread's first entries, loaded before their x is there."""
        return [self.load(entry + i * self.per_row, last) for i in range(self.plan.config.early)]

    def zeros(self) -> list[list[Float]]:
        """Sums to begin with, by turn and row of x."""
        return [[machine.number(0.0)] * self.count for _ in range(self.turns)]

    def add(
        self, chunk: Word | int, sums: list[list[Float]], bounds: tuple[Word, Word], early: list[Word]
    ) -> list[list[Float]]:
        """The sums with a chunk's outliers; `bounds` and `early` are the first turn's."""
        results = []
        for turn in range(self.turns):
            entry, last = bounds if turn == 0 else self.bounds(chunk, turn)
            total = sums[turn]
            for word in early if turn == 0 else []:
                total = self._add_one(chunk, turn, word, total)
            skipped = len(early) * self.per_row if turn == 0 else 0

            def more(i: Word, carried: list[Float], turn: int = turn, last: Word = last) -> list[Float]:
                return self._add_one(chunk, turn, self.load(i, last), carried)

            results.append(machine.loop(entry + skipped, last, self.per_row, total, more))
        return results

    def _add_one(self, chunk: Word | int, turn: int, entry: Word, sums: list[Float]) -> list[Float]:
        plan, thread = self.plan, self.thread
        place, value = entry & 0xFFFF, entry.pair()[1]
        columns = plan.chunk * STEP_COLUMNS
        if plan.config.cluster > 1 or plan.chunks > 1:
            place = place - thread.chunk_first(chunk) * STEP_COLUMNS
            if self.filtered:
                inside = place < thread.steps_of_chunk(chunk) * STEP_COLUMNS
                value = machine.choose(inside, value, 0.0)
            place = machine.minimum(place, columns - 1)  # what is no entry of the chunk has value 0
        _, half, _ = self._worker(turn)
        first = half * (self.count * 32) if self.halves > 1 else machine.word(0)
        shared = thread.shared["x"]
        return [
            machine.fma(value, shared.load_half(activations.half_place(plan, place, r) + first), sums[r])
            for r in range(self.count)
        ]

    def store(self, sums: list[list[Float]]) -> None:
        """The sums of each row's threads to shared memory, [rows of W, rows of x]."""
        plan, thread = self.plan, self.thread
        for turn in range(self.turns):
            row, half, place = self._worker(turn)
            totals = [machine.warp_sum(v, self.per_row).word() for v in sums[turn]]

            def put(row: Word = row, half: Word = half, totals: list[Word] = totals) -> None:
                for r, total in enumerate(totals):
                    thread.shared["totals"].store(row * plan.columns_b + half * self.count + r, [total])

            machine.if_(place.equals(0) & (row < TILE * plan.tiles), put)
