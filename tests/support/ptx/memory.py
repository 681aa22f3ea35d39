"""Device memory, where every buffer has bounds, and the shared memory of thread blocks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from support.ptx.parsing import PtxError

SHARED = 1 << 40  # where shared memory begins among generic addresses
WINDOW = 24  # bits of an address in a block's shared memory; above them: 0, the block's own, or 1 + rank in the cluster
RESERVED = 1024  # bytes at the beginning of shared memory that no program may use
_PAGE = 1 << 20  # between buffers' addresses
_FIRST = 1 << 20


class Global:
    """Buffers of device memory, each at an address of its own, far from the others."""

    def __init__(self, buffers: Sequence[np.ndarray]):
        self.lengths = [buffer.nbytes for buffer in buffers]
        self.starts: list[int] = []
        self._places: list[int] = []
        address, place = _FIRST, 0
        for length in self.lengths:
            self.starts.append(address)
            self._places.append(place)
            address += (length // _PAGE + 2) * _PAGE
            place += -(-length // 256) * 256
        self.raw = np.zeros(max(place, 16), np.uint8)
        for buffer, place in zip(buffers, self._places, strict=True):
            self.raw[place : place + buffer.nbytes] = np.ascontiguousarray(buffer).reshape(-1).view(np.uint8)
        self._first = np.asarray([*self.starts, 1 << 62])
        self.written = [False] * len(buffers)

    def buffer(self, index: int) -> np.ndarray:
        """The bytes of a buffer."""
        place = self._places[index]
        return self.raw[place : place + self.lengths[index]]

    def places(self, address: np.ndarray, size: int, what: str) -> tuple[np.ndarray, list[int]]:
        """Offsets in `raw` of accesses of `size` bytes, and the buffers that they are in.

        Raises:
          PtxError: one is outside of every buffer, or not aligned.
        """
        if (address & (size - 1)).any():
            raise PtxError(f"an address is not a multiple of {size}: {what}")
        low, high = int(address.min()), int(address.max())
        region = int(np.searchsorted(self._first, low, "right")) - 1
        if region >= 0 and low >= self.starts[region] and high + size <= self.starts[region] + self.lengths[region]:
            return address + (self._places[region] - self.starts[region]), [region]
        regions = np.searchsorted(self._first, address, "right") - 1
        used = [int(r) for r in np.unique(regions)]
        if used[0] < 0:
            raise PtxError(f"an access is outside every buffer: {what}")
        ends = np.asarray(self.starts) + np.asarray(self.lengths)
        if (address + size > ends[regions]).any():
            raise PtxError(f"an access is outside every buffer: {what}")
        return address + (np.asarray(self._places) - np.asarray(self.starts))[regions], used


class Shared:
    """Shared memory of the blocks that run together, filled with a pattern that no sound kernel's result survives."""

    def __init__(self, blocks: int, size: int, cluster: int):
        self.size = -(-(RESERVED + size) // 256) * 256
        self._end, self._cluster = RESERVED + size, cluster
        self.raw = np.full(blocks * self.size, 0xFF, np.uint8)

    def places(self, address: np.ndarray, block: np.ndarray, size: int, what: str) -> tuple[np.ndarray, np.ndarray]:
        """Offsets in `raw` of accesses of `size` bytes by threads of `block`s, and the blocks whose memory it is."""
        if (address & (size - 1)).any():
            raise PtxError(f"an address is not a multiple of {size}: {what}")
        rank = address >> WINDOW
        offset = address & ((1 << WINDOW) - 1)
        if (offset < RESERVED).any() or (offset + size > self._end).any():
            raise PtxError(f"an access is outside shared memory: {what}")
        if rank.any():
            if (rank < 0).any() or (rank > self._cluster).any():
                raise PtxError(f"an access is outside the cluster's shared memory: {what}")
            block = np.where(rank == 0, block, block // self._cluster * self._cluster + rank - 1)
        return offset + block * self.size, block


def gather(raw: np.ndarray, places: np.ndarray, dtype: np.dtype, count: int) -> np.ndarray:
    """[count, accesses] of what stands at byte offsets `places`, aligned to all `count` elements."""
    typed = raw.view(dtype)
    first = places // dtype.itemsize
    return np.stack([typed[first + i] for i in range(count)])


def scatter(raw: np.ndarray, places: np.ndarray, values: Sequence[np.ndarray]) -> None:
    """Puts `values` (one array for each element of an access) at byte offsets `places`."""
    typed = raw.view(values[0].dtype)
    first = places // values[0].dtype.itemsize
    for i, value in enumerate(values):
        typed[first + i] = value
