"""Arrays of a checkpoint, read a band of rows at a time: a large one needs little more memory than it holds."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from spqr_jax.checkpoint.description import LeafSpec
from spqr_jax.errors import CheckpointError

_BAND_BYTES = 2**23
_READING_THREADS = 2  # each holds chunks; one thread computes checksums, which takes about as long as to read
_ALIGNMENT = 64  # bytes: JAX takes an array over without a copy on CPUs


class ArrayFile:
    """An array in a part of a checkpoint; all that is read is verified. A matrix is a `StoredMatrix`.

    Args:
      directory: of the part.
      leaf: the array's name in it.
      spec: what the part says of the array, which has one axis or more.

    Attributes:
      shape, dtype: of the array.
      band: rows that are read together, about 8 MiB.
      is_cut: whether the file's chunks are as small as a band. In an older checkpoint an array is one chunk, which is
        read and held as a whole while any of its rows are read.

    Raises:
      CheckpointError: the array cannot be read, or has another shape or type.
    """

    def __init__(self, directory: Path, leaf: str, spec: LeafSpec) -> None:
        self.shape, self.dtype = spec.shape, spec.dtype
        self._leaf, self._directory, self._sha256 = leaf, directory, spec.sha256
        self._digests: list[bytes] = []
        chunk: Any = self._open(_context(0)).chunk_layout.read_chunk.shape
        most = max(_BAND_BYTES // self._row_bytes, 1)
        self.is_cut = int(chunk[0]) <= most
        self.band = min(most // chunk[0] * chunk[0] if self.is_cut else most, self.shape[0])
        self._chunk_bytes = int(chunk[0]) * self._row_bytes

    @property
    def _row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def bytes_at_once(self) -> int:
        """Bytes that are held while rows are read."""
        return self.band * self._row_bytes if self.is_cut else self._chunk_bytes

    def read(self) -> np.ndarray:
        """The whole array.

        Raises:
          CheckpointError: it cannot be read or does not match its checksum.
        """
        values = _aligned(self.shape, self.dtype)
        for first, band in self.walk():
            values[first : first + len(band)] = band
        return values

    def walk(self) -> Iterator[tuple[int, np.ndarray]]:
        """All bands in order, each with its first row. The array is verified once the last one was taken.

        Raises:
          CheckpointError: it cannot be read or does not match its checksum.
        """
        whole, digests = hashlib.sha256(), []
        for first, band in self._bands(0, self.shape[0]):
            whole.update(_bytes(band))
            digests.append(hashlib.sha256(_bytes(band)).digest())
            yield first, band
        if whole.hexdigest() != self._sha256:
            raise damage(self._directory, self._leaf)
        self._digests = digests

    def rows(self, first: int, count: int) -> np.ndarray:
        """Rows `first`, ..., `first + count - 1`: [count, ...]. The first call reads the whole array.

        Raises:
          CheckpointError: they cannot be read, or the array does not match its checksum.
        """
        if not self._digests:
            for _ in self.walk():
                pass
        result = _aligned((count, *self.shape[1:]), self.dtype)
        for start, band in self._bands(first, first + count):
            if hashlib.sha256(_bytes(band)).digest() != self._digests[start // self.band]:
                raise damage(self._directory, self._leaf)
            low, high = max(start, first), min(start + len(band), first + count)
            result[low - first : high - first] = band[low - start : high - start]
        return result

    def _bands(self, first: int, end: int) -> Iterator[tuple[int, np.ndarray]]:
        """The bands that rows `first`, ..., `end - 1` touch, each with its first row."""
        file = self._open(_context(0 if self.is_cut else 2 * self._chunk_bytes))
        for start in range(first // self.band * self.band, end, self.band):
            try:
                band: np.ndarray = file[start : min(start + self.band, self.shape[0])].read().result()
            except Exception as error:
                raise self._unreadable(error) from None
            yield start, band

    def _open(self, context: Any) -> Any:
        import tensorstore

        folder = {"driver": "file", "path": f"{self._directory / 'params'}/"}
        values = {"driver": "ocdbt", "base": folder, "path": f"{self._leaf}/"}
        spec = {"driver": "zarr3", "kvstore": values, "recheck_cached_data": False}
        try:
            file = tensorstore.open(spec, context=context, open=True, read=True).result()
        except Exception as error:  # tensorstore raises many kinds
            raise self._unreadable(error) from None
        stored = tuple(file.shape), file.dtype.numpy_dtype
        if stored != (self.shape, self.dtype):
            raise CheckpointError(
                f"{self._directory} is truncated, damaged or edited: leaf {self._leaf} is {stored[1]} {stored[0]}, "
                f"expected {self.dtype} {self.shape}"
            )
        return file

    def _unreadable(self, error: Exception) -> CheckpointError:
        text = str(error).strip().splitlines() or [type(error).__name__]
        return CheckpointError(
            f"{self._directory}: leaf {self._leaf} cannot be read; the files are truncated or damaged: {text[0][:300]}"
        )


def damage(directory: Path, leaf: str) -> CheckpointError:
    """The error of an array that does not match its checksum."""
    return CheckpointError(f"{directory}: leaf {leaf} does not match its checksum: the file is damaged or was edited")


def _context(cache_bytes: int) -> Any:
    """How tensorstore reads; what it keeps goes with the context."""
    import tensorstore

    threads = {"limit": _READING_THREADS}
    return tensorstore.Context(
        {
            "data_copy_concurrency": threads,
            "file_io_concurrency": threads,
            "cache_pool": {"total_bytes_limit": cache_bytes},
        }
    )


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array that JAX takes over without a copy."""
    size = math.prod(shape) * dtype.itemsize
    room = np.empty(size + _ALIGNMENT, np.uint8)
    start = -room.ctypes.data % _ALIGNMENT
    return room[start : start + size].view(dtype).reshape(shape)


def _bytes(values: np.ndarray) -> memoryview:
    return np.ascontiguousarray(values).view(np.uint8).data
