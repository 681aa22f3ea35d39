"""The header of a GGUF file, version 2 or 3, little-endian.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The `gguf` package reads
it too, but takes half a minute for a vocabulary of 262144 tokens; what tensor
types mean, and their numbers, is still left to it.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = "general.alignment"
_MOST = 1 << 31  # bytes of one text, or elements of one array: more is a damaged file
_MOST_ELEMENTS = 1 << 40  # of an axis
_MOST_DIMENSIONS = 8
_MOST_TEXTS = 1 << 22  # of an array: the largest vocabularies have 2^18
_DEEPEST = 4  # arrays inside arrays

_BOOL, _STRING, _ARRAY = 7, 8, 9
# value type -> format of one number
_NUMBERS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    _BOOL: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}


class BadHeader(Exception):
    """The file is no GGUF file of a version that we read, or damaged."""


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies.

    Attributes:
      shape: outermost axis first, as NumPy has it.
      kind: number of its ggml type.
      offset: of its first byte in the file.
    """

    shape: tuple[int, ...]
    kind: int
    offset: int


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, TensorEntry]]:
    """Entries and tensors of a file, by name. Arrays of numbers stay arrays, those of texts become lists.

    Raises:
      BadHeader: not GGUF, another version, or truncated.
      OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        reader = _Reader(file, path.stat().st_size)
        if reader.take(4) != MAGIC:
            raise BadHeader("it does not begin with 'GGUF'")
        version = reader.number("<u4")
        if version not in _VERSIONS:
            order = " (a big-endian file)" if version % 65536 == 0 and version else ""
            raise BadHeader(f"its version is {version}{order}, expected one of {_VERSIONS} in little-endian order")
        tensor_count, entry_count = reader.count("<u8"), reader.count("<u8")
        entries: dict[str, Any] = {}
        for _ in range(entry_count):
            key = reader.text()
            if key in entries:
                raise BadHeader(f"its header has two entries {key!r}")
            entries[key] = reader.value(reader.number("<u4"))
        found: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(tensor_count):
            name = reader.text()
            dimensions = reader.number("<u4")
            if dimensions > _MOST_DIMENSIONS:
                raise BadHeader(f"tensor {name!r} has {dimensions} axes, expected at most {_MOST_DIMENSIONS}")
            shape = tuple(reader.number("<u8") for _ in range(dimensions))
            if name in found or not all(1 <= size <= _MOST_ELEMENTS for size in shape):
                raise BadHeader(f"tensor {name!r} is listed twice, or has the invalid shape {shape[::-1]}")
            found[name] = shape[::-1], reader.number("<u4"), reader.number("<u8")
        alignment = entries.get(_ALIGNMENT, 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= _MOST:
            raise BadHeader(f"{_ALIGNMENT} is {alignment!r}, expected a positive whole number")
        begin = -(-file.tell() // alignment) * alignment
    return entries, {name: TensorEntry(shape, kind, begin + at) for name, (shape, kind, at) in found.items()}


class _Reader:
    """Takes values off a file that may end anywhere."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size

    def take(self, count: int) -> bytes:
        data = self._file.read(count) if count <= self._size else b""
        if len(data) != count:
            raise BadHeader("it ends inside its header: is it truncated?")
        return data

    def number(self, kind: str) -> Any:
        return np.frombuffer(self.take(np.dtype(kind).itemsize), kind)[0].item()

    def count(self, kind: str) -> int:
        found = self.number(kind)
        if not 0 <= found <= min(_MOST, self._size):
            raise BadHeader(f"its header announces {found} entries, but the file has {self._size} bytes")
        return int(found)

    def text(self) -> str:
        return self.take(self.count("<u8")).decode("utf-8", "replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        if depth > _DEEPEST:
            raise BadHeader(f"its header nests arrays {depth} deep, expected at most {_DEEPEST}")
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            inner, count = self.number("<u4"), self.count("<u8")
            if inner in _NUMBERS:
                return np.frombuffer(self.take(count * np.dtype(_NUMBERS[inner]).itemsize), _NUMBERS[inner])
            if count > _MOST_TEXTS:
                raise BadHeader(
                    f"its header announces an array of {count} strings or arrays, expected at most {_MOST_TEXTS}"
                )
            return self._texts(count) if inner == _STRING else [self.value(inner, depth + 1) for _ in range(count)]
        if kind not in _NUMBERS:
            raise BadHeader(f"its header has a value of the unknown type {kind}")
        return self.number(_NUMBERS[kind])

    def _texts(self, count: int) -> list[str]:
        length, take, texts = struct.Struct("<Q"), self.take, []
        for _ in range(count):
            (size,) = length.unpack(take(8))
            texts.append(take(size).decode("utf-8", "replace"))
        return texts


def tensor_bytes(entry: TensorEntry) -> tuple[Any, int]:
    """The ggml type of a tensor, and its size.

    Raises:
      ValueError: a type that the `gguf` package does not know, or rows that are no whole number of its blocks.
    """
    import gguf

    kind = gguf.GGMLQuantizationType(entry.kind)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    if not entry.shape or entry.shape[-1] % block:
        raise ValueError(f"shape {entry.shape} does not fit blocks of {block}")
    return kind, math.prod(entry.shape) // block * size
