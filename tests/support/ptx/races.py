"""Races of warps on shared memory: accesses of one place that no barrier puts in order.

Every warp of a cluster has a number. `seen[cluster, warp, other]` says up to which time (barriers of the
cluster count it) everything that `other` did happened before what `warp` does now. A place remembers the
last warp that wrote it, and the last that read it, with the time.
"""

from __future__ import annotations

import numpy as np

_IDS = 1024
_FOREVER = np.iinfo(np.int32).max


class Races:
    """Of the clusters that run together.

    Args:
      clusters, cluster: clusters, and blocks of each.
      warps: of a block.
      size: bytes of a block's shared memory.
      grain: bytes of the smallest access to it.
    """

    def __init__(self, clusters: int, cluster: int, warps: int, size: int, grain: int):
        self.grain, self._cluster, self._warps = grain, cluster, warps
        total = cluster * warps
        assert total + cluster + 1 <= _IDS
        # after the columns of warps: all warps of a block, by rank, and all of the cluster
        self._seen = np.ones((clusters, total, total + cluster + 1), np.int32)
        self._done = np.zeros((clusters, total), np.int32)  # as `_seen`, but for order in time only, of a whole cluster
        self._last = np.zeros((clusters, total), np.int32)  # time of each warp's last access
        self._time = np.ones(clusters, np.int32)
        self._many, self._all = total, total + cluster
        self._refresh(np.arange(clusters))
        self._size = size // grain
        places = clusters * cluster * self._size
        self._writer, self._reader = np.zeros(places, np.int32), np.zeros(places, np.int32)

    def _refresh(self, clusters: np.ndarray) -> None:
        warps = np.arange(self._many)
        seen = self._seen[clusters]
        seen[:, warps, warps] = _FOREVER
        for rank in range(self._cluster):
            at = slice(rank * self._warps, (rank + 1) * self._warps)
            seen[:, :, self._many + rank] = seen[:, :, at].min(axis=2)
        seen[:, :, self._all] = seen[:, :, : self._many].min(axis=2)
        self._seen[clusters] = seen

    # ---- barriers ----

    def arrive(self, cluster: int, warps: np.ndarray) -> np.ndarray:
        """What some warps (numbers in the cluster) publish as they arrive at a barrier."""
        published = self._seen[cluster, warps, : self._many].copy()
        published[np.arange(len(warps)), warps] = 0
        published = published.max(axis=0)
        self._time[cluster] += 1
        published[warps] = self._time[cluster]
        return published

    def arrive_relaxed(self, cluster: int, warps: np.ndarray) -> np.ndarray:
        """As :meth:`arrive`, of warps whose writes others need not see yet."""
        self._time[cluster] += 1
        reached = np.zeros(self._many, np.int32)
        reached[warps] = self._time[cluster]
        return reached

    def pass_cluster(self, cluster: int, reached: np.ndarray) -> None:
        """All warps of a cluster have arrived: what they read before, they have read."""
        self._done[cluster] = np.maximum(self._done[cluster], reached)

    def leave(self, cluster: int, warps: np.ndarray, published: np.ndarray) -> None:
        """Warps go on from a barrier: what was published there happened before."""
        # who has used nothing since is not in the way of what all of several warps are asked for
        published = np.where(self._last[cluster] < published, self._time[cluster], published)
        rows = self._seen[cluster, warps, : self._many]
        self._seen[cluster, warps, : self._many] = np.maximum(rows, published)
        self._refresh(np.asarray([cluster]))

    # ---- accesses ----

    def read(self, places: np.ndarray, size: int, warp: np.ndarray, owner: np.ndarray) -> bool:
        """Whether reads of `size` bytes at byte offsets `places` race with writes, by warps of all blocks.

        `warp` numbers warps over all blocks, `owner` are the blocks whose memory is read.
        """
        at, cluster, number, tag = self._begin(places, size, warp)
        if self._unordered(self._writer[at], cluster, number).any():
            return True
        old = self._reader[at]
        other = self._unordered(old, cluster, number)
        # read by several warps: all of them of the block, or of the cluster
        before, rank = old % _IDS, owner % self._cluster
        local = (before == self._many + rank) | (before // self._warps == rank)
        local &= warp // self._warps == owner
        many = tag - number + np.where(local, self._many + rank, self._all)
        new = np.where(other, many, np.broadcast_to(tag, at.shape))
        self._reader[at] = new
        lost = self._reader[at] != new
        if lost.any():  # by other warps in the same instruction
            winner = self._reader[at] % _IDS
            inside = (winner == self._many + rank) | (winner // self._warps == rank)
            inside &= warp // self._warps == owner
            many = tag - number + np.where(inside, self._many + rank, self._all)
            self._reader[at[lost]] = many[lost]
            self._reader[at[lost & ~inside]] = many[lost & ~inside]  # whatever another put there
        return False

    def write(self, places: np.ndarray, size: int, warp: np.ndarray) -> bool:
        """Whether writes race with reads or writes."""
        at, cluster, number, tag = self._begin(places, size, warp)
        if self._unordered(self._writer[at], cluster, number).any():
            return True
        if self._unordered(self._reader[at], cluster, number).any():
            return True
        self._writer[at] = tag
        return bool((self._writer[at] != tag).any())

    def used_by_others(self, block: int) -> bool:
        """Whether other blocks' accesses of a block's memory may happen after all of its warps have ended."""
        cluster, rank = divmod(block, self._cluster)
        at = slice(block * self._size, (block + 1) * self._size)
        seen = self._seen[cluster, rank * self._warps : (rank + 1) * self._warps].max(axis=0)
        done = np.full(len(seen), self._done[cluster].min())
        done[: self._many] = self._done[cluster]
        for tags, known in ((self._writer[at], seen), (self._reader[at], np.maximum(seen, done))):
            who = tags % _IDS
            other = np.where(who < self._many, who // self._warps != rank, who == self._all)
            if (other & (tags > 0) & (known[who] <= tags // _IDS)).any():
                return True
        return False

    def _begin(self, places: np.ndarray, size: int, warp: np.ndarray) -> tuple[np.ndarray, ...]:
        number = warp % self._many
        cluster = warp // self._many
        self._last[cluster, number] = self._time[cluster]
        at = places // self.grain + np.arange(max(size // self.grain, 1))[:, None]
        return at, cluster, number, self._time[cluster] * _IDS + number

    def _unordered(self, tags: np.ndarray, cluster: np.ndarray, number: np.ndarray) -> np.ndarray:
        """Whether the accesses that left `tags` (0: none) may happen at the same time as those of the warps."""
        return self._seen[cluster, number, tags % _IDS] <= tags // _IDS
