"""Directories in Hugging Face's SpQR format as models, read block by block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from spqr_jax.errors import ModelError, SpQRError
from spqr_jax.files.content import digest_of_files, digest_of_values
from spqr_jax.files.entries import plain
from spqr_jax.files.json_file import read_json, read_object
from spqr_jax.files.safetensors_file import SafetensorsReader
from spqr_jax.formats.dense_part import dense_part
from spqr_jax.formats.hf_spqr import BITS, TENSORS, TILE, WordMatrix, unpack_words
from spqr_jax.models.config import DecoderConfig
from spqr_jax.models.families import family_of_hf
from spqr_jax.models.names import AS_IT_IS, Row, with_the_head_that_is_there
from spqr_jax.models.stops import with_named_tokens
from spqr_jax.models.weights import Block, Outer, block_shapes, outer_shapes, weight_shapes


def is_hf_spqr(directory: Path) -> bool:
    """Whether a directory's config.json names the format."""
    path = directory / "config.json"
    if not path.is_file():
        return False
    values = read_json(path)
    quantization = values.get("quantization_config") if isinstance(values, dict) else None
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
        values = read_object(directory / "config.json")
        quantization = values.nested("quantization_config")
        for name, expected in {"bits": BITS, "beta1": TILE, "beta2": TILE}.items():
            if quantization.integer(name) != expected:
                quantization.refuse(name, f"{expected} (SpQR of {BITS} bits in tiles of {TILE} x {TILE})")
        family = family_of_hf(values)
        self._reader, self._dtype = SafetensorsReader(directory), dtype
        config = with_named_tokens(family.from_hf(values), directory)
        self._config = with_the_head_that_is_there(self._reader, family.table, config)
        self._rows = {path: row for row in family.table.expand(self._config).values() for path in row.paths}
        self._shapes = weight_shapes(self._config)
        self._check()

    @property
    def config(self) -> DecoderConfig:
        return self._config

    def identity(self) -> str:
        """SHA-256 of the files' content, with the model's configuration and the type of the dense weights."""
        return digest_of_values(
            [digest_of_files(self._reader.files()), self._config.to_json(), str(np.dtype(self._dtype))]
        )

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
        problems += [f"unexpected tensor {plain(name)}" for name in sorted(present - known)]
        if problems:
            listed = "\n  ".join(problems[:20]) + (f"\n  ... and {len(problems) - 20} more" * (len(problems) > 20))
            raise ModelError(
                f"{self._reader.label} does not hold the model that its config.json describes:\n  {listed}"
            )

    def _weight(self, path: str) -> Any:
        row, shape = self._rows[path], self._shapes[path]
        if not self._in_words(row):
            tensor = self._reader.read(row.tensor, self._dtype)
            return dense_part(tensor, row, path, shape, self._config, self._dtype, self._reader.label)
        module = row.tensor.removesuffix(".weight")
        try:
            if len(shape) != 2 or len(row.paths) > 1 or row.packing is not AS_IT_IS:
                raise SpQRError(
                    "the SpQR format stores single matrices, but this tensor is not a matrix or holds several"
                )
            parts = {name: self._reader.read(f"{module}.{name}") for name in TENSORS}
            return unpack_words(WordMatrix(**_as_integers(parts), shape=(shape[0], shape[1])))
        except SpQRError as error:
            raise ModelError(f"{self._reader.label}: {row.tensor}: {error}") from None


def _as_integers(parts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """An empty list of outliers is written as float32 by some programs."""
    if not parts["col_vals"].size:
        parts = parts | {"col_vals": np.zeros(0, np.int32)}
    return parts
