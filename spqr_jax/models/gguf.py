"""GGUF files of any family that has them, any tensor type that the `gguf` package dequantizes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from spqr_jax.errors import ModelError
from spqr_jax.files.entries import Entries
from spqr_jax.models.families import names_of_gguf
from spqr_jax.models.gguf_header import BadHeader, read_header, tensor_bytes
from spqr_jax.models.names import TensorSource
from spqr_jax.models.stops import with_gguf_tokens

_WEIGHTS_AT_ONCE = 1 << 24  # that are read and dequantized before they take the type asked for


class GGUFFile:
    """An open GGUF file: its key-value header, and its tensors, read when asked for.

    Attributes:
      label: the file's name, for messages.
      entries: its header, through typed getters.

    Raises:
      ModelError: no GGUF file, another version, or truncated.
    """

    def __init__(self, path: Path) -> None:
        self.label, self._path = str(path), path
        try:
            entries, self._tensors = read_header(path)
            self._sizes = {name: tensor_bytes(entry) for name, entry in self._tensors.items()}
            ends = [entry.offset + self._sizes[name][1] for name, entry in self._tensors.items()]
            if max(ends, default=0) > path.stat().st_size:
                raise BadHeader(f"it has {path.stat().st_size} bytes, and tensors up to byte {max(ends)}: truncated?")
        except (BadHeader, OSError, ValueError, KeyError) as error:
            raise ModelError(f"{path} cannot be read as GGUF: {error}") from None
        self.entries = Entries(entries, self.label)

    def get(self, key: str, default: Any = None) -> Any:
        """A header entry, or `default`."""
        value = self.entries.raw(key)
        return default if value is None else value

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self._tensors.items()}

    def read(self, name: str, dtype: Any) -> np.ndarray:
        """One tensor. Some rows at a time, not mapped: of the file nothing stays in memory."""
        import gguf

        entry, (kind, size) = self._tensors[name], self._sizes[name]
        rows = math.prod(entry.shape[:-1])
        width, step = size // rows, max(1, _WEIGHTS_AT_ONCE // entry.shape[-1])
        values = np.empty((rows, entry.shape[-1]), dtype)
        try:
            with self._path.open("rb") as file:
                file.seek(entry.offset)
                for first in range(0, rows, step):
                    raw = np.fromfile(file, np.uint8, width * min(step, rows - first)).reshape(-1, width)
                    values[first : first + step] = gguf.quants.dequantize(raw, kind)
        except NotImplementedError:
            raise ModelError(
                f"{self.label}: tensor {name} has type {kind.name}, which cannot be dequantized here"
            ) from None
        except (OSError, ValueError) as error:
            raise ModelError(f"{self.label}: tensor {name} cannot be read: {error}") from None
        return values.reshape(entry.shape)


def open_gguf(file: GGUFFile, dtype: Any) -> TensorSource:
    """A lazily read model from an open GGUF file, weights in `dtype`.

    Raises:
      ModelError: an architecture that we do not run, or entries that are missing.
    """
    names = names_of_gguf(file)
    return TensorSource(file, names.table, with_gguf_tokens(names.config(file), file), dtype)
