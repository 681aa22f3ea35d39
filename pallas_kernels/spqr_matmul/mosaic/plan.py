"""The static facts of a product in one launch: how it is cut, and what stands where in shared memory.

A thread block, or a cluster of them, has consecutive tiles of 16 rows of W. A cluster's thread blocks share these rows,
each with its part of the columns. A warp has a tile and every `split`-th step of 256 columns; warps of a tile add up
through shared memory. Where x does not fit into shared memory, a thread block goes through its steps in chunks.
"""

from __future__ import annotations

import dataclasses

from pallas_kernels.spqr_matmul.entries import quarter_steps
from pallas_kernels.spqr_matmul.formats import STEP_COLUMNS, TILE, Format
from pallas_kernels.spqr_matmul.fragments import num_steps

NARROW = 16
"""Rows of x up to which each group's sum is scaled; with more, the weights are."""

SCATTERED = 32
"""Rows of x up to which outliers are multiplied one by one; with more, they are added to the weights."""

MOST_SCATTERED_STEPS = 16
"""Steps of a chunk whose outliers' places fit into 16 bits."""

MAX_ROWS = 64
"""Rows of x at most."""


@dataclasses.dataclass(frozen=True)
class MosaicConfig:
    """How `mosaic_gpu` cuts the work.

    Attributes:
      blocks: thread blocks, or clusters of them, that share the tiles.
      warps: of a thread block, a multiple of 4, at least one for each of its tiles.
      cluster: thread blocks that share rows of W, each with its part of the columns: 1, 2, 4 or 8;
        more than 1 needs compute capability 9.0.
      depth: steps whose words a warp has under way, in registers.
      chunk: steps whose x is in shared memory at a time; 0 for all.
      early: outliers of a thread that are loaded ahead.
      subnormal: take masked codes as subnormal float16, one instruction less for some of them. Needs
        tensor cores that do not flush these to zero.
      pdl: programmatic dependent launch: the launch may begin before the one before it has ended.
    """

    blocks: int
    warps: int = 16
    cluster: int = 1
    depth: int = 2
    chunk: int = 0
    early: int = 4
    subnormal: bool = False
    pdl: bool = False


