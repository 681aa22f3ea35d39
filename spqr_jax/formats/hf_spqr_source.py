"""Directories in Hugging Face's SpQR format as models, read block by block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from spqr_jax.errors import ModelError, SpQRError
from spqr_jax.files import read_json
from spqr_jax.files.safetensors_file import SafetensorsReader
from spqr_jax.formats.hf_spqr import BITS, TENSORS, TILE, WordMatrix, unpack_words
from spqr_jax.models.config import DecoderConfig
from spqr_jax.models.families import family_of_hf
from spqr_jax.models.names import Row
from spqr_jax.models.stops import with_named_tokens
from spqr_jax.models.weights import Block, Outer, block_shapes, outer_shapes, weight_shapes


def is_hf_spqr(directory: Path) -> bool:
    """Whether a directory's config.json names the format."""
    path = directory / "config.json"
    if not path.is_file():
        return False
    quantization = read_json(path).get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == "spqr"


class HFSpQRSource:
    """A `BlockSource` over a directory in Hugging Face's SpQR format.

    Args:
      directory: with config.json and safetensors.
      dtype: of the weights that are dense in it.

    Raises:
      ModelError: files that are missing or damaged, or a model that we do not run.
    """

    def __init__(self, directory: Path, dtype: Any) -> None:
        values = read_json(directory / "config.json")
        quantization = values["quantization_config"]
        found = {name: quantization.get(name) for name in ("bits", "beta1", "beta2")}
        if found != {"bits": BITS, "beta1": TILE, "beta2": TILE}:
            raise ModelError(f"{directory}: expected SpQR of {BITS} bits in tiles of {TILE} x {TILE}, got {found}")
        family = family_of_hf(values)
        self._config, self._dtype = with_named_tokens(family.from_hf(values), directory), dtype
        self._reader = SafetensorsReader(directory)
        self._rows = {path: row for row in family.table.expand(self._config).values() for path in row.paths}
        self._shapes = weight_shapes(self._config)
        self._check()

    @property
    def config(self) -> DecoderConfig:
        return self._config

    def outer(self) -> Outer:
        return Outer(**{name: self._weight(name) for name in outer_shapes(self._config)})

    def block(self, index: int) -> Block:
        kind = self._config.kind(index)
        return Block({n: self._weight(f"layers.{index}.{n}") for n in block_shapes(self._config, kind)}, kind)

    def _in_words(self, row: Row) -> bool:
        return f"{row.tensor.removesuffix('.weight')}.{TENSORS[0]}" in self._reader.shapes()

    def _check(self) -> None:
        """Every weight must be there, in one form or the other, and nothing else."""
        present = set(self._reader.shapes())
        expected: set[str] = set()
        for row in self._rows.values():
            module = row.tensor.removesuffix(".weight")
            expected |= {f"{module}.{name}" for name in TENSORS} if self._in_words(row) else {row.tensor}
        known = expected | ({"lm_head.weight"} if self._config.tied_head else set())
        problems = [f"missing tensor {name}" for name in sorted(expected - present)]
        problems += [f"unexpected tensor {name}" for name in sorted(present - known)]
        if problems:
            shown = "\n  ".join(problems[:40])
            raise ModelError(f"{self._reader.label} does not hold the model that its config.json describes:\n  {shown}")

    def _weight(self, path: str) -> Any:
        row, shape = self._rows[path], self._shapes[path]
        try:
            if self._in_words(row):
                module = row.tensor.removesuffix(".weight")
                parts = {name: self._reader.read(f"{module}.{name}") for name in TENSORS}
                return unpack_words(WordMatrix(**_as_integers(parts), shape=(shape[0], shape[1])))
            tensor = self._reader.read(row.tensor, self._dtype)
            part = row.packing.split(tensor, self._config)[row.paths.index(path)]
        except SpQRError as error:
            raise ModelError(f"{self._reader.label}: {row.tensor}: {error}") from None
        if part.shape != shape or not np.all(np.isfinite(part)):
            raise ModelError(
                f"{self._reader.label}: {row.tensor} has shape {part.shape}, expected {shape} of finite values"
            )
        return jnp.asarray(part)


def _as_integers(parts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """An empty list of outliers is written as float32 by some programs."""
    if not parts["col_vals"].size:
        parts = parts | {"col_vals": np.zeros(0, np.int32)}
    return parts
