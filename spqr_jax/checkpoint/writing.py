"""Checkpoints that grow block by block and get their name when whole."""

from __future__ import annotations

import contextlib
import glob
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from spqr_jax._compat import orbax_v1
from spqr_jax.atomic import AtomicDirectory
from spqr_jax.checkpoint.description import FORMAT, FORMAT_VERSION, META_FIELDS, fingerprint, leaves_of, orbax_context
from spqr_jax.config import SpQRConfig
from spqr_jax.errors import CheckpointError
from spqr_jax.files.companions import write_files
from spqr_jax.models.config import DecoderConfig
from spqr_jax.models.decoder import Block, Decoder, Outer
from spqr_jax.models.weights import OUTER_NAMES
from spqr_jax.output import Claim
from spqr_jax.quantized import is_quantized
from spqr_jax.stream import sweep
from spqr_jax.stream.blocks import TreeSource


class CheckpointSink(AtomicDirectory):
    """A `BlockSink` that writes a checkpoint as it goes, a context manager as `AtomicDirectory` is.

    Args:
      path: directory to make, or a `Claim` on it.
      config: of the model.
      quantization: how it was quantized, or None for a dense model.
      tokenizer: a transformers tokenizer to keep beside the weights, or None.
      provenance: anything JSON that tells where the model comes from.
      files: path in the directory -> content of files to keep beside the weights; see `spqr_jax.files.companions`.
      overwrite: replace an existing directory (once the new one is whole).

    Raises:
      CheckpointError: as `AtomicDirectory`; or parts were never put.
    """

    def __init__(
        self,
        path: Path | str | Claim,
        config: DecoderConfig,
        quantization: SpQRConfig | None = None,
        *,
        tokenizer: Any = None,
        provenance: dict[str, Any] | None = None,
        files: Mapping[str, bytes] | None = None,
        overwrite: bool = False,
    ) -> None:
        if provenance is not None and not isinstance(provenance, dict):
            raise CheckpointError(f"provenance must be a dictionary, got {type(provenance).__name__}")
        super().__init__(path, overwrite)
        self._config, self._quantization = config, quantization
        self._tokenizer, self._provenance, self._files = tokenizer, provenance or {}, files or {}
        self._layer_stats: dict[str, dict[str, float]] = {}
        self._blocks: set[int] = set()
        self._has_outer = False

    def record(self, path: str, stats: dict[str, float]) -> None:
        """Keeps what quantizing the weight at `path` did; call before its block is put."""
        self._layer_stats[path] = stats

    def put_block(self, index: int, block: Block) -> None:
        weights = dict(block)
        stats = {n: s for n in weights if (s := self._layer_stats.get(f"layers.{index}.{n}")) is not None}
        header = {"index": index, "layer_stats": stats}
        self._write(Path("layers") / f"{index:05d}", weights, header)
        self._blocks.add(index)

    def put_outer(self, outer: Outer) -> None:
        weights = {name: getattr(outer, name) for name in OUTER_NAMES if getattr(outer, name) is not None}
        header = {
            "model": self._config.to_json(),
            "quantization": None if self._quantization is None else self._quantization.to_json(),
            "layer_stats": {n: s for n in weights if (s := self._layer_stats.get(n)) is not None},
            "provenance": self._provenance,
        }
        self._write(Path("model"), weights, header)
        self._has_outer = True

    def finish(self) -> None:
        """Keeps the tokenizer and other files, once every part was put."""
        missing = sorted(set(range(self._config.num_layers)) - self._blocks)
        if missing or not self._has_outer:
            raise CheckpointError(
                f"the checkpoint is incomplete: blocks {missing} or the outer weights were never written"
            )
        if self._tokenizer is not None:
            self._tokenizer.save_pretrained(self.partial)
        write_files(self.partial, self._files)

    def _write(self, part: Path, weights: dict[str, Any], header: dict[str, Any]) -> None:
        tree, specs = _describe(weights)
        config = {"format": FORMAT, "format_version": FORMAT_VERSION, **header, "weights": specs}
        ocp = orbax_v1()
        with self._claim.writing(), _without_patterns(self.partial) as folder, orbax_context():
            ocp.save_checkpointables(folder / part, {"params": tree, "config": config})


@contextlib.contextmanager
def _without_patterns(folder: Path) -> Iterator[Path]:
    """The folder by a name that glob takes literally: Orbax looks for parts by patterns that begin with it."""
    if glob.escape(str(folder)) == str(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="spqr-") as place:
        link = Path(place) / "folder"
        link.symlink_to(folder, target_is_directory=True)
        yield link


def _describe(weights: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arrays of each weight, and what the checkpoint says of them."""
    tree, specs = {}, {}
    for name, weight in weights.items():
        leaves = leaves_of(weight)
        tree[name] = leaves
        specs[name] = {
            "kind": "spqr" if is_quantized(weight) else "dense",
            "shape": list(weight.shape),
            "leaves": {leaf: fingerprint(np.asarray(value)) for leaf, value in leaves.items()},
        }
        if is_quantized(weight):
            specs[name] |= {field: getattr(weight, field) for field in META_FIELDS}
    return tree, specs


def save(
    path: Path | str,
    params: Decoder,
    quantization: SpQRConfig | None = None,
    *,
    tokenizer: Any = None,
    provenance: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a model to a directory. It appears under its name only when it is complete.

    Args:
      path: the directory to make.
      params: the model, dense or quantized.
      quantization: how it was quantized, kept with the model; None if it was not.
      tokenizer: a transformers tokenizer to keep with the model, or None.
      provenance: a dictionary of JSON values that tells where the model comes from, or None.
      overwrite: replace an existing directory, once the new one is complete.

    Returns:
      ``path``, or the directory's other name if something else appeared at ``path`` during the writing.

    Raises:
      CheckpointError: ``path`` exists and ``overwrite`` is not set, another run writes to it, or the disk is full.

    Example:
      >>> path = spqr_jax.save("other", model, provenance={"model": "demo"})
      >>> path.name
      'other'
    """
    source = TreeSource(params)
    with (
        Claim(path, overwrite) as claim,
        CheckpointSink(claim, params.config, quantization, tokenizer=tokenizer, provenance=provenance) as sink,
    ):
        claim.need(sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
        sweep.forward(source, sink.put_block)
        sink.put_outer(source.outer())
    return sink.path
