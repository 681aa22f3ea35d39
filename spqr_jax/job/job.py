"""A model on its way from a source to a sink: plan, blocks, output head, tuning."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from spqr_jax.config import SpQRConfig
from spqr_jax.errors import DataError
from spqr_jax.events import Event, Events, ignore
from spqr_jax.job.driver import choose_solver, head_needs_text, quantizable_paths, quantized_head
from spqr_jax.methods.report import LayerReport, Reporter
from spqr_jax.models.decoder import Block, Decoder, plain_linear
from spqr_jax.planning.budget import Ledger, Plan, plan_budget
from spqr_jax.stream import sweep
from spqr_jax.stream.activations import Activations
from spqr_jax.stream.blocks import BlockSink, BlockSource, TreeSink, TreeSource
from spqr_jax.stream.spill import Spill
from spqr_jax.stream.stages import EXPERT_HESSIAN_BYTES, rounded_linear
from spqr_jax.stream.windows import batched

if TYPE_CHECKING:
    from spqr_jax.tune import TuneConfig


class ResultSink(BlockSink, Protocol):
    """Takes a quantized model's parts, and what is kept with them."""

    def record(self, path: str, stats: dict[str, float]) -> None:
        """Keeps what quantizing a weight did; before its block, or the outer weights, are put."""
        ...

    def describe(self, quantization: SpQRConfig) -> None:
        """Keeps how the model was quantized; before the outer weights are put."""
        ...


@dataclasses.dataclass(frozen=True)
class JobReport:
    """What a job did.

    Attributes:
      config: how the model was quantized; where there was a plan, with its choices as rules.
      plan: how the bits were spent; None without a target.
      layers: one report for each quantized weight, in order.
      seconds: wall-clock time.
    """

    config: SpQRConfig
    plan: Plan | None
    layers: tuple[LayerReport, ...]
    seconds: float


class Job:
    """Quantizes a model, one block at a time.

    Only one block's dense weights and the activations of the calibration text are held; tuning
    holds the quantized model.

    Args:
      source: the dense model.
      sink: takes the quantized one.
      batches: calibration text, int32 [batch, seq] of token ids each; None where nothing needs any.
      config: how to quantize.
      tuning: how to train afterwards; None for not at all.
      plan: made before for `config.target_bits`; None to make it now.
      spill: where activations are kept on disk; None to keep them in memory.
      hessian_bytes: of experts' Hessians that are summed at once. It does not change the result.
    """

    def __init__(
        self,
        source: BlockSource,
        sink: ResultSink,
        batches: Iterable[Any] | None,
        config: SpQRConfig,
        tuning: TuneConfig | None = None,
        plan: Plan | None = None,
        *,
        spill: Spill | None = None,
        hessian_bytes: int = EXPERT_HESSIAN_BYTES,
    ) -> None:
        self._source, self._sink = source, sink
        self._config, self._tuning, self._plan = config, tuning, plan
        self._spill, self._hessian_bytes = spill, hessian_bytes
        needed = config.needs_calibration or tuning is not None
        if needed and batches is None:
            raise DataError("this configuration needs calibration batches; SpQRConfig.rtn() needs none")
        self._batches: Sequence[Any] = list(batches or ()) if needed else []

    def run(self, events: Events = ignore) -> JobReport:
        """Does all of it.

        Args:
          events: told of each step of ``measuring``, ``quantizing`` and ``tuning``.

        Raises:
          DataError: the text cannot be used.
          NotFiniteError: activations are infinite or NaN. The message says at which weight this begins.
          SpQRError: the model or the configuration cannot be used.
        """
        begun = time.perf_counter()
        plan = self._planned(events)
        config = self._config if plan is None else plan.config(self._config)
        self._sink.describe(config)
        report = Reporter(len(quantizable_paths(self._source, config)), self._recording(events))
        if self._tuning is None:
            self._quantize(self._sink, config, plan, report)
        else:
            untuned = TreeSink(self._source.config)
            self._quantize(untuned, config, plan, report)
            self._tune(untuned.params(), self._tuning, events)
        return JobReport(config, plan, tuple(report.layers), time.perf_counter() - begun)

    def _recording(self, events: Events) -> Events:
        """Events that the sink keeps the statistics of."""

        def told(event: Event) -> None:
            if isinstance(event.detail, LayerReport):
                self._sink.record(event.detail.path, dataclasses.asdict(event.detail.stats))
            events(event)

        return told

    def _planned(self, events: Events) -> Plan | None:
        """The plan for a target, made now unless it was given."""
        if self._plan is not None or self._config.target_bits is None:
            return self._plan
        plan = plan_budget(self._source, self._batches, self._config, events, self._spill)
        count = 2 * self._source.config.num_layers
        events(Event("measuring", count, count, "planned", plan))
        return plan

    def _quantize(self, sink: BlockSink, config: SpQRConfig, plan: Plan | None, report: Reporter) -> None:
        """Blocks, then the outer weights with the head."""
        model, outer, activations = self._source.config, self._source.outer(), None
        if config.needs_calibration:
            linear = rounded_linear if config.calibration_dtype == "bfloat16" else plain_linear
            activations = Activations(model, outer, self._batches, linear, self._spill, self._hessian_bytes)
        ledger = None if plan is None else Ledger(plan)
        solver = choose_solver(self._source, self._batches, activations, config, report, ledger)
        reads_end = head_needs_text(model.head_path, config)

        def visit(index: int, block: Block) -> None:
            last = index + 1 == model.num_layers and not reads_end
            sink.put_block(index, solver.solve(activations, block, f"layers.{index}.", last))

        sweep.forward(self._source, visit)
        sink.put_outer(quantized_head(model.head_path, outer, activations, config, report))

    def _tune(self, params: Decoder, tuning: TuneConfig, events: Events) -> None:
        """Trains the quantized model and puts it."""
        from spqr_jax.tune.objectives import tune_into  # it needs optax

        batches = regrouped(self._batches, tuning.batch_tokens)
        tune_into(TreeSource(params), self._sink, self._source, batches, tuning, events)


def regrouped(batches: Sequence[Any], tokens_per_batch: int) -> Sequence[np.ndarray]:
    """The same text in batches of about so many tokens; as it is where its sequences differ in length."""
    arrays = [np.asarray(batch) for batch in batches]
    if len({array.shape[1:] for array in arrays}) != 1:
        return arrays
    return batched(np.concatenate(arrays), tokens_per_batch)
