"""A step's words, from device memory straight into a warp's registers."""

from __future__ import annotations

from pallas_kernels import machine
from pallas_kernels.machine import Address, Bool, Word
from pallas_kernels.spqr_matmul.formats import PLANE_WORDS, Format
from pallas_kernels.spqr_matmul.mosaic.thread import Thread


def register_count(form: Format) -> int:
    """Words of a step that one lane has."""
    statistics = {("nibbles", 16): 10, ("nibbles", 8): 5, ("halves", 16): 8, ("halves", 8): 4}
    return 4 * form.width + statistics[form.statistics, form.groups]


class Fetcher:
    """Loads steps of one tile in one format; a lane has 4 words of each plane, then its statistics."""

    def __init__(self, thread: Thread, form: Format) -> None:
        lane, column4 = thread.lane, thread.column4
        self.form = form
        self._policy = thread.policy(machine.STREAMED)
        self._codes = thread.base.at(lane, 16)
        statistics = thread.base.at(form.code_words)
        if form.statistics == "halves":
            self._statistics = [statistics.at(lane, 16)]
        elif form.groups == 16:
            self._statistics = [statistics.at(lane, 8), statistics.at(column4 * 8 + 64)]
        else:
            self._statistics = [statistics.at(lane), statistics.at(column4 * 4 + 32)]

    def __call__(self, step: Word, inside: Bool) -> list[Word]:
        """The words of a step, counted from the tile's first; zeros where not `inside`: no weights."""
        form = self.form
        offset = step * (4 * form.step_words)

        def load(address: Address, words: int, bytes_past: int = 0) -> list[Word]:
            return machine.load(address.at(offset, 1), words, when=inside, offset=bytes_past, policy=self._policy)

        words = [w for plane in range(form.width) for w in load(self._codes, 4, 4 * PLANE_WORDS * plane)]
        if form.statistics == "halves":
            words += load(self._statistics[0], 4)
            return words + (load(self._statistics[0], 4, 4 * PLANE_WORDS) if form.groups == 16 else [])
        if form.groups == 16:
            words += load(self._statistics[0], 2)
            return words + load(self._statistics[1], 4) + load(self._statistics[1], 4, 16)
        return words + load(self._statistics[0], 1) + load(self._statistics[1], 4)
