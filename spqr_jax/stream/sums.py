"""Sums over a long text that can be kept half done: a run that was stopped goes on from the chunk it had come to."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class SumsPlace:
    """Where the sums of a block's calibration are.

    Attributes:
      stage: of the block. Stages before it are done.
      part: of the stage, see `stage_parts`. Parts before it are done.
      chunks: number of chunks in each of the part's sums: first the Hessians, then the drifts. Empty before the first.
      arrays: leaves of these sums, on a device or NumPy's.
    """

    stage: int
    part: int
    chunks: tuple[int, ...] = ()
    arrays: tuple[Any, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)


KeepSums = Callable[[SumsPlace], None]
"""Is given each place that a run can go on from. The arrays are gone once it returns: it copies them or drops them."""


class PartSums:
    """The sums of one part of a stage, chunk after chunk.

    Args:
      stage, part: as `SumsPlace` has them.
      begin: a place to go on from; one in another part, or None, to begin anew.
      keep: is given the place after each chunk; None to keep nothing.
    """

    def __init__(self, stage: int, part: int, begin: SumsPlace | None = None, keep: KeepSums | None = None) -> None:
        self._stage, self._part, self._keep = stage, part, keep
        here = begin is not None and (begin.stage, begin.part) == (stage, part)
        self._begin = begin if begin is not None and here else SumsPlace(stage, part)
        self._chunks: tuple[int, ...] = ()
        self._arrays: tuple[Any, ...] = ()

    def total(self, empty: _T, count: int, add: Callable[[int, _T], _T]) -> _T:
        """One of the part's sums, over all chunks. To be called in the order of `SumsPlace.chunks`.

        Args:
          empty: the sum of no text, a tree of arrays.
          count: number of chunks.
          add: (chunk, sum) -> the sum with this chunk; may use up the arrays of the sum that it is given.
        """
        (sums, done), wait = self._begun(empty), _Wait()
        del empty
        for chunk in range(done, count):
            sums = add(chunk, sums)
            if self._keep is not None:
                wait(sums)
                self._keep(self._place(chunk + 1, sums))
        place = self._place(count, sums)
        self._chunks, self._arrays = place.chunks, place.arrays
        return sums

    def keep(self, is_last: bool) -> None:
        """Keeps the place after one of the part's Hessians was used; behind the last one the sums are not needed."""
        if self._keep is not None:
            part = SumsPlace(self._stage, self._part, self._chunks, self._arrays)
            self._keep(SumsPlace(self._stage, self._part + 1) if is_last else part)

    def _begun(self, empty: _T) -> tuple[_T, int]:
        """The sum to go on with, and the number of its chunks: a saved one if there is one."""
        sums, chunks = len(self._chunks), self._begin.chunks
        if sums >= len(chunks):
            return empty, 0
        leaves, tree = jax.tree.flatten(empty)
        saved = self._begin.arrays[len(self._arrays) :]
        begun: _T = jax.tree.unflatten(tree, [_placed(*pair) for pair in zip(saved, leaves, strict=False)])
        return begun, chunks[sums]

    def _place(self, chunks: int, sums: Any) -> SumsPlace:
        arrays = (*self._arrays, *jax.tree.leaves(sums))
        return SumsPlace(self._stage, self._part, (*self._chunks, chunks), arrays)


def _placed(saved: Any, like: jax.Array) -> jax.Array:
    """A saved array where another one of its shape lies."""
    return jax.device_put(saved, like.sharding) if like.committed else jnp.asarray(saved)


class _Wait:
    """Waits for the device about once a second, so that a clock knows how far it is.

    Programs are only asked for when they are called. Waiting after each of them would leave the device idle.
    """

    def __init__(self) -> None:
        self._calls, self._next, self._since = 0, 1, time.perf_counter()

    def __call__(self, arrays: Any) -> None:
        self._calls += 1
        if self._calls < self._next:
            return
        jax.block_until_ready(arrays)
        now = time.perf_counter()
        per_second = self._calls / max(now - self._since, 1e-3)
        self._calls, self._next, self._since = 0, max(1, min(int(per_second), 2 * self._next)), now
