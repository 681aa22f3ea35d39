"""Checkpoints that grow block by block and get their name when whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from spqr_jax.atomic import AtomicDirectory
from spqr_jax.checkpoint.growing import CheckpointFolder
from spqr_jax.config import SpQRConfig
from spqr_jax.errors import CheckpointError
from spqr_jax.files.companions import write_files
from spqr_jax.methods.report import LayerReport
from spqr_jax.models.config import DecoderConfig
from spqr_jax.models.decoder import Block, Decoder, Outer
from spqr_jax.output import Claim
from spqr_jax.parallel import ShardedDecoder, ShardedSource
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
        self._tokenizer, self._files = tokenizer, files or {}
        with self._claim.writing():
            self._parts = CheckpointFolder(
                self.partial, config, quantization, provenance=provenance, durable=self._claim.run is not None
            )

    @property
    def config(self) -> DecoderConfig:
        """Of the model."""
        return self._parts.config

    @property
    def layer_stats(self) -> dict[str, dict[str, float]]:
        """Path -> what quantizing the weight did, for every weight recorded, also by the run that this one goes on."""
        return self._parts.layer_stats

    def record(self, path: str, stats: dict[str, float]) -> None:
        """Keeps what quantizing the weight at `path` did; call before its block is put."""
        self._parts.record(path, stats)

    def describe(self, quantization: SpQRConfig) -> None:
        """Keeps how the model was quantized, where that is known only now; call before the outer weights are put."""
        self._parts.describe(quantization)

    def put_block(self, index: int, block: Block) -> None:
        with self._claim.writing():
            self._parts.put_block(index, block)

    def put_outer(self, outer: Outer) -> None:
        with self._claim.writing():
            self._parts.put_outer(outer)

    def block(self, index: int) -> Block:
        """A block that was put or adopted, verified."""
        return self._parts.block(index)

    def outer(self) -> Outer:
        """The outer weights that were put or adopted, verified."""
        return self._parts.outer()

    def digest(self, part: int | str) -> str:
        """SHA-256 of a part: the index of a block, or "model"; for the state of a run and `adopt`."""
        return self._parts.digest(part)

    def digests(self) -> dict[str, str]:
        """Digests of all parts that were put or adopted: index of a block, or "model" -> SHA-256."""
        return self._parts.digests()

    def adopt(self, digests: Mapping[Any, str]) -> None:
        """Takes over the parts that a stopped run finished, verified, and removes everything else that it wrote.

        Args:
          digests: index of a block, or "model" -> SHA-256, as `digests` gave it.

        Raises:
          CheckpointError: a part is missing, damaged or another one.
        """
        self._parts.adopt(digests)

    def finish(self) -> None:
        """Keeps the tokenizer and other files, once every part was put."""
        if missing := self._parts.missing():
            raise CheckpointError(f"the checkpoint is incomplete: {', '.join(missing)} were never written")
        if self._tokenizer is not None:
            self._tokenizer.save_pretrained(self.partial)
        write_files(self.partial, self._files)


def save(
    path: Path | str,
    params: Decoder | ShardedDecoder,
    quantization: SpQRConfig | None = None,
    *,
    tokenizer: Any = None,
    provenance: dict[str, Any] | None = None,
    report: Iterable[LayerReport] = (),
    overwrite: bool = False,
) -> Path:
    """Writes a model to a directory. It appears under its name only when it is complete.

    Args:
      path: the directory to make.
      params: the model, dense or quantized. A model on several devices is put together block by block, so that any
        number of devices can load it. With several processes all must call `save`; the first one writes.
      quantization: how it was quantized, kept with the model; None if it was not.
      tokenizer: a transformers tokenizer to keep with the model, or None.
      provenance: a dictionary of JSON values that tells where the model comes from, or None.
      report: what quantizing each weight did, kept with the model; see `quantize`'s ``events``.
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
    source = ShardedSource(params) if isinstance(params, ShardedDecoder) else TreeSource(params)
    if isinstance(params, ShardedDecoder) and jax.process_index() > 0:  # it takes part in the exchange of pieces
        sweep.forward(source, lambda index, block: None, read_ahead=False)
        source.outer()
        multihost_utils.sync_global_devices("saved")
        return Path(path)
    with (
        Claim(path, overwrite) as claim,
        CheckpointSink(claim, params.config, quantization, tokenizer=tokenizer, provenance=provenance) as sink,
    ):
        claim.need(sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
        for layer in report:
            sink.record(layer.path, dataclasses.asdict(layer.stats))
        sweep.forward(source, sink.put_block, read_ahead=False)  # in memory; a read may be an exchange of pieces
        sink.put_outer(source.outer())
    if isinstance(params, ShardedDecoder) and jax.process_count() > 1:
        multihost_utils.sync_global_devices("saved")
    return sink.path
