"""Activations on disk: a list of chunk states that holds three of them in memory, whatever its length.

A state is a pytree of arrays. Its bytes are stored as they are, so a run with a spill has the same result as one
without. One thread reads the next state and writes the last; since it does one thing after the other, a state that
is read was written whole.
"""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from spqr_jax.errors import SpQRError
from spqr_jax.output import leftovers
from spqr_jax.output.space import free_bytes, readable_size, why_not


class Spill:
    """A folder for the activations of one run. A context manager; leaving it, or `close`, removes the folder.

    A run that is killed leaves the folder; the next run that writes to `beside` removes it.

    Args:
      beside: what the run writes, next to which the folder lies; None for the system's folder of temporary files.

    Raises:
      SpQRError: the folder cannot be made.
    """

    def __init__(self, beside: Path | None = None) -> None:
        try:
            if beside is None:
                folder = Path(tempfile.mkdtemp(prefix="spqr-activations-"))
            else:
                folder = leftovers.make_hidden(Path(beside).absolute(), leftovers.PARTIAL)
        except OSError as error:
            place = Path(tempfile.gettempdir()) if beside is None else Path(beside)
            raise SpQRError(f"cannot store activations beside {place}: {why_not(error, place)}") from None
        self.folder = folder
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="spqr-spill")
        self._names = itertools.count()
        self._finalizer = weakref.finalize(self, _end, self._worker, folder)

    def states(self) -> SpilledStates:
        """An empty list of states."""
        return SpilledStates(self)

    def need(self, num_bytes: float) -> None:
        """Refuses activations that there is no room for.

        Raises:
          SpQRError: fewer than `num_bytes` are free on the disk.
        """
        free = free_bytes(self.folder)
        if free is not None and num_bytes > free:
            raise SpQRError(
                f"the activations need {readable_size(num_bytes)} of disk space beside {self.folder}, but only "
                f"{readable_size(free)} are free: free some space, or allow more memory (--max-memory)"
            )

    def close(self) -> None:
        """Removes the folder. The lists are lost."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def write(self, state: Any) -> _Stored:
        """Begins to store a state; returns at once."""
        leaves, tree = jax.tree.flatten(state)
        parts = [_Part.of(leaf) for leaf in leaves]
        path = self.folder / f"{next(self._names)}.state"
        stored = _Stored(path, tree, parts, self._worker.submit(_write, path, leaves))
        weakref.finalize(stored, path.unlink, missing_ok=True)
        return stored

    def read(self, stored: _Stored) -> Future[Any]:
        """Begins to read a state."""
        return self._worker.submit(_read, stored.path, stored.tree, stored.parts)

    def result(self, future: Future[Any]) -> Any:
        """What a read or a write has led to.

        Raises:
          SpQRError: the disk failed.
        """
        try:
            return future.result()
        except OSError as error:
            raise SpQRError(
                f"cannot store activations in {self.folder}: {why_not(error, self.folder)}. "
                "They are on the disk because of --max-memory: allow more memory, or take less text (--nsamples)"
            ) from None


class SpilledStates:
    """A list of states on disk, made by `Spill.states`. Held in memory: what was read last, the next, and one on its
    way to the disk.

    Items can be appended, read and replaced by their index; the list can be iterated and copied.
    """

    def __init__(self, spill: Spill) -> None:
        self._spill = spill
        self._stored: list[_Stored] = []
        self._next: tuple[_Stored, Future[Any]] | None = None
        self._last: Future[Any] | None = None

    def __len__(self) -> int:
        return len(self._stored)

    def __getitem__(self, index: int) -> Any:
        stored = self._stored[index]
        self._spill.result(stored.written)  # if that failed, this is the error to tell
        ahead, self._next = self._next, None
        future = ahead[1] if ahead is not None and ahead[0] is stored else self._spill.read(stored)
        following = self._stored[(index + 1) % len(self)]
        if following is not stored:
            self._next = (following, self._spill.read(following))
        return self._spill.result(future)

    def __setitem__(self, index: int, state: Any) -> None:
        self._stored[index] = self._write(state)

    def append(self, state: Any) -> None:
        """Adds a state to the end."""
        self._stored.append(self._write(state))

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))

    def copy(self) -> SpilledStates:
        """The same states, to be replaced independently. Nothing is copied on the disk."""
        twin = SpilledStates(self._spill)
        twin._stored = list(self._stored)
        return twin

    def _write(self, state: Any) -> _Stored:
        if self._last is not None:
            self._spill.result(self._last)  # so that at most one state waits
        stored = self._spill.write(state)
        self._last = stored.written
        return stored


@dataclasses.dataclass(frozen=True)
class _Part:
    """How to make an array again: its shape and type, and for an array that was placed on devices, where."""

    shape: tuple[int, ...]
    dtype: np.dtype
    sharding: Any  # None for an array on the default device

    @classmethod
    def of(cls, leaf: Any) -> _Part:
        placed = isinstance(leaf, jax.Array) and leaf.committed
        return cls(leaf.shape, np.dtype(leaf.dtype), leaf.sharding if placed else None)

    def numbers(self, file: Any, shape: tuple[int, ...]) -> np.ndarray:
        """The next numbers of a file."""
        array = np.empty(shape, self.dtype)
        if file.readinto(array.reshape(-1).view(np.uint8).data) != array.nbytes:
            raise OSError("a file of stored activations was cut short")
        return array

    def read(self, file: Any) -> jax.Array:
        if self.sharding is None:
            return jnp.asarray(self.numbers(file, self.shape))
        shape = self.sharding.shard_shape(self.shape)
        devices = self.sharding.addressable_devices_indices_map(self.shape)
        pieces = [jax.device_put(self.numbers(file, shape), device) for device in devices]
        return jax.make_array_from_single_device_arrays(self.shape, self.sharding, pieces)


@dataclasses.dataclass(frozen=True, eq=False)
class _Stored:
    """A state on the disk. The file goes with this object."""

    path: Path
    tree: Any
    parts: list[_Part]
    written: Future[None]


def _pieces(leaf: Any) -> Iterator[np.ndarray]:
    """The bytes of an array, as `_Part.read` takes them: piece by piece where it lies on several devices."""
    if isinstance(leaf, jax.Array) and leaf.committed:
        by_device = {shard.device: shard.data for shard in leaf.addressable_shards}
        for device in leaf.sharding.addressable_devices_indices_map(leaf.shape):
            yield np.asarray(by_device[device])
    else:
        yield np.asarray(leaf)


def _write(path: Path, leaves: list[Any]) -> None:
    with path.open("wb") as file:
        for leaf in leaves:
            for piece in _pieces(leaf):  # waits for the device
                file.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)


def _read(path: Path, tree: Any, parts: list[_Part]) -> Any:
    with path.open("rb") as file:
        return jax.tree.unflatten(tree, [part.read(file) for part in parts])


def _end(worker: ThreadPoolExecutor, folder: Path) -> None:
    worker.shutdown(wait=True, cancel_futures=True)
    leftovers.remove(folder)
