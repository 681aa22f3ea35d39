"""GGUF files of any family that has them, any tensor type that the `gguf` package dequantizes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from spqr_jax.errors import ModelError
from spqr_jax.models.families import names_of_gguf
from spqr_jax.models.names import TensorSource

_WEIGHTS_AT_ONCE = 1 << 24  # that are read and dequantized before they take the type asked for


class GGUFFile:
    """An open GGUF file: its key-value header, and its tensors, read when asked for."""

    def __init__(self, path: Path) -> None:
        import gguf

        self.label, self._path = str(path), path
        try:
            self._reader = gguf.GGUFReader(path)
            self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        except Exception as error:  # the package raises many kinds on a damaged file
            raise ModelError(f"{path} cannot be read as GGUF: {error or type(error).__name__}") from None

    def get(self, key: str, default: Any = None) -> Any:
        """A header entry, or `default`."""
        field = self._reader.get_field(key)
        return default if field is None else field.contents()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(int(n) for n in reversed(tensor.shape)) for name, tensor in self._tensors.items()}

    def read(self, name: str, dtype: Any) -> np.ndarray:
        """One tensor. Some rows at a time, not mapped: of the file nothing stays in memory."""
        import gguf

        tensor, shape = self._tensors[name], self.shapes()[name]
        rows = math.prod(shape[:-1])
        width = int(tensor.n_bytes) // rows
        step = max(1, _WEIGHTS_AT_ONCE // shape[-1])
        values = np.empty((rows, shape[-1]), dtype)
        try:
            with self._path.open("rb") as file:
                file.seek(int(tensor.data_offset))
                for first in range(0, rows, step):
                    raw = np.fromfile(file, np.uint8, width * min(step, rows - first)).reshape(-1, width)
                    values[first : first + step] = gguf.quants.dequantize(raw, tensor.tensor_type)
        except NotImplementedError:
            raise ModelError(
                f"{self.label}: tensor {name} has type {tensor.tensor_type.name}, which cannot be dequantized here"
            ) from None
        except (OSError, ValueError) as error:
            raise ModelError(f"{self.label}: tensor {name} cannot be read: {error}") from None
        return values.reshape(shape)


def open_gguf(file: GGUFFile, dtype: Any) -> TensorSource:
    """A lazily read model from an open GGUF file, weights in `dtype`.

    Raises:
      ModelError: an architecture that we do not run, or entries that are missing.
    """
    names = names_of_gguf(file)
    return TensorSource(file, names.table, names.config(file), dtype)
