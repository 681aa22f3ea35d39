"""What a run costs: instructions by opcode, warp and phase; wavefronts of shared memory; sectors of device memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

BANKS = 32
SECTOR = 32  # bytes


@dataclasses.dataclass(frozen=True)
class Costs:
    """Of a whole launch. A phase of a warp ends where it passes a barrier of its block or cluster.

    Attributes:
      instructions: opcode as in the PTX -> int64 [phases, warps of the grid], instructions that a warp issued.
      wavefronts: int64 [phases, blocks], passes that shared memory needed.
      least_wavefronts: the same without bank conflicts.
      lines: text of an instruction on shared memory -> (wavefronts, least wavefronts), of all blocks.
      sectors: opcode of an access to device memory -> 32-byte sectors that warps asked for.
      least_sectors: the same if what a warp asks for stood side by side.
    """

    instructions: dict[str, np.ndarray]
    wavefronts: np.ndarray
    least_wavefronts: np.ndarray
    lines: dict[str, tuple[int, int]]
    sectors: dict[str, int]
    least_sectors: dict[str, int]

    @property
    def issued(self) -> int:
        """Instructions of all warps."""
        return sum(int(counts.sum()) for counts in self.instructions.values())

    def by_phase(self, prefix: str = "") -> np.ndarray:
        """int64 [phases, warps]: instructions whose opcode begins so."""
        matching = [counts for opcode, counts in self.instructions.items() if opcode.startswith(prefix)]
        return np.sum(matching, axis=0) if matching else np.zeros((1, 1), np.int64)

    @property
    def conflicts(self) -> int:
        """Wavefronts of shared memory above the least."""
        return int(self.wavefronts.sum() - self.least_wavefronts.sum())

    def worst_lines(self, count: int = 5) -> list[tuple[str, int, int]]:
        """Instructions with the most conflicts: text, wavefronts, least wavefronts."""
        lines = sorted(self.lines.items(), key=lambda item: item[1][1] - item[1][0])
        return [(text, *numbers) for text, numbers in lines[:count]]


class Counter:
    """Counts while blocks run together."""

    def __init__(self, texts: Sequence[str], opcodes: Sequence[str], warps: int, blocks: int):
        self._texts, self._names = texts, list(dict.fromkeys(opcodes))
        numbers = {name: i for i, name in enumerate(self._names)}
        self._numbers = np.array([numbers[opcode] for opcode in opcodes])
        self._warps = warps
        self.phase = np.zeros(warps, np.int64)
        self._issued = np.zeros((8, len(self._names), warps), np.int64)
        self._waves = np.zeros((8, 2, blocks), np.int64)
        self._lines: dict[str, np.ndarray] = {}
        self._sectors: dict[str, np.ndarray] = {}

    def issue(self, first: int, end: int, warps: np.ndarray) -> None:
        """Warps issued the instructions from `first` up to `end`."""
        counts = np.bincount(self._numbers[first:end], minlength=len(self._names))
        phases = self.phase[warps]
        for phase in np.unique(phases):
            self._issued[phase][:, warps[phases == phase]] += counts[:, None]

    def pass_barrier(self, warps: np.ndarray) -> None:
        """Warps go on from a barrier."""
        self.phase[warps] += 1
        while self.phase.max() >= len(self._issued):
            self._issued = np.concatenate([self._issued, np.zeros_like(self._issued)])
            self._waves = np.concatenate([self._waves, np.zeros_like(self._waves)])

    def shared(self, text: str, threads: np.ndarray, places: np.ndarray, size: int) -> None:
        """An access of `size` bytes by each of `threads` (ascending) at byte offsets `places`.

        Threads of a warp go together as far as 128 bytes allow; of each such group the fullest bank counts.
        """
        together = max(128 // max(size, 4), 1)
        words = places[:, None] // 4 + np.arange(max(size // 4, 1))
        group = np.repeat(threads // together, words.shape[1])
        key = np.unique(group * (1 << 36) + words.reshape(-1))  # a word that several threads read counts once
        groups, banks = key >> 36, key % BANKS
        first = np.flatnonzero(np.r_[True, groups[1:] != groups[:-1]])
        number = np.cumsum(np.r_[False, groups[1:] != groups[:-1]])
        fullest = np.bincount(number * BANKS + banks, minlength=len(first) * BANKS).reshape(-1, BANKS).max(axis=1)
        warps = groups[first] * together // 32
        blocks = warps * self._waves.shape[2] // self._warps
        phases = self.phase[warps]
        np.add.at(self._waves, (phases, 0, blocks), fullest)
        np.add.at(self._waves, (phases, 1, blocks), 1)
        line = self._lines.setdefault(text, np.zeros(2, np.int64))
        line += (fullest.sum(), len(first))

    def device(self, opcode: str, threads: np.ndarray, places: np.ndarray, size: int) -> None:
        """An access to device memory, as :meth:`shared`."""
        key = np.unique(threads // 32 * (1 << 36) + places)
        sectors = len(np.unique(key // SECTOR))
        _, distinct = np.unique(key >> 36, return_counts=True)
        least = (-(-distinct * size // SECTOR)).sum()
        count = self._sectors.setdefault(opcode, np.zeros(2, np.int64))
        count += (sectors, least)

    def result(self) -> Costs:
        """The counts."""
        phases = int(self.phase.max()) + 1
        return Costs(
            {name: self._issued[:phases, i] for i, name in enumerate(self._names)},
            self._waves[:phases, 0],
            self._waves[:phases, 1],
            {text: (int(a), int(b)) for text, (a, b) in self._lines.items()},
            {opcode: int(a) for opcode, (a, _) in self._sectors.items()},
            {opcode: int(b) for opcode, (_, b) in self._sectors.items()},
        )


def joined(parts: Sequence[Costs]) -> Costs:
    """The costs of blocks that ran one after the other."""
    phases = max(part.wavefronts.shape[0] for part in parts)

    def side_by_side(arrays: list[np.ndarray]) -> np.ndarray:
        return np.concatenate([np.pad(a, ((0, phases - len(a)), (0, 0))) for a in arrays], axis=1)

    def total(dictionaries: list[dict[str, int]]) -> dict[str, int]:
        keys = dict.fromkeys(key for part in dictionaries for key in part)
        return {key: sum(part.get(key, 0) for part in dictionaries) for key in keys}

    lines = dict.fromkeys(text for part in parts for text in part.lines)
    both = {text: [part.lines.get(text, (0, 0)) for part in parts] for text in lines}
    return Costs(
        {name: side_by_side([part.instructions[name] for part in parts]) for name in parts[0].instructions},
        side_by_side([part.wavefronts for part in parts]),
        side_by_side([part.least_wavefronts for part in parts]),
        {text: (sum(a for a, _ in pairs), sum(b for _, b in pairs)) for text, pairs in both.items()},
        total([part.sectors for part in parts]),
        total([part.least_sectors for part in parts]),
    )
