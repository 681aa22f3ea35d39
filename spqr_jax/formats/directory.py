"""Hugging Face directories that grow tensor by tensor."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from spqr_jax.atomic import AtomicDirectory
from spqr_jax.files.companions import write_files
from spqr_jax.output import Claim

_SHARD_BYTES = 4 << 30


class HFDirectory(AtomicDirectory):
    """A directory of config.json and safetensors, sharded if it is large; a context manager as `AtomicDirectory` is.

    Args:
      path: directory to make, or a `Claim` on it.
      shard_bytes: bytes of tensors a file, about.
      overwrite: replace an existing directory, once the new one is whole.

    Raises:
      CheckpointError: as `AtomicDirectory`.
    """

    def __init__(self, path: Path | Claim, *, shard_bytes: int = _SHARD_BYTES, overwrite: bool = False) -> None:
        super().__init__(path, overwrite)
        self._shard_bytes = shard_bytes
        self._waiting: dict[str, np.ndarray] = {}
        self._shards: list[list[str]] = []
        self._bytes = 0

    def add(self, tensors: dict[str, np.ndarray]) -> None:
        """Takes tensors, each once."""
        for name, value in tensors.items():
            self._waiting[name] = np.ascontiguousarray(value)
            self._bytes += value.nbytes
        if sum(value.nbytes for value in self._waiting.values()) >= self._shard_bytes:
            self._write_shard()

    def write_json(self, name: str, values: dict[str, Any]) -> None:
        """A JSON file beside the weights."""
        self.write_text(name, json.dumps(values, indent=2) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """A text file beside the weights."""
        with self._claim.writing():
            (self.partial / name).write_text(text, encoding="utf-8", errors="backslashreplace")

    def write_files(self, files: Mapping[str, bytes]) -> None:
        """Files beside the weights, by their path in the directory."""
        with self._claim.writing():
            write_files(self.partial, files)

    def _write_shard(self) -> None:
        from safetensors.numpy import save_file

        self._shards.append(list(self._waiting))
        with self._claim.writing():
            save_file(self._waiting, self.partial / f"{len(self._shards)}.part", metadata={"format": "pt"})
        self._waiting = {}

    def finish(self) -> None:
        """Writes the last shard, and the index if there are several."""
        if self._waiting or not self._shards:
            self._write_shard()
        count = len(self._shards)
        where: dict[str, str] = {}
        for index, names in enumerate(self._shards, 1):
            file = "model.safetensors" if count == 1 else f"model-{index:05d}-of-{count:05d}.safetensors"
            os.replace(self.partial / f"{index}.part", self.partial / file)
            where |= dict.fromkeys(names, file)
        if count > 1:
            index_values = {"metadata": {"total_size": self._bytes}, "weight_map": where}
            self.write_json("model.safetensors.index.json", index_values)
