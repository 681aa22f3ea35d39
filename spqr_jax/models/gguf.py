"""GGUF files of any family that has them, any tensor type that the `gguf` package dequantizes."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from spqr_jax.errors import ModelError
from spqr_jax.files.entries import Entries
from spqr_jax.models.families import names_of_gguf
from spqr_jax.models.gguf_header import MAGIC, BadHeader, TensorEntry, read_header, tensor_bytes
from spqr_jax.models.names import TensorSource
from spqr_jax.models.stops import with_gguf_tokens

_BYTES_OF_ROW = 1 << 13  # that rows are joined to
_WEIGHTS_AT_ONCE = 1 << 24  # that are read and dequantized before they take the type asked for


class GGUFFile:
    """An open GGUF file, in one part or several: its key-value header, and its tensors, read when asked for.

    Any part of a model that ``gguf-split`` cut stands for all; the first holds the header.

    Attributes:
      label: the file's name, for messages.
      entries: its header, through typed getters.

    Raises:
      ModelError: no GGUF file, another version, truncated, or a part that is missing.
    """

    def __init__(self, path: Path) -> None:
        self.label = str(path)
        self.entries, tensors = _read_part(path)
        self._tensors = {name: (path, tensor) for name, tensor in tensors.items()}
        if self.entries.integer("split.count", 1) > 1:
            self._add_parts(path)

    def _add_parts(self, path: Path) -> None:
        given, count = path.name, self.entries.integer("split.count")
        self._tensors = {}
        for index, part in enumerate(_parts(path, count)):
            entries, tensors = _read_part(part)
            said = entries.integer("split.no", count, most=count) + 1, entries.integer("split.count", 1)
            if said != (index + 1, count):
                raise ModelError(
                    f"{part} says that it is part {said[0]} of {said[1]}, but its name says {index + 1} of {count}: "
                    "was it renamed, or does it belong to another model?"
                )
            if index == 0:
                self.entries = entries
            if twice := self._tensors.keys() & tensors.keys():
                raise ModelError(
                    f"{part}: tensor {min(twice)} is also in an earlier part: do the parts belong to different models?"
                )
            self._tensors |= {name: (part, tensor) for name, tensor in tensors.items()}
        expected = self.entries.integer("split.tensors.count", len(self._tensors))
        if expected != len(self._tensors):
            raise ModelError(
                f"{path.with_name(given)}: its {count} parts hold {len(self._tensors)} tensors, expected {expected}: "
                "fetch them again"
            )

    def get(self, key: str, default: Any = None) -> Any:
        """A header entry, or `default`."""
        value = self.entries.raw(key)
        return default if value is None else value

    def files(self) -> list[Path]:
        """The file, or all its parts."""
        return sorted({path for path, _ in self._tensors.values()})

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.entry.shape for name, (_, tensor) in self._tensors.items()}

    def read(self, name: str, dtype: Any) -> np.ndarray:
        """One tensor. Some rows at a time, not mapped: of the file nothing stays in memory."""
        import gguf

        path, tensor = self._tensors[name]
        shape = tensor.entry.shape
        rows = math.prod(shape[:-1])
        width, step = tensor.size // rows, max(1, _WEIGHTS_AT_ONCE // shape[-1])
        values = np.empty((rows, shape[-1]), dtype)
        try:
            with path.open("rb") as file, np.errstate(over="ignore", invalid="ignore"):  # checked by who reads
                file.seek(tensor.entry.offset)
                for first in range(0, rows, step):
                    raw = np.fromfile(file, np.uint8, width * min(step, rows - first)).reshape(-1, width)
                    values[first : first + step] = gguf.quants.dequantize(_joined(raw), tensor.kind).reshape(
                        -1, shape[-1]
                    )
        except NotImplementedError:
            raise ModelError(
                f"{path}: tensor {name} has type {tensor.kind.name}, which this program cannot dequantize: "
                "use a file in another type, such as Q8_0 or F16"
            ) from None
        except (OSError, ValueError) as error:
            raise ModelError(f"{path}: tensor {name} cannot be read: {error}; fetch the file again") from None
        return values.reshape(shape)


def _joined(raw: np.ndarray) -> np.ndarray:
    """Rows [rows, bytes] joined to fewer, longer ones. The library takes 16 at a time, and long ones are quicker."""
    most = max(1, _BYTES_OF_ROW // raw.shape[1])
    together = max((count for count in range(1, most + 1) if len(raw) % count == 0), default=1)
    return raw.reshape(-1, raw.shape[1] * together)


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A tensor of a part: where it lies, its ggml type, its bytes."""

    entry: TensorEntry
    kind: Any
    size: int


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF files do; its name says nothing."""
    try:
        with path.open("rb") as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


def _read_part(path: Path) -> tuple[Entries, dict[str, _Tensor]]:
    try:
        entries, places = read_header(path)
        tensors = {name: _Tensor(entry, *tensor_bytes(entry)) for name, entry in places.items()}
        end = max((tensor.entry.offset + tensor.size for tensor in tensors.values()), default=0)
        if end > path.stat().st_size:
            raise BadHeader(f"it has {path.stat().st_size} bytes, but its tensors end at byte {end}: is it truncated?")
    except (BadHeader, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ModelError(f"{path} cannot be read as GGUF: {reason}; fetch the file again") from None
    return Entries(entries, str(path)), tensors


_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.gguf)?", re.IGNORECASE | re.DOTALL)
_MOST_PARTS = 10000


def _parts(path: Path, count: int) -> list[Path]:
    """All parts of a model, in order, from the name of any of them."""
    name = _PART.fullmatch(path.name)
    if name is None or int(name[3]) != count or count > _MOST_PARTS:
        raise ModelError(
            f"{path} is one of {count} parts of a split model, but its name does not say which one: expected names "
            f"like those of gguf-split, such as NAME-00001-of-{count:05d}.gguf, all in one folder"
        )
    parts = [path.with_name(f"{name[1]}-{index + 1:05d}-of-{count:05d}{name[4] or ''}") for index in range(count)]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise ModelError(
            f"{path} is one of {count} parts of a split model; these parts are missing in its folder: "
            f"{', '.join(missing[:5])}" + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        )
    return parts


def open_gguf(file: GGUFFile, dtype: Any) -> TensorSource:
    """A lazily read model from an open GGUF file, weights in `dtype`.

    Raises:
      ModelError: an architecture that we do not run, or entries that are missing.
    """
    names = names_of_gguf(file)
    return TensorSource(file, names.table, with_gguf_tokens(names.config(file), file), dtype)
