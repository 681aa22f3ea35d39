"""How the work of one attention step is cut into thread blocks, warps and lanes. Plain integers, all static."""

from __future__ import annotations

import dataclasses

LOAD_BYTES = 16
"""Bytes that a lane loads at a time."""
_SUMS = 64  # float32 sums that a lane may hold: beside them stand the keys and values under way
_FEW_SUMS = 40  # with which a thread needs no more than 128 registers, so that a block may have 16 warps
_LOADS = 4  # of keys, and as many of values, that a lane has under way: 32 KB a block of 8 warps
_MAX_SUMS = 8  # more than 10 make XLA combine them by two launches instead of one
_MAX_CLUSTER = 4
_SPLIT_KEYS = 64  # a split of fewer keys is not worth a thread block
_SHARED_BYTES = 96 * 1024  # fits every GPU from compute capability 8.0 on


@dataclasses.dataclass(frozen=True)
class Plan:
    """A cut.

    A thread block reads the keys of one KV head, or a split of them, for `block_heads` query heads. In a warp,
    `lanes` lanes share a key: each loads `chunks` times 16 bytes of it.

    Attributes:
      splits: thread blocks that share the keys of one KV head.
      parts: thread blocks that share the query heads of one KV head; more than 1 reads the keys more than once.
      block_heads: query heads of a thread block.
      warps: of a thread block, a multiple of 4.
      lanes: that share a key, a power of two.
      chunks: of 16 bytes that a lane loads of a key.
      keys: that a lane has under way.
      cluster: splits whose thread blocks are a cluster, and add up before they write; divides splits.
    """

    splits: int
    parts: int
    block_heads: int
    warps: int
    lanes: int
    chunks: int
    keys: int
    cluster: int = 1

    @property
    def sums(self) -> int:
        """Sums of each query head that are written and then combined. With 1, the output itself is written."""
        return self.splits // self.cluster

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps

    @property
    def block_keys(self) -> int:
        """Keys that a block reads at a time."""
        return self.warps * (32 // self.lanes) * self.keys

    @property
    def under_way(self) -> int:
        """Bytes of keys and values that a block has under way at most."""
        return 2 * self.threads * self.keys * self.chunks * LOAD_BYTES


def choose_plan(
    batch: int, heads: int, kv_heads: int, head_dim: int, length: int, itemsize: int, cores: int, clusters: bool
) -> Plan:
    """A plan that keeps about all multiprocessors busy.

    Args:
      batch: texts.
      heads: query heads.
      kv_heads: heads of keys and values.
      head_dim: dimensions of a head.
      length: positions of the cache.
      itemsize: bytes of an element of the cache.
      cores: multiprocessors of the device.
      clusters: whether thread blocks can share their memory (compute capability 9.0 and up).
    """
    share = heads // kv_heads
    elements = LOAD_BYTES // itemsize
    pieces = head_dim // elements
    parts = -(-share // (_SUMS // (elements * _fewest_chunks(pieces))))
    block_heads = -(-share // parts)
    lanes, chunks = _cut_of_a_key(pieces, _SUMS // (elements * block_heads))
    blocks = batch * kv_heads * parts
    most = _MAX_SUMS * (_MAX_CLUSTER if clusters else 1)
    splits = max(1, min(cores // blocks, length // _SPLIT_KEYS, most))
    cluster = 1
    while splits > _MAX_SUMS * cluster:
        cluster *= 2
    splits -= splits % cluster
    sums = elements * chunks * block_heads
    warps = 16 if sums <= _FEW_SUMS else 8
    if blocks * splits > cores:  # a multiprocessor has several blocks at a time
        warps = 4
    while warps > 4 and 4 * warps * block_heads * chunks * lanes * elements > _SHARED_BYTES:
        warps //= 2
    return Plan(splits, parts, block_heads, warps, lanes, chunks, max(1, -(-_LOADS // chunks)), cluster)


def _fewest_chunks(pieces: int) -> int:
    return -(-pieces // 32)


def _cut_of_a_key(pieces: int, most: int) -> tuple[int, int]:
    """Lanes that share a key of so many pieces of 16 bytes, and pieces of a lane, at most `most` if that can be.

    Few idle lanes count first, then 8 lanes a key: 128 bytes in a row, and few shuffles to add up a score.
    """

    def cost(lanes: int) -> tuple[bool, float, int]:
        chunks = -(-pieces // lanes)
        return chunks > most, round(lanes * chunks / pieces, 2), abs(lanes.bit_length() - 4)

    lanes = min((2, 4, 8, 16, 32), key=cost)
    return lanes, -(-pieces // lanes)
