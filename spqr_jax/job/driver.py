"""The walk of a model from a source to a sink, block by block."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from spqr_jax.config import SpQRConfig
from spqr_jax.errors import DataError, NotFiniteError
from spqr_jax.job.block_solver import BlockSolver
from spqr_jax.job.report import OnLayer, Reporter
from spqr_jax.methods import quantize_weights
from spqr_jax.models.decoder import matrix_names, plain_linear
from spqr_jax.models.finite import advice
from spqr_jax.planning.budget import Ledger, Plan, plan_budget
from spqr_jax.stream.activations import Activations
from spqr_jax.stream.blocks import BlockSink, BlockSource
from spqr_jax.stream.spill import Spill
from spqr_jax.stream.stages import EXPERT_HESSIAN_BYTES, rounded_linear


def quantizable_paths(source: BlockSource, config: SpQRConfig) -> list[str]:
    """Paths of the weights that `config` would quantize, in order."""
    kinds = enumerate(source.config.kinds)
    paths = [f"layers.{index}.{name}" for index, kind in kinds for name in matrix_names(source.config, kind)]
    paths = [path for path in paths if config.for_path(path) is not None]
    return paths if config.for_head(source.config.head_path) is None else [*paths, source.config.head_path]


def quantize_blocks(
    source: BlockSource,
    sink: BlockSink,
    calib_batches: Iterable[Any] | None,
    config: SpQRConfig,
    *,
    on_layer: OnLayer | None = None,
    plan: Plan | None = None,
    spill: Spill | None = None,
    hessian_bytes: int = EXPERT_HESSIAN_BYTES,
) -> None:
    """Takes a model from a source to a sink, block by block, quantizing on the way.

    Only one block's dense weights and the activations of the calibration text
    are held. Arguments and errors as :func:`quantize`; `plan` is one made before
    for `config.target_bits`, or None to make it now; `spill` keeps activations on disk, and
    `hessian_bytes` limits the Hessians of experts that are summed at once.
    """
    outer = source.outer()
    report = Reporter(on_layer)
    activations, ledger = None, None
    if config.needs_calibration:
        if calib_batches is None:
            raise DataError("this configuration needs calibration batches; SpQRConfig.rtn() needs none")
        calib_batches = list(calib_batches)
        if plan is None and config.target_bits is not None:
            plan = plan_budget(source, calib_batches, config)
        if plan is not None:
            config, ledger = plan.config(config), Ledger(plan)
        linear = rounded_linear if config.calibration_dtype == "bfloat16" else plain_linear
        activations = Activations(source.config, outer, calib_batches, linear, spill, hessian_bytes)
    solver = BlockSolver(config, report, ledger, activations)
    whole_blocks = None
    if config.solver == "brecq":
        from spqr_jax.methods.brecq import BlockReconstruction  # it needs optax

        assert calib_batches is not None
        whole_blocks = BlockReconstruction(source, list(calib_batches), config, report)
    head = source.config.head_path
    own = config.for_head(head)
    calibrates_head = own is not None and own.needs_calibration
    for index in range(source.config.num_layers):
        block, prefix = source.block(index), f"layers.{index}."
        last = index + 1 == source.config.num_layers and not calibrates_head
        if whole_blocks is not None and activations is not None:
            block = whole_blocks.solve(activations, block, prefix)
        elif activations is None:
            block = solver.solve(block, matrix_names(source.config, block.kind), prefix, None)[0]
        elif config.sequential:
            block = solver.sequential(activations, block, prefix, last)
        else:
            block = solver.parallel(activations, block, prefix, last)
        solver.warn_of_starved(prefix)
        sink.put_block(index, block)
    if own is not None:
        hessian = activations.head_hessian(outer) if activations is not None and calibrates_head else None
        try:
            solved = quantize_weights([getattr(outer, head)], hessian, [own])[0]
        except DataError as error:
            raise NotFiniteError(f"inputs of {head}: {error}; {advice(getattr(outer, head).dtype)}") from None
        report(head, solved.array, solved.stats)
        outer = dataclasses.replace(outer, **{head: solved.array})
    sink.put_outer(outer)
