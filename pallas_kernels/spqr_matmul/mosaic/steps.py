"""The loops over a warp's steps.

`Narrow`, for up to 16 rows of x: codes are multiplied as they are; each group's sum is scaled in float32; zero points
are taken off by a product of scales times zero points with the groups' sums of x. With one row, only one column of
`mma` would be of use: there each block of columns has its own, as other lanes' words of operand B are zeros. So a lane
gets the sums whose scales it has itself.

`Wide`, for more rows: weights are decoded to float16, (code - zero) * scale, and `mma` adds up over all columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pallas_kernels import machine
from pallas_kernels.machine import Float, Pair, Word
from pallas_kernels.spqr_matmul.formats import BLOCKS, STEP_COLUMNS, Format
from pallas_kernels.spqr_matmul.mosaic import activations
from pallas_kernels.spqr_matmul.mosaic.decode import Codes, Statistics
from pallas_kernels.spqr_matmul.mosaic.fetch import Fetcher, register_count
from pallas_kernels.spqr_matmul.mosaic.scattered import Scattered
from pallas_kernels.spqr_matmul.mosaic.thread import Thread

State = list[Float]


def zero_sum() -> list[Float]:
    """An accumulator of `mma`."""
    return [machine.number(0.0)] * 4


class Steps:
    """A warp's steps of one format: words are loaded `depth` steps ahead."""

    def __init__(self, thread: Thread, form: Format) -> None:
        self.thread, self.plan, self.form = thread, thread.plan, form
        self.fetch = Fetcher(thread, form)
        self.count = register_count(form)

    def _fetch(self, chunk: Word | int, step: Word) -> list[Word]:
        """The words of a chunk's step; zeros past the warp's last."""
        inside = step < self.thread.end_of_chunk(chunk)
        return self.fetch(self.thread.chunk_first(chunk) + step, inside)

    def _step(self, i: Word | int) -> Word:
        """The warp's i-th step, from the chunk's first."""
        return self.thread.step + i * self.plan.split

    def ahead(self, chunk: Word | int) -> list[list[Word]]:
        """The words of the chunk's first steps."""
        return [self._fetch(chunk, self._step(d)) for d in range(self.plan.config.depth)]

    def run(self, chunk: Word | int, ahead: list[list[Word]], scattered: Scattered | None) -> State:
        """The accumulators of the warp's rows and all rows of x, [tile of 8 rows of x][element]."""
        depth = self.plan.config.depth
        a_warp = -(-self.plan.chunk // self.plan.split)
        turns = -(-a_warp // depth)
        product: Any = Narrow(self.thread, self.form)
        if self.plan.wide:
            product = Wide(self.thread, self.form, chunk, scattered)
        state = product.start()

        def turn(i: Word, carried: tuple[list[list[Word]], Any]) -> tuple[list[list[Word]], Any]:
            sets, state = carried
            sets = list(sets)
            for d in range(depth):
                state = product.step(self._step(i * depth + d), sets[d], state)
                sets[d] = self._fetch(chunk, self._step((i + 1) * depth + d))
            return sets, state

        if turns > 1:
            ahead, state = machine.loop(0, turns - 1, 1, (ahead, state), turn)
        for d in range(min(depth, a_warp - (turns - 1) * depth)):  # nothing more to load
            state = product.step(self._step((turns - 1) * depth + d), ahead[d], state)
        return product.finish(state)


class Narrow:
    """Up to 16 rows of x. The state: for each 8 rows of x, sums by scales and sums with zero points."""

    def __init__(self, thread: Thread, form: Format) -> None:
        self.thread, self.plan, self.form = thread, thread.plan, form
        # only blocks with statistics of their own can each have their own power of two
        self.subnormal = thread.plan.config.subnormal and form.groups == BLOCKS
        if self.subnormal:
            self._powers = [self._lane_powers(v) for v in (0, 1)]
        if self.plan.n == 1:
            ones = machine.half_bits(1.0, 1.0)
            # a product with ones or zeros runs beside the integer units, which have more to do
            self._masks = [machine.select(thread.row8.equals(i), ones, 0).pair() for i in range(8)]

    def start(self) -> list[list[Float]]:
        return [zero_sum() for _ in range(2 * self.plan.tiles_b)]

    def finish(self, state: list[list[Float]]) -> State:
        """With one row of x: the sum over columns of `mma` is the result."""
        results = []
        for tile_b in range(self.plan.tiles_b):
            total, zeros = state[2 * tile_b], state[2 * tile_b + 1]
            if self.subnormal:
                total = [v * 2.0**18 for v in total]
            if self.plan.n == 1:  # columns 0 and 1 have the sums' high and low parts, the others nothing of use
                zeros = [machine.choose(self.thread.column4.equals(0), v, 0.0) for v in zeros]
            results += [a - b for a, b in zip(total, zeros, strict=True)]
        return results

    def _lane_powers(self, v: int) -> Pair:
        """2^(6 - position) of the lane's blocks 8 v + 2 c + e."""
        powers = [2.0 ** (6 - self.form.position(8 * v + i)) for i in range(8)]
        options = [machine.half_bits(powers[2 * c], powers[2 * c + 1]) for c in range(4)]
        column = self.thread.column4
        low = machine.select(column.equals(1), options[1], options[0])
        high = machine.select(column.equals(3), options[3], options[2])
        return machine.select(column < 2, low, high).pair()

    def _zeros(self, statistics: Statistics, step: Word, tile_b: int, sums: list[Float]) -> list[Float]:
        """Adds scales times (zero points times sums of x, plus sums of what the codes are increased by)."""
        form = self.form
        products = [v.word() for v in statistics.products]
        scales = [v.word() for v in statistics.scales]
        for part in (0,) if self.plan.n == 1 else (0, 1):
            words = activations.sums_words(self.thread, form.groups, form.width, step, part, tile_b)
            half = len(words) // 2
            multiply: Callable[..., list[Float]] = machine.mma
            plain, weighted = (words[:half], words[half:]) if form.groups == 16 else (words[0], words[1])
            if form.groups == 8:
                multiply = machine.mma_half
            sums = multiply(products, plain, sums)
            if not self.subnormal:
                # the codes' increase is on the other side: scale * (code + increase) - scale * increase
                sums = multiply(scales, weighted, sums)
        return sums

    def step(self, step: Word, words: list[Word], state: list[list[Float]]) -> list[list[Float]]:
        # Past the end the words are zeros, which makes all statistics zero; x must only be finite.
        step = machine.minimum(step, self.plan.chunk - 1)
        codes = Codes(self.form, words, subnormal=self.subnormal)
        statistics = Statistics(self.form, words)
        zeros = [self._zeros(statistics, step, t, state[2 * t + 1]) for t in range(self.plan.tiles_b)]
        scales = statistics.scales
        if self.subnormal:
            scales = [s * self._powers[i >> 1] for i, s in enumerate(scales)]
        if self.plan.n == 1:
            return [self._row(codes, scales, step, state[0]), zeros[0]]
        totals = self._rows(codes, statistics, scales, step, state[::2])
        return [v for pair in zip(totals, zeros, strict=True) for v in pair]

    # ---- one row of x -----------------------------------------------------------------------------------------------

    def _row(self, codes: Codes, scales: list[Pair], step: Word, total: list[Float]) -> list[Float]:
        if self.form.groups == 16:
            # column i of mma has blocks i and i + 8, one after the other
            for v in (0, 1):
                acc = zero_sum()
                words = self._own_words(step)
                for i in range(8):
                    acc = machine.mma(codes.block(8 * v + i), self._masked(words[2 * v : 2 * v + 2], i), acc)
                total = _scaled(total, acc, scales[2 * v : 2 * v + 2])
            return total
        acc = zero_sum()
        pairs = self._own_pair_words(step)
        for block in range(BLOCKS):  # column i of mma has blocks 2 i and 2 i + 1, a group
            acc = machine.mma(codes.block(block), self._masked(pairs[block & 1], block >> 1), acc)
        return _scaled(total, acc, scales)

    def _masked(self, words: list[Word], column: int) -> list[Word]:
        return [(w.pair() * self._masks[column]).word() for w in words]

    def _own_words(self, step: Word) -> list[Word]:
        """x of the blocks row8 and row8 + 8: words (v) of each."""
        thread = self.thread
        turned = thread.column4 ^ ((thread.row8 >> 1) & 3)
        return thread.shared["x"].load(step * (STEP_COLUMNS // 2) + thread.row8 * 16 + (turned << 2), 4)

    def _own_pair_words(self, step: Word) -> list[list[Word]]:
        """x of the blocks 2 row8 and 2 row8 + 1: words (v) of each."""
        thread, pairs = self.thread, []
        for odd in (0, 1):
            low = ((thread.row8 << 1) & 7) + odd
            turned = thread.column4 ^ (low >> 1)
            at = step * (STEP_COLUMNS // 2) + low * 16 + (turned << 2) + ((thread.row8 >> 2) << 1)
            pairs.append(thread.shared["x"].load(at, 2))
        return pairs

    # ---- 2 to 16 rows of x ------------------------------------------------------------------------------------------

    def _rows(
        self, codes: Codes, statistics: Statistics, scales: list[Pair], step: Word, totals: list[list[Float]]
    ) -> list[list[Float]]:
        group_blocks = BLOCKS // self.form.groups
        scale = _Broadcast(statistics, scales)
        for low in range(0, BLOCKS // 2, group_blocks):
            lows = range(low, low + group_blocks)
            # a load has the words of two blocks, low and low + 8: loaded where they are needed, few are held at a time
            x = [[operand_b(self.thread, step, t, i) for i in lows] for t in range(self.plan.tiles_b)]
            for high in (0, 1):
                by_row = [scale(low + 8 * high, h) for h in (0, 1)]
                blocks = [codes.block(i + 8 * high) for i in lows]
                for t in range(self.plan.tiles_b):
                    acc = zero_sum()
                    for a, words in zip(blocks, x[t], strict=True):
                        acc = machine.mma(a, words[high], acc)
                    totals[t] = [machine.fma(by_row[i >> 1], acc[i], totals[t][i]) for i in range(4)]
        return totals


class _Broadcast:
    """A group's scales (or other statistics) by row, from the lanes that have them."""

    def __init__(self, statistics: Statistics, pairs: list[Pair]) -> None:
        self._statistics, self._pairs = statistics, pairs
        self._received: dict[tuple[int, int, int], Pair] = {}

    def pair(self, block: int, h: int) -> tuple[Pair, int]:
        """(pair, half) of a block's group."""
        v, column, e = self._statistics.place(block)
        key = v, column, h
        if key not in self._received:
            self._received[key] = machine.from_lane(self._pairs[2 * v + h].word(), column, 4).pair()
        return self._received[key], e

    def __call__(self, block: int, h: int) -> Float:
        pair, e = self.pair(block, h)
        return pair[e]


def operand_b(thread: Thread, step: Word, tile_b: int, low: int) -> list[list[Word]]:
    """8 rows of x as operand B, for the blocks of columns `low` and `low` + 8 of a step."""
    plan = thread.plan
    places = activations.operand_places(thread.row8, thread.column4)
    at = step * (STEP_COLUMNS // 2 * plan.columns_b) + (16 * plan.columns_b * low + 128 * tile_b)
    words = thread.shared["x"].load(at + places[low & 1], 4)
    return [words[:2], words[2:]]


def _scaled(total: list[Float], acc: list[Float], scales: list[Pair]) -> list[Float]:
    """Adds a lane's own elements (rows h, columns e) times scales[h][e]."""
    return [machine.fma(scales[i >> 1][i & 1], acc[i], total[i]) for i in range(4)]


class Wide:
    """17 to 64 rows of x. The state: an accumulator for each 8 rows of x."""

    def __init__(self, thread: Thread, form: Format, chunk: Word | int, scattered: Scattered | None) -> None:
        self.thread, self.plan, self.form = thread, thread.plan, form
        self._chunk, self._scattered = chunk, scattered

    def start(self) -> list[list[Float]]:
        return [zero_sum() for _ in range(self.plan.tiles_b)]

    def finish(self, state: list[list[Float]]) -> State:
        return [v for acc in state for v in acc]

    def step(self, step: Word, words: list[Word], state: list[list[Float]]) -> list[list[Float]]:
        # Past the end the words are zeros, and so the weights; x must only be finite. There are no outliers.
        true_step, step = step, machine.minimum(step, self.plan.chunk - 1)
        codes, statistics = Codes(self.form, words), Statistics(self.form, words)
        scale = _Broadcast(statistics, statistics.scales)
        product = _Broadcast(statistics, statistics.products)
        state = list(state)
        if self._scattered is not None:
            self._scattered.begin(self._chunk, true_step)
        for low in range(8):
            pair = [self._weights(codes, scale, product, block) for block in (low, low + 8)]
            for t in range(self.plan.tiles_b):
                for weights, x in zip(pair, operand_b(self.thread, step, t, low), strict=True):
                    state[t] = machine.mma(weights, x, state[t])
        if self._scattered is not None:
            self._scattered.end(self._chunk, true_step)
        return state

    def _weights(self, codes: Codes, scale: _Broadcast, product: _Broadcast, block: int) -> list[Word]:
        """A block's weights as operand A: (code - zero point) * scale, rounded to float16, and outliers."""
        increase = machine.halves(2.0 ** activations.offset_exponent(self.form, block))
        by_row = []
        for h in (0, 1):
            (scales, e), (products, _) = scale.pair(block, h), product.pair(block, h)
            by_row.append((scales.both(e), products.both(e).negated()))
        weights = []
        for i, w in enumerate(codes.block(block)):  # words (v, h)
            weights.append(machine.fma_pair(w.pair() - increase, *by_row[i & 1]))
        if self._scattered is not None:
            weights = [w + s for w, s in zip(weights, self._scattered.block(block), strict=True)]
        return [w.word() for w in weights]