@dataclasses.dataclass(frozen=True)
class Plan:
    """One product.

    Attributes:
      n: rows of x, 1 to 64.
      rows: of W, a multiple of 16.
      columns: of x and W, a multiple of 16.
      formats: of W's steps; one unless the formats are mixed.
      mixed: whether each tile's place and format are read from `spans`.
      capacity: length of a matrix's `entries`.
      x_bytes: of an element of x: 2 (bfloat16) or 4 (float32).
      out_bytes: the same of the result.
    """

    n: int
    rows: int
    columns: int
    formats: tuple[Format, ...]
    mixed: bool
    capacity: int
    x_bytes: int
    out_bytes: int
    config: MosaicConfig

    @property
    def wide(self) -> bool:
        """Whether weights are scaled before they are multiplied, not the groups' sums after."""
        return self.n > NARROW

    @property
    def scattered(self) -> bool:
        """Whether outliers are added to the weights before they are multiplied."""
        return self.n > SCATTERED

    @property
    def all_tiles(self) -> int:
        return self.rows // TILE

    @property
    def tiles(self) -> int:
        """Tiles that a thread block has at most; the last few blocks may have one less."""
        return -(-self.all_tiles // self.config.blocks)

    @property
    def threads(self) -> int:
        return 32 * self.config.warps

    @property
    def split(self) -> int:
        """Warps that share a tile. What warps are left over have none."""
        return self.config.warps // self.tiles

    @property
    def steps(self) -> int:
        return num_steps(self.columns)

    @property
    def part(self) -> int:
        """Steps that a thread block has at most: whole quarters, or where 8 blocks share them, less."""
        quarters = 4 // self.config.cluster
        return (
            quarters * quarter_steps(self.steps)
            if 1 < self.config.cluster <= 4
            else -(-self.steps // self.config.cluster)
        )

    @property
    def chunk(self) -> int:
        """Steps of a chunk."""
        return min(self.config.chunk or self.part, self.part)

    @property
    def chunks(self) -> int:
        return -(-self.part // self.chunk)

    @property
    def whole(self) -> bool:
        """Whether all chunks of all thread blocks are full of columns."""
        return self.columns == self.config.cluster * self.chunks * self.chunk * STEP_COLUMNS

    @property
    def columns_b(self) -> int:
        """Rows of x with padding: columns of operand B."""
        if self.n == 1:
            return 1
        unit = 16 if self.n > 32 else 8
        return -(-self.n // unit) * unit

    @property
    def part_columns(self) -> int:
        """Words from one row of a warp's sums to the next: not all rows may begin in the same banks."""
        return self.columns_b + (8 if self.columns_b % 16 == 0 else 0)

    @property
    def tiles_b(self) -> int:
        """Products of one operand A: 8 rows of x each."""
        return -(-self.columns_b // 8)

    @property
    def sums_keys(self) -> tuple[tuple[int, int], ...]:
        """(groups, width) of the formats: each needs its sums of x."""
        return () if self.wide else tuple(sorted({(f.groups, f.width) for f in self.formats}))

    @property
    def warps_a_row(self) -> int:
        """Warps that look for a row's largest magnitude."""
        return max(1, self.config.warps // self.n)

    def sums_words(self, groups: int) -> int:
        """Words of a step's sums: high and low parts, plain and weighted, float16."""
        return 2 * self.columns_b * groups

    @property
    def regions(self) -> dict[str, tuple[int, int]]:
        """{name: (first word, words)} of shared memory."""
        kept = _side_by_side({"largest": self.n * self.warps_a_row, "powers": self.n}, 0)
        sizes = {"x": self.chunk * STEP_COLUMNS // 2 * self.columns_b}
        for key in self.sums_keys:
            sizes[f"sums {key}"] = self.chunk * self.sums_words(key[0])
        if self.scattered:
            sizes["scattered"] = self.config.warps * TILE * STEP_COLUMNS // 2
        at_end = {"parts": self.config.warps * TILE * self.part_columns}
        totals = {"totals": TILE * self.tiles * self.columns_b}
        (at_end if self.scattered else sizes).update(totals)
        regions = kept | _side_by_side(sizes, _end(kept))
        # with many rows of x, what the end needs is where x was
        return regions | _side_by_side(at_end, _end(kept) if self.wide else _end(regions))

    @property
    def shared_words(self) -> int:
        return _end(self.regions)

    @property
    def shared_bytes(self) -> int:
        return 4 * self.shared_words

    def why_impossible(self) -> str:
        """Why it cannot be cut so; empty if it can."""
        config = self.config
        if config.warps % 4 or not self.tiles <= config.warps <= 16:
            return f"{config.warps} warps for {self.tiles} tiles: they must be a multiple of 4, up to 16"
        if self.scattered and self.chunk > MOST_SCATTERED_STEPS:
            return f"chunks of {self.chunk} steps"
        if config.cluster not in (1, 2, 4, 8) or (TILE * self.tiles) % config.cluster:
            return f"clusters of {config.cluster}"
        if not 1 <= self.n <= MAX_ROWS or self.rows % TILE or self.columns % 16:
            return f"{self.n} rows of x, W of {self.rows} x {self.columns}"
        return ""


def _side_by_side(sizes: dict[str, int], first: int) -> dict[str, tuple[int, int]]:
    regions = {}
    for name, words in sizes.items():
        regions[name] = (first, words)
        first += -(-words // 32) * 32
    return regions


def _end(regions: dict[str, tuple[int, int]]) -> int:
    return max(-(-(first + words) // 32) * 32 for first, words in regions.values())
