"""Matrices of a checkpoint that stay on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from spqr_jax.checkpoint.description import LeafSpec
from spqr_jax.errors import CheckpointError

_BAND_BYTES = 2**23


class MatrixFile:
    """A dense matrix in a part of a checkpoint, a `StoredMatrix`. Verify it before its rows are read.

    Args:
      directory: of the part.
      leaf: the array's name in it.
      spec: what the part says of the array.

    Attributes:
      shape, dtype: of the matrix, [out, in].
      band: rows that are read together: whole chunks of the file, 8 MiB where its chunks are small enough. In an older
        checkpoint a matrix is one chunk.

    Raises:
      CheckpointError: the array cannot be read.
    """

    def __init__(self, directory: Path, leaf: str, spec: LeafSpec) -> None:
        self.shape, self.dtype = (spec.shape[0], spec.shape[1]), spec.dtype
        self._leaf, self._directory, self._sha256 = leaf, directory, spec.sha256
        self._digests: list[bytes] = []
        self._file, chunk = self._open()
        row_bytes = self.shape[1] * self.dtype.itemsize
        self.band = min(max(_BAND_BYTES // row_bytes // chunk, 1) * chunk, self.shape[0])

    def verify(self) -> None:
        """Reads the matrix once, a band at a time, and keeps the bands' checksums.

        Raises:
          CheckpointError: the array cannot be read or does not match its checksum.
        """
        whole, self._digests = hashlib.sha256(), []
        for _, values in self._bands(0, self.shape[0]):
            whole.update(_bytes(values))
            self._digests.append(hashlib.sha256(_bytes(values)).digest())
        if whole.hexdigest() != self._sha256:
            raise damage(self._directory, self._leaf)

    def rows(self, first: int, count: int) -> np.ndarray:
        """Rows `first`, ..., `first + count - 1`: [count, in].

        Raises:
          CheckpointError: they cannot be read, or have changed since the matrix was verified.
        """
        result = np.empty((count, self.shape[1]), self.dtype)
        for start, values in self._bands(first, first + count):
            if hashlib.sha256(_bytes(values)).digest() != self._digests[start // self.band]:
                raise damage(self._directory, self._leaf)
            low, high = max(start, first), min(start + len(values), first + count)
            result[low - first : high - first] = values[low - start : high - start]
        return result

    def _bands(self, first: int, end: int) -> Iterator[tuple[int, np.ndarray]]:
        """The bands that rows `first`, ..., `end - 1` touch, each with its first row."""
        for start in range(first // self.band * self.band, end, self.band):
            yield start, self._read(start, min(start + self.band, self.shape[0]))

    def _open(self) -> tuple[Any, int]:
        """The array's file, and the rows of its chunks."""
        import tensorstore

        folder = {"driver": "file", "path": f"{self._directory / 'params'}/"}
        values = {"driver": "ocdbt", "base": folder, "path": f"{self._leaf}/"}
        try:
            file = tensorstore.open({"driver": "zarr3", "kvstore": values}, open=True, read=True).result()
        except Exception as error:  # tensorstore raises many kinds
            raise self._unreadable(error) from None
        if (file.shape, file.dtype.numpy_dtype) != (self.shape, self.dtype):
            raise CheckpointError(f"{self._directory}: leaf {self._leaf} is {file.dtype.name} {list(file.shape)}")
        chunk: Any = file.chunk_layout.read_chunk.shape
        return file, int(chunk[0])

    def _read(self, first: int, end: int) -> np.ndarray:
        try:
            values: np.ndarray = self._file[first:end].read().result()
        except Exception as error:
            raise self._unreadable(error) from None
        return values

    def _unreadable(self, error: Exception) -> CheckpointError:
        text = str(error).strip().splitlines() or [type(error).__name__]
        return CheckpointError(
            f"{self._directory}: leaf {self._leaf} cannot be read; the files are truncated or damaged: {text[0][:300]}"
        )


def damage(directory: Path, leaf: str) -> CheckpointError:
    """The error of an array that does not match its checksum."""
    return CheckpointError(f"{directory}: leaf {leaf} does not match its checksum: the file is damaged or was edited")


def _bytes(values: np.ndarray) -> memoryview:
    return np.ascontiguousarray(values).view(np.uint8).data
