"""`Format`: how the "fragments" layout holds 16 rows x 256 columns, one *step*, in int32 words.

A format has two parts: the planes of the codes, and the statistics. Every size is a
multiple of 16 words (64 bytes, a *unit*), so every part of a step can be read 16 bytes a
lane at a time. `fragments` gives the position of each field.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

STEP_COLUMNS = 256
"""Columns of a step."""

BLOCK = 16
"""Columns of a block; a step has 16 blocks."""

BLOCKS = STEP_COLUMNS // BLOCK
TILE = 16
"""Rows of a tile, and so of a step."""

UNIT = 16
"""Words of a unit, in which offsets are counted."""

PLANE_WORDS = 128
"""Words of one plane of codes: 32 lanes of 4."""

WIDTHS = (2, 3, 4, 8)
"""Bits that a code may take in the words."""

MAX_BITS = 8
"""Bits of a code at most."""

STATISTICS_BITS = 4
"""Bits of a scale or zero code that `nibbles` hold."""

Statistics = Literal["nibbles", "halves"]


@dataclasses.dataclass(frozen=True)
class Field:
    """Where one block's codes are, in each 16-bit half of a plane's words.

    Attributes:
      plane: of the words that hold the field.
      bit: the field's lowest bit in the half, as stored.
      shift: right shift that brings the field into a float16's mantissa; 0 where it is there already.
        All shifted fields of a plane have the same shift.
      position: the lowest bit after the shift, `bit - shift`. A code masked there reads, as a
        subnormal float16, as code * 2^(position - 24).
    """

    plane: int
    bit: int
    shift: int

    @property
    def position(self) -> int:
        return self.bit - self.shift


@dataclasses.dataclass(frozen=True, order=True)
class Format:
    """The words of a step.

    Attributes:
      width: bits of a code as held, one of `WIDTHS`.
      groups: groups of statistics a step: 16 (of 16 columns) or 8 (of 32 columns). A larger
        group of the matrix has its statistics repeated.
      statistics: `nibbles`: scale and zero codes of 4 bits with a second level, four float16
        of a tile and group. `halves`: float16 scale and zero point of each row and group.
    """

    width: int
    groups: int
    statistics: Statistics

    @property
    def code_words(self) -> int:
        """Words of a step's codes; its statistics follow."""
        return PLANE_WORDS * self.width

    @property
    def statistics_words(self) -> int:
        """Words of a step's statistics, second level included."""
        return self.groups * (6 if self.statistics == "nibbles" else 16)

    @property
    def step_words(self) -> int:
        """Words of a step."""
        return self.code_words + self.statistics_words

    @property
    def fields_per_plane(self) -> int:
        """Whole fields in a 16-bit half-word, 8, 5, 4 or 2."""
        return 16 // self.width

    @property
    def group_columns(self) -> int:
        """Columns that share statistics in the words, 16 or 32."""
        return STEP_COLUMNS // self.groups

    def field(self, block: int) -> Field | None:
        """Where a block's codes are; None for block 15 at 3 bits.

        At 3 bits the half-words of three planes have bit 15 to spare. Bit p of block 15's code is
        bit 15 of plane p. Shifted as their plane's other fields are, the three bits lie side by
        side, at position 6.
        """
        plane, slot = divmod(block, self.fields_per_plane)
        if plane == self.width:
            return None
        bit = self.width * slot
        if self.width == 3:
            return Field(plane, bit, 9 - plane if slot >= 3 else 0)
        return Field(plane, bit, 8 if bit >= 8 else 0)

    def position(self, block: int) -> int:
        """The lowest bit of a block's field after its shift: 0 to 6."""
        field = self.field(block)
        return SPARE_POSITION if field is None else field.position


SPARE_BIT, SPARE_POSITION = 15, 6
"""At 3 bits, the bit that holds one bit of block 15's code in each plane; where that code is after the shifts."""


def format_of(bits: int, group_size: int, *, second_level: bool) -> Format:
    """The format that holds a matrix.

    Args:
      bits: of a code, 1 to 8.
      group_size: columns that share a scale, a multiple of 16.
      second_level: whether scale and zero are codes of up to 4 bits with four float16 for each
        tile of 16 rows and group; otherwise they are float16.
    """
    width = next(width for width in WIDTHS if bits <= width)
    return Format(width, 8 if group_size % 32 == 0 else 16, "nibbles" if second_level else "halves")
