"""A lane's words of a step to codes as operand A of `mma`, scales, and scales times zero points."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from pallas_kernels import machine
from pallas_kernels.machine import Pair, Word
from pallas_kernels.spqr_matmul.formats import SPARE_POSITION, Format

_FLOAT16_MANTISSA = 10


class Codes:
    """The codes of a step as operand A, a block of 16 columns at a time.

    A masked field with an exponent above it is the float16 2^(10 - position) + code: one instruction for two codes.
    Without an exponent it is the subnormal float16 code * 2^(position - 24).
    """

    def __init__(self, form: Format, words: Sequence[Word], *, subnormal: bool = False) -> None:
        self.form, self.subnormal = form, subnormal
        self._planes = [list(words[4 * p : 4 * p + 4]) for p in range(form.width)]

    @functools.cache  # noqa: B019 - lives as long as one step is written
    def _shifted(self, plane: int, shift: int) -> list[Word]:
        return [w >> shift for w in self._planes[plane]]

    def _masked(self, w: Word, position: int) -> Word:
        mask = (((1 << self.form.width) - 1) << position) * 0x10001
        exponent = (25 - position << _FLOAT16_MANTISSA) * 0x10001
        return w & mask if self.subnormal else machine.and_or(w, mask, exponent)

    def _spare(self) -> list[Word]:
        """Block 15 at 3 bits: the spare bits of three planes, side by side once these are shifted."""
        shifts = [
            next(f.shift for f in map(self.form.field, range(5 * p, 5 * p + 5)) if f and f.shift) for p in range(3)
        ]
        planes = [self._shifted(p, shift) for p, shift in enumerate(shifts)]
        bit = [(1 << SPARE_POSITION + i) * 0x10001 for i in range(3)]
        return [machine.merge(bit[0] | bit[1], machine.merge(bit[0], a, b), c) for a, b, c in zip(*planes, strict=True)]

    def block(self, block: int) -> list[Word]:
        """A block's codes: four words (h, v), h + 2 v, of two float16 each."""
        field = self.form.field(block)
        if field is None:
            return [self._masked(w, SPARE_POSITION) for w in self._spare()]
        return [self._masked(w, field.position) for w in self._shifted(field.plane, field.shift)]


class Statistics:
    """Scales, and scales times zero points, of the groups that a lane has.

    Attributes:
      scales, products: pairs (halves e). 16 groups: [2 v + h], group 8 v + 2 c + e; 8 groups: [h], group 2 c + e.
        So they are operand A of the product with the sums of x.
    """

    def __init__(self, form: Format, words: Sequence[Word]) -> None:
        words = words[4 * form.width :]
        self.form = form
        count = 4 if form.groups == 16 else 2
        if form.statistics == "nibbles":
            self.scales, self.products = _from_nibbles(form, words)
        else:
            self.scales = [w.pair() for w in words[:count]]
            zeros = [w.pair() for w in words[count : 2 * count]]
            self.products = [s * z for s, z in zip(self.scales, zeros, strict=True)]

    def place(self, block: int) -> tuple[int, int, int]:
        """(v, column c of the lane, half e) of the group of a block of columns."""
        group = block * self.form.groups // 16
        return group >> 3, group >> 1 & 3, group & 1


def _from_nibbles(form: Format, words: Sequence[Word]) -> tuple[list[Pair], list[Pair]]:
    scales, products = [], []
    offsets = machine.halves(1024.0), machine.halves(64.0)
    codes, levels = (words[:2], words[2:]) if form.groups == 16 else (words[:1], words[1:])
    for v in range(form.groups // 8):
        scale_unit, scale_zero, zero_unit, zero_zero = (w.pair() for w in levels[4 * v : 4 * v + 4])
        for h in (0, 1):
            w = codes[h] >> 8 * v if form.groups == 16 else codes[0] >> 8 * h
            scale_code = machine.and_or(w, 0x000F000F, 0x64006400).pair() - offsets[0]
            zero_code = machine.and_or(w, 0x00F000F0, 0x54005400).pair() - offsets[1]
            scales.append(scale_unit * (scale_code - scale_zero))
            products.append(scales[-1] * (zero_unit * (zero_code - zero_zero)))
    return scales, products
