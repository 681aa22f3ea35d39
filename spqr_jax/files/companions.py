"""Files that stand beside a model's weights and are kept as they are, byte by byte.

A checkpoint of ours has the tokenizer's files where other programs look for them, and
``config.json`` and ``generation_config.json`` in a folder ``origin``: exports go by them,
so that a model leaves in the form in which it came.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from spqr_jax.files.entries import Entries
from spqr_jax.files.json_file import read_bytes, read_object

ORIGIN = "origin"
_CONFIGURATIONS = ("config.json", "generation_config.json")


def origin_files(directory: Path) -> dict[str, bytes]:
    """The configurations of a model directory, by the paths that they have in a checkpoint.

    Raises:
      ModelError: one cannot be read.
    """
    paths = [directory / name for name in _CONFIGURATIONS]
    return {f"{ORIGIN}/{path.name}": read_bytes(path) for path in paths if path.is_file()}


def origin_config(checkpoint: Path) -> Entries | None:
    """The config.json that a checkpoint's model came with; None if it came without.

    Raises:
      ModelError: it is damaged.
    """
    path = checkpoint / ORIGIN / "config.json"
    return read_object(path) if path.is_file() else None


def origin_generation_config(checkpoint: Path) -> bytes | None:
    """The generation_config.json that a checkpoint's model came with, as it was; None if it came without.

    Raises:
      ModelError: it is no JSON object.
    """
    path = checkpoint / ORIGIN / "generation_config.json"
    if not path.is_file():
        return None
    read_object(path)
    return read_bytes(path)


def write_files(directory: Path, files: Mapping[str, bytes]) -> None:
    """Writes files by their paths in a directory, whose folders are made.

    Raises:
      OSError: they cannot be written.
    """
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
