"""The end: sums over the warps of a tile, and over the thread blocks of a cluster; powers of two back; the output."""

from __future__ import annotations

from pallas_kernels import machine
from pallas_kernels.machine import Float, Word
from pallas_kernels.spqr_matmul.formats import TILE
from pallas_kernels.spqr_matmul.mosaic.thread import Thread


def store_parts(thread: Thread, state: list[Float]) -> None:
    """A warp's accumulators to shared memory, [warp][row][row of x]."""
    plan = thread.plan
    start = thread.warp * (TILE * plan.part_columns)
    parts = thread.shared["parts"]
    if plan.n == 1:  # the columns of mma are parts of one sum
        for h in (0, 1):
            total = machine.warp_sum(state[2 * h] + state[2 * h + 1], 4).word()

            def put(h: int = h, total: Word = total) -> None:
                parts.store(start + thread.row8 + 8 * h, [total])

            machine.if_(thread.column4.equals(0), put)
        return
    for tile_b in range(plan.tiles_b):
        for h in (0, 1):
            at = start + (thread.row8 + 8 * h) * plan.part_columns + (thread.column4 << 1) + 8 * tile_b
            values = state[4 * tile_b + 2 * h : 4 * tile_b + 2 * h + 2]
            parts.store(at, [v.word() for v in values])


def finish(thread: Thread) -> None:
    """Sums over warps, and outliers, to the output; of a cluster, to shared memory and from there."""
    plan = thread.plan

    def output(i: Word) -> None:
        row, x_row = i // plan.n, i % plan.n
        place = row * plan.columns_b + x_row
        part, stride = row * plan.part_columns + x_row, plan.tiles * TILE * plan.part_columns
        # a row's tile is shared by the warps tile, tile + tiles, ...: their parts are tiles * 16 rows apart
        parts = [thread.shared["parts"].load(part + k * stride)[0].float() for k in range(plan.split)]
        total = machine.tree_sum(parts)
        if not plan.scattered:
            total = total + thread.shared["totals"].load(place)[0].float()
        total = total * thread.power(x_row).float()
        if plan.config.cluster > 1:
            thread.shared["totals"].store(place, [total.word()])
        else:
            _store(thread, row, x_row, total)

    machine.for_each(thread.index, TILE * plan.tiles * plan.n, plan.threads, output)
    if plan.config.cluster > 1:
        _finish_cluster(thread)


def _finish_cluster(thread: Thread) -> None:
    """Each thread block adds up and stores its share of the rows."""
    plan = thread.plan
    share = TILE * plan.tiles // plan.config.cluster
    machine.cluster_barrier()

    def output(i: Word) -> None:
        row, x_row = i // plan.n + thread.rank * share, i % plan.n
        place = row * plan.columns_b + x_row
        totals = thread.shared["totals"]
        parts = [totals.load_from_cluster(rank, place).float() for rank in range(plan.config.cluster)]
        _store(thread, row, x_row, machine.tree_sum(parts))

    machine.for_each(thread.index, share * plan.n, plan.threads, output)
    machine.cluster_barrier(stores=False)  # no thread block ends while others read its shared memory


def _store(thread: Thread, row: Word, x_row: Word, value: Float) -> None:
    plan = thread.plan
    there = row < thread.tile_count * TILE if thread.uneven else None
    at = thread.address["out"].times(x_row, plan.rows * plan.out_bytes).at(thread.first_row + row, plan.out_bytes)
    if plan.out_bytes == 4:
        machine.store(at, [value.word()], when=there)
    else:
        machine.store_half(at, machine.as_bfloat16(value, value), when=there)
