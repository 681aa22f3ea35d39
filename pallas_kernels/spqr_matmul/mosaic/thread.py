"""Where a thread stands: its warp and lane, its tile and steps, and where they are in memory."""

from __future__ import annotations

from typing import Any

from pallas_kernels import machine
from pallas_kernels.machine import Address, Bool, Shared, Word
from pallas_kernels.spqr_matmul.formats import TILE, UNIT
from pallas_kernels.spqr_matmul.mosaic.plan import Plan


class Thread:
    """What the phases share.

    Attributes:
      lane, warp, index: in the warp, in the block; of the thread in the block.
      row8, column4: the lane is 4 * row8 + column4, as `mma` has it.
      block: number of the thread block, or of its cluster.
      rank: in the cluster.
      first_step: of the thread block's part of the columns.
      end_step: one past the last step that the part has.
      first_tile: of the thread block.
      tile: of the warp, from the block's first; step: the warp's first, from the chunk's first.
      tile_count: tiles that this thread block has; uneven: whether some have one less.
      matrix: which of the stack.
      base: where the tile's words begin; format_index: into the plan's formats.
    """

    def __init__(self, plan: Plan, refs: dict[str, Any], shared: Any) -> None:
        config = plan.config
        self.plan = plan
        self.address = {name: Address.of(ref) for name, ref in refs.items()}
        self.shared = {name: Shared(shared, first) for name, (first, _) in plan.regions.items()}
        self.index = machine.thread_index()
        self.lane, self.warp = self.index & 31, self.index >> 5
        self.row8, self.column4 = self.lane >> 2, self.lane & 3
        number = machine.block_index()
        self.rank = number & (config.cluster - 1)
        self.block = number >> (config.cluster.bit_length() - 1)
        self.first_step = self.rank * plan.part
        self.end_step = machine.minimum(self.first_step + plan.part, plan.steps)
        least, more = divmod(plan.all_tiles, config.blocks)
        self.first_tile = self.block * least + (machine.minimum(self.block, more) if more else 0)
        self.tile_count = machine.select(self.block < more, least + 1, least) if more else machine.word(least)
        self.tile, self.step = self.warp % plan.tiles, self.warp // plan.tiles
        self.uneven = bool(more)
        self.some_idle = bool(more or config.warps % plan.tiles)
        if config.pdl:
            machine.wait_for_launch_before()
        [self.matrix] = machine.load(self.address["index"], policy=self.policy(machine.CONSTANT))
        self._find_tile()

    def policy(self, usual: str) -> str:
        """Of a load: where launches overlap, read-only loads could be moved before the wait."""
        return machine.PLAIN if self.plan.config.pdl else usual

    def _find_tile(self) -> None:
        plan = self.plan
        # A warp without a tile has no steps, but may look up the last tile's place.
        tile = machine.minimum(self.first_tile + self.tile, plan.all_tiles - 1)
        tile = self.matrix * plan.all_tiles + tile
        if plan.mixed:
            span = self.address["spans"].at(tile, 8)
            offset, self.format_index = machine.load(span, 2, policy=self.policy(machine.CONSTANT))
            self.base = self.address["words"].at(offset, 4 * UNIT)
            return
        self.format_index = machine.word(0)
        self.base = self.address["words"].times(tile, 4 * plan.steps * plan.formats[0].step_words)

    @property
    def has_work(self) -> Bool:
        """Whether the warp has a tile to do, or a part of it."""
        return (self.tile < self.tile_count) & (self.step < self.plan.split)

    def steps_of_chunk(self, chunk: Word | int) -> Word:
        """Steps of a chunk that are in the thread block's part of the columns."""
        first = self.chunk_first(chunk)
        left = machine.select(first < self.end_step, self.end_step - first, 0)
        return machine.minimum(left, self.plan.chunk)

    def end_of_chunk(self, chunk: Word | int) -> Word:
        """One past the last step of a chunk that this warp may do, from the chunk's first; 0 without a tile."""
        end = self.steps_of_chunk(chunk)
        return machine.select(self.has_work, end, 0) if self.some_idle else end

    def chunk_first(self, chunk: Word | int) -> Word:
        """A chunk's first step, of the whole W."""
        return self.first_step + chunk * self.plan.chunk

    @property
    def first_row(self) -> Word:
        """The thread block's first row of W."""
        return self.first_tile * TILE

    def power(self, row: Word | int) -> Word:
        """The power of two above all magnitudes of a row of x, as a float32's bits."""
        return self.shared["powers"].load(row)[0]
