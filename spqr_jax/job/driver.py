"""What of a model is quantized, and by which solver: its blocks' weights and its output head."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from spqr_jax._compat import give_back_memory
from spqr_jax.config import SpQRConfig
from spqr_jax.errors import DataError, NotFiniteError
from spqr_jax.job.block_solver import BlockSolver, Parallel, Sequential, Uncalibrated
from spqr_jax.job.group_solver import GroupSolver
from spqr_jax.methods import check_shards, quantize_weights
from spqr_jax.methods.report import Reporter
from spqr_jax.models.config import DecoderConfig
from spqr_jax.models.decoder import Outer, matrix_names
from spqr_jax.models.finite import advice
from spqr_jax.planning.ledger import Ledger
from spqr_jax.stream.activations import Activations
from spqr_jax.stream.blocks import BlockSource
from spqr_jax.stream.sums import KeepSums, SumsPlace


def quantizable_paths(model: DecoderConfig, config: SpQRConfig) -> list[str]:
    """Paths of the weights that `config` would quantize, in order."""
    kinds = enumerate(model.kinds)
    paths = [f"layers.{index}.{name}" for index, kind in kinds for name in matrix_names(model, kind)]
    paths = [path for path in paths if config.for_path(path) is not None]
    return paths if config.for_head(model.head_path) is None else [*paths, model.head_path]


def choose_solver(
    source: BlockSource,
    batches: Sequence[Any],
    activations: Activations | None,
    config: SpQRConfig,
    report: Reporter,
    ledger: Ledger | None,
    mesh: Mesh | None = None,
) -> BlockSolver:
    """The solver that a configuration asks for.

    Args:
      source: the dense model.
      batches: int32 [batch, seq] of token ids.
      activations: of these batches before the first block; None without calibration.
      config: how to quantize.
      report: told of each weight.
      ledger: keeps to a budget, or None where there is none.
      mesh: of devices that solve rows together, or None.
    """
    check_shards(config, source.config)
    weights = GroupSolver(config, report, ledger, mesh)
    if activations is None:
        return Uncalibrated(weights, source.config)
    if config.solver == "brecq":
        from spqr_jax.methods.brecq import BlockReconstruction  # it needs optax

        return BlockReconstruction(source, batches, config, report)
    if config.sequential:
        return Sequential(weights, activations.copy() if config.corrects_drift else None)
    return Parallel(weights)


def head_needs_text(path: str, config: SpQRConfig) -> bool:
    """Whether the output head is quantized on what it reads, not rounded to nearest."""
    chosen = config.for_head(path)
    return chosen is not None and chosen.needs_calibration


def quantized_head(
    path: str,
    outer: Outer,
    activations: Activations | None,
    config: SpQRConfig,
    report: Reporter,
    mesh: Mesh | None = None,
    *,
    begin: SumsPlace | None = None,
    keep: KeepSums | None = None,
) -> Outer:
    """The outer weights with a quantized output head, where `config` asks for one.

    Args:
      path: of the head, one of the outer weights' names.
      outer: dense.
      activations: the text behind all blocks; only read, and then dropped, if `head_needs_text`.
      config: how to quantize.
      report: told of the head.
      mesh: of devices that solve its rows together, or None.
      begin, keep: as `Activations.head_hessian` takes them.

    Raises:
      NotFiniteError: what the head reads is infinite or NaN.
    """
    chosen = config.for_head(path)
    if chosen is None:
        return outer
    weight = getattr(outer, path)
    hessian = None
    if activations is not None and chosen.needs_calibration:
        hessian = jax.block_until_ready(activations.head_hessian(outer, begin=begin, keep=keep))
        activations.drop()  # the head, the largest matrix, needs their memory
        give_back_memory()
    try:
        solved = quantize_weights([weight], hessian, [chosen], mesh)[0]
    except DataError as error:
        raise NotFiniteError(f"inputs of {path}: {error}; {advice(weight.dtype)}") from None
    report(path, solved.array, solved.stats)
    return dataclasses.replace(outer, **{path: solved.array})
