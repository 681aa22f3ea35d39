"""A job's state and results where several processes do the job: the first one has them, the others ask it.

All processes run the same job, so that they take part in the same computations. Only the first one reads and writes
files. The others put nothing; what they get, they get from the first one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from spqr_jax.job.kept import Store
from spqr_jax.job.state import StateKeeper
from spqr_jax.models.decoder import Block, Outer
from spqr_jax.stream.hosts import Together


class SharedState:
    """A `StateKeeper` for each of the processes.

    Args:
      together: the processes.
      journal: keeps the state; None in all processes but the first.
    """

    def __init__(self, together: Together, journal: StateKeeper | None) -> None:
        self._together, self._journal = together, journal
        self.state: dict[str, Any] | None = together.from_first(lambda: self._here.state)

    @property
    def _here(self) -> StateKeeper:
        assert self._journal is not None
        return self._journal

    def put(self, arrays: Mapping[str, np.ndarray]) -> str:
        return "" if self._journal is None else self._journal.put(arrays)

    def get(self, digest: str) -> dict[str, np.ndarray]:
        return self._together.from_first(lambda: self._here.get(digest))

    def commit(self, state: dict[str, Any]) -> None:
        if self._journal is not None:
            self._journal.commit(state)


class SharedStore:
    """A `Store` for each of the processes.

    Args:
      together: the processes.
      store: takes and gives the parts; None in all processes but the first.
    """

    def __init__(self, together: Together, store: Store | None) -> None:
        self._together, self._store = together, store

    @property
    def _here(self) -> Store:
        assert self._store is not None
        return self._store

    @property
    def config(self) -> Any:
        return self._here.config

    def put_outer(self, outer: Outer) -> None:
        if self._store is not None:
            self._store.put_outer(outer)

    def put_block(self, index: int, block: Block) -> None:
        if self._store is not None:
            self._store.put_block(index, block)

    def record(self, path: str, stats: dict[str, float]) -> None:
        if self._store is not None:
            self._store.record(path, stats)

    def describe(self, quantization: Any) -> None:
        if self._store is not None:
            self._store.describe(quantization)

    def outer(self) -> Outer:
        return self._together.from_first(lambda: self._here.outer())

    def block(self, index: int) -> Block:
        return self._together.from_first(lambda: self._here.block(index))

    def digests(self) -> dict[str, str]:
        return {} if self._store is None else self._store.digests()

    def adopt(self, digests: Mapping[Any, str]) -> None:
        self._together.from_first(lambda: self._here.adopt(digests))
