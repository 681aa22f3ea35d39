"""x to shared memory as operand B of `mma`, in float16, and the sums of its blocks of 16 columns.

Each row of x is divided by a power of two above its largest magnitude (of the thread block's part of the columns), so
that neither x nor a sum overflows float16. The last phase multiplies by it again.

In shared memory x is [step][block & 7][row][c][block >> 3][v], words of two columns e: a 128-bit load gives a lane its
words of two blocks. Rows and fours of words change places (`_swizzled`), so that neither these loads nor the stores nor
the outliers' reads meet in few banks. `_store_sums` describes the sums.
"""

from __future__ import annotations

from pallas_kernels import machine
from pallas_kernels.machine import Bool, Float, Pair, Word
from pallas_kernels.spqr_matmul.formats import BLOCK, BLOCKS, STEP_COLUMNS, Format
from pallas_kernels.spqr_matmul.mosaic.plan import Plan
from pallas_kernels.spqr_matmul.mosaic.thread import Thread

_EXPONENT = 0xFF << 23
_ONE = 1 << 23  # of a float32's exponent
_LEAST, _MOST = 2 * _ONE, 253 * _ONE  # the power and its inverse are normal numbers
_AHEAD = 8  # loads under way while a row's largest magnitude is looked for


def store_powers(thread: Thread) -> None:
    """The power of two above each row's magnitudes, to shared memory. Ends with a barrier."""
    plan = thread.plan
    a_row = plan.warps_a_row
    first, place = thread.warp // a_row, thread.warp % a_row

    def row_part(row: Word) -> None:
        largest = machine.warp_maximum(_largest_of_part(thread, row, place))

        def store() -> None:
            thread.shared["largest"].store(row * a_row + place, [largest])

        machine.if_(thread.lane.equals(0), store)

    machine.for_each(first, plan.n, plan.config.warps // a_row, row_part)
    machine.barrier()

    def of_row() -> None:
        largest = machine.word(0)
        for i in range(a_row):
            largest = machine.maximum(largest, thread.shared["largest"].load(thread.index * a_row + i)[0])
        power = machine.minimum(machine.maximum((largest & _EXPONENT) + _ONE, _LEAST), _MOST)
        thread.shared["powers"].store(thread.index, [power])

    machine.if_(thread.index < plan.n, of_row)
    machine.barrier()


def _largest_of_part(thread: Thread, row: Word, place: Word) -> Word:
    """The largest magnitude, as bits, that a lane sees of every `warps_a_row`-th step of a row."""
    plan = thread.plan
    loads_a_step = plan.x_bytes // 2  # of 512 bytes for a warp
    count = -(-plan.part // plan.warps_a_row) * loads_a_step
    row_at = thread.address["x"].times(row, plan.columns * plan.x_bytes)
    end = plan.columns * plan.x_bytes // 16
    whole_rows = plan.whole and plan.part % plan.warps_a_row == 0

    def one(i: Word | int, largest: Word) -> Word:
        turn, half = (i // loads_a_step, i % loads_a_step)
        step = place + turn * plan.warps_a_row
        at = ((thread.first_step + step) * loads_a_step + half) * 32 + thread.lane
        inside = None if whole_rows else (at < end) & (step < plan.part)
        return _larger(largest, machine.load(row_at.at(at, 16), 4, when=inside, policy=_x_policy(thread)), plan)

    def batch(i: Word, largest: Word) -> Word:
        for k in range(_AHEAD):
            largest = one(i + k, largest)
        return largest

    largest = machine.word(0)
    whole = count // _AHEAD * _AHEAD if count > 2 * _AHEAD else 0
    if whole:
        largest = machine.loop(0, whole, _AHEAD, largest, batch)
    for i in range(whole, count):
        largest = one(machine.word(i), largest)
    return largest if plan.x_bytes == 4 else machine.maximum(largest & 0xFFFF0000, largest << 16)


def _larger(largest: Word, words: list[Word], plan: Plan) -> Word:
    for w in words:
        if plan.x_bytes == 4:
            largest = machine.maximum(largest, w & 0x7FFFFFFF)
        else:
            largest = machine.larger_bfloat16(largest, w & 0x7FFF7FFF)
    return largest


def _x_policy(thread: Thread) -> str:
    return thread.policy(machine.CONSTANT)


def store_chunk(thread: Thread, chunk: Word | int) -> None:
    """x and its sums for a chunk of steps, to shared memory. A thread has a block of columns and a row at a time."""
    plan = thread.plan
    items = plan.chunk * BLOCKS * plan.n
    first = thread.chunk_first(chunk) * BLOCKS

    def item(i: Word) -> None:
        # neighbouring lanes have neighbouring blocks of a row: groups of 32 columns add up over the two
        row = (i >> 1) % plan.n
        block = ((i >> 1) // plan.n) * 2 + (i & 1)
        pairs = _load(thread, row, first + block, i < items)
        sums = _sums(plan, block & 15, pairs)

        def put() -> None:
            _store(thread, row, block, pairs)
            _store_sums(thread, row, block, sums)

        machine.if_(i < items, put) if items % 32 else put()

    machine.for_each(thread.index, -(-items // 32) * 32, plan.threads, item)


def _load(thread: Thread, row: Word, block: Word, inside: Bool) -> list[Pair]:
    """16 columns of a row, divided by the row's power of two, as pairs [v][c]; zeros past the last column."""
    plan = thread.plan
    always = plan.whole and plan.chunk * BLOCKS * plan.n % 32 == 0
    there = None if always else (block < plan.columns // BLOCK) & inside
    at = thread.address["x"].times(row, plan.columns * plan.x_bytes).at(block, BLOCK * plan.x_bytes)
    words = [
        w for i in range(plan.x_bytes) for w in machine.load(at, 4, when=there, offset=16 * i, policy=_x_policy(thread))
    ]
    if plan.x_bytes == 4:
        floats = [w.float() for w in words]
    else:
        floats = [half.float() for w in words for half in (w << 16, w & 0xFFFF0000)]
    inverse = (254 * _ONE - thread.power(row)).float()
    scaled = [v * inverse for v in floats]
    return [machine.as_pair(*scaled[i : i + 2]) for i in range(0, BLOCK, 2)]


def _swizzled(plan: Plan, row: Word, inside: Word) -> tuple[Word, Word]:
    """Where a row stands among the rows of a block's columns, and what is XOR-ed to a lane's column c there."""
    if plan.n == 1:
        return row, (inside >> 1) & 3
    return row ^ (inside & 1), (row >> 1) & 3


def _store(thread: Thread, row: Word, block: Word, pairs: list[Pair]) -> None:
    plan = thread.plan
    step, low, high = block >> 4, block & 7, (block >> 3) & 1
    at_row, turned = _swizzled(plan, row, low)
    start = ((step * 8 + low) * plan.columns_b + at_row) * 16 + high * 2
    for c in range(4):
        thread.shared["x"].store(start + ((turned ^ c) << 2), [pairs[c].word(), pairs[4 + c].word()])


def operand_places(row8: Word, column4: Word) -> list[Word]:
    """Where a lane's words of even and odd blocks are, from [step][block & 7] on; 8 rows of x further is 128 more."""
    return [((row8 ^ odd) << 4) + ((column4 ^ ((row8 >> 1) & 3)) << 2) for odd in (0, 1)]


def half_place(plan: Plan, place: Word, row: int) -> Word:
    """Where an outlier's column of a row of x is, in half-words, by the outlier's place in the chunk."""
    if plan.n == 1:
        return place ^ ((place >> 3) & 0x18)
    turned = (place & 63) ^ (32 * (row & 1) | (row >> 1 & 3) << 3)
    return (place & 0xFFFFFFE0) * plan.columns_b + turned + 32 * (row & ~1)


# ---- sums -----------------------------------------------------------------------------------------------------------


def offset_exponent(form: Format, block: int) -> int:
    """log2 of what a code is increased by, when an exponent is set above its place in a float16."""
    return 10 - form.position(block)


def _sums(plan: Plan, inside: Word, pairs: list[Pair]) -> dict[tuple[int, int], tuple[Float, Float]]:
    """For each (groups, width): the sum of the group's columns, and the sum of x times its block's offset of codes.

    What is added up is what `mma` will get, rounded: the offsets are up to 1024 times as large as a code, and an
    error of x would not cancel.
    """
    if not plan.sums_keys:
        return {}
    plain, sums = machine.tree_sum([pair[e] for pair in pairs for e in (0, 1)]), {}
    for key in plan.sums_keys:
        form = next(f for f in plan.formats if (f.groups, f.width) == key)
        nibbles = [sum(offset_exponent(form, 8 * half + i) << 4 * i for i in range(8)) for half in (0, 1)]
        exponent = (machine.select(inside < 8, nibbles[0], nibbles[1]) >> ((inside & 7) << 2)) & 15
        weighted = plain * ((exponent + 127) << 23).float()
        if form.groups == 8:
            pair = [v + machine.from_xor_lane(v.word(), 1).float() for v in (plain, weighted)]
            sums[key] = (pair[0], pair[1])
        else:
            sums[key] = (plain, weighted)
    return sums


def _store_sums(thread: Thread, row: Word, block: Word, sums: dict[tuple[int, int], tuple[Float, Float]]) -> None:
    """Sums as two float16 each, high and low part.

    16 groups: [step][high, low][row][c][plain, weighted][v], halves e, for group 8 v + 2 c + e.
    8 groups: [step][high, low][row][c][plain, weighted], halves e, for group 2 c + e.
    """
    plan, step, inside = thread.plan, block >> 4, block & 15
    for key, pair in sums.items():
        groups = key[0]
        group = inside if groups == 16 else inside >> 1
        c, e, v = (group >> 1) & 3, group & 1, (group >> 3) if groups == 16 else machine.word(0)
        for kind, value in enumerate(pair):
            high = machine.as_pair(value, value)[0]
            for part, half in enumerate((high, value - high)):
                at = ((step * 2 + part) * plan.columns_b + row) * groups + c * (groups // 4)
                word = at + kind * (groups // 8) + v
                thread.shared[f"sums {key}"].store_half(word * 2 + e, half)


def sums_words(thread: Thread, groups: int, width: int, step: Word, part: int, tile_b: int) -> list[Word]:
    """A lane's words of 8 rows' sums, as operand B: plain, then weighted.

    With one row of x, its high parts are in column 0, low parts in column 1; the other columns are of no use.
    """
    plan = thread.plan
    shared, words = thread.shared[f"sums {(groups, width)}"], groups // 4
    start = step * plan.sums_words(groups)
    if plan.n == 1:
        return shared.load(start + (thread.row8 & 1) * groups + thread.column4 * words, words)
    row = thread.row8 + 8 * tile_b
    return shared.load(start + (row + part * plan.columns_b) * groups + thread.column4 * words, words)


def chunk_columns(plan: Plan) -> int:
    """Columns of a chunk."""
    return plan.chunk * STEP_COLUMNS
