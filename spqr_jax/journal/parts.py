"""Arrays in files that are named by the SHA-256 of their content.

A file has the layout of safetensors: 8 bytes with the length of the header, the header in JSON, the numbers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from spqr_jax.errors import CheckpointError
from spqr_jax.files.safetensors_file import KINDS, SafetensorsReader
from spqr_jax.output.flush import flush, flush_folder

_NAME = re.compile(r"([0-9a-f]{64})\.safetensors")
_NEW = "new.safetensors"
_PIECE = 1 << 22  # bytes hashed and written at a time


def write_part(folder: Path, arrays: Mapping[str, np.ndarray]) -> str:
    """Writes arrays to a file in `folder`. It has its name, and is on the disk, when this returns.

    Args:
      folder: where to write, made if it is not there.
      arrays: name -> array of any shape, of a type that safetensors has.

    Returns:
      The SHA-256 of the file, in hexadecimal: its name, and how to read it.

    Raises:
      CheckpointError: an array has another type.
      OSError: it cannot be written.
    """
    if not folder.is_dir():
        folder.mkdir()
        flush_folder(folder.parent)
    digest, new = hashlib.sha256(), folder / _NEW
    with open(new, "wb", buffering=0) as file:
        for piece in _pieces(arrays):
            digest.update(piece)
            left = piece
            while len(left):  # the system may write less than it was given
                left = left[file.write(left) :]
        flush(file.fileno())
    name = digest.hexdigest()
    os.replace(new, part_path(folder, name))
    flush_folder(folder)
    return name


def read_part(folder: Path, digest: str) -> dict[str, np.ndarray]:
    """The arrays of a part, verified.

    Raises:
      CheckpointError: it is missing or damaged.
    """
    verify_part(folder, digest)
    reader = SafetensorsReader(folder, part_path(folder, digest).name)
    return {name: reader.read(name) for name in reader.shapes()}


def verify_part(folder: Path, digest: str) -> None:
    """Refuses a part that is not what its name says.

    Raises:
      CheckpointError: it is missing or damaged.
    """
    path = part_path(folder, digest)
    try:
        with open(path, "rb") as file:
            actual = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    if actual != digest:
        raise CheckpointError(f"{path} does not match its name: the file is damaged or was edited")


def part_path(folder: Path, digest: str) -> Path:
    return folder / f"{digest}.safetensors"


def parts_in(folder: Path) -> set[str]:
    """Digests of the parts that a folder has files for."""
    try:
        entries = os.listdir(folder)
    except FileNotFoundError:
        return set()
    return {match[1] for match in map(_NAME.fullmatch, entries) if match}


def keep_only(folder: Path, digests: set[str]) -> None:
    """Removes every other part, and what was not finished."""
    with contextlib.suppress(FileNotFoundError):
        (folder / _NEW).unlink()
    for digest in parts_in(folder) - digests:
        part_path(folder, digest).unlink(missing_ok=True)


def _pieces(arrays: Mapping[str, np.ndarray]) -> Iterator[memoryview]:
    """The bytes of a file, piece by piece."""
    header, offset = {}, 0
    for name, array in arrays.items():
        header[name] = {
            "dtype": _kind(name, array.dtype),
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for array in arrays.values():
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        for start in range(0, len(data), _PIECE):
            yield data[start : start + _PIECE]


def _kind(name: str, dtype: np.dtype) -> str:
    kind = next((kind for kind, known in KINDS.items() if dtype == known), None)
    if kind is None:
        raise CheckpointError(f"array {name} has the type {dtype}: expected one of {', '.join(KINDS)}")
    return kind
