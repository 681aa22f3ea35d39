"""A model on its way from a source to a sink: plan, blocks, output head, tuning."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from spqr_jax._compat import few_lapack_threads, give_back_memory
from spqr_jax.config import SpQRConfig
from spqr_jax.errors import DataError
from spqr_jax.events import Event, Events, Remark, SafePoint, ignore
from spqr_jax.job.block_solver import BlockPlace
from spqr_jax.job.driver import choose_solver, head_needs_text, quantizable_paths, quantized_head
from spqr_jax.job.kept import NO_ROOM, Kept, QuantizingKeeper, ResultSink
from spqr_jax.job.pace import Pace
from spqr_jax.job.state import JobState
from spqr_jax.methods.report import LayerReport, Reporter
from spqr_jax.models.decoder import Block, plain_linear
from spqr_jax.output import readable_size
from spqr_jax.planning.budget import Plan, plan_budget
from spqr_jax.planning.curves import Measured
from spqr_jax.planning.ledger import Ledger
from spqr_jax.stream import sweep
from spqr_jax.stream.activations import KEPT_BYTES
from spqr_jax.stream.blocks import BlockSource, HostSource, TreeSink, as_source
from spqr_jax.stream.hosts import ALONE, Together
from spqr_jax.stream.mesh_activations import text_activations
from spqr_jax.stream.spill import Spill
from spqr_jax.stream.stages import EXPERT_HESSIAN_BYTES, rounded_linear
from spqr_jax.stream.windows import batched
from spqr_jax.tune.config import TuneConfig


@dataclasses.dataclass(frozen=True)
class JobReport:
    """What a job did.

    Attributes:
      config: how the model was quantized; where there was a plan, with its choices as rules.
      plan: how the bits were spent; None without a target.
      layers: one report for each quantized weight, in order.
      seconds: wall-clock time, of all runs where it went on with one.
    """

    config: SpQRConfig
    plan: Plan | None
    layers: tuple[LayerReport, ...]
    seconds: float


class Job:
    """Quantizes a model, one block at a time.

    Only one block's dense weights and the activations of the calibration text are held.

    Args:
      source: the dense model.
      sink: takes the quantized one.
      batches: calibration text, int32 [batch, seq] of token ids each; None where nothing needs any.
      config: how to quantize.
      tuning: how to train afterwards; None for not at all.
      plan: made before for `config.target_bits`; None to make it now.
      kept: saves the state at safe points, and goes on with a state that is there; None to save nothing.
      mesh: devices that calibration is spread over; None for one device.
      together: the processes of the mesh, where they all do this job; the first one then plans and tunes for all.
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
        kept: Kept | None = None,
        mesh: Mesh | None = None,
        together: Together = ALONE,
        spill: Spill | None = None,
        hessian_bytes: int = EXPERT_HESSIAN_BYTES,
    ) -> None:
        self._source, self._sink = source, sink
        self._config, self._tuning, self._plan = config.resolved(), tuning, plan
        self._kept, self._mesh, self._together = kept, mesh, together
        self._spill, self._hessian_bytes = spill, hessian_bytes
        self._state = JobState(None if kept is None else kept.journal)
        self._pace = Pace()
        self._unsaved: Callable[[], None] | None = None
        self._saves_measured_text: bool | None = None
        needed = config.needs_calibration or tuning is not None
        if needed and batches is None:
            raise DataError("this configuration needs calibration batches; SpQRConfig.rtn() needs none")
        self._batches: Sequence[Any] = list(batches or ()) if needed else []

    def run(self, events: Events = ignore) -> JobReport:
        """Does all of it, or what an earlier run has left to do.

        Args:
          events: told of each step of ``measuring``, ``quantizing`` and ``tuning``.

        Raises:
          DataError: the text cannot be used.
          NotFiniteError: activations are infinite or NaN. The message says at which weight this begins.
          SpQRError: the model or the configuration cannot be used.
        """
        few_lapack_threads(max(self._source.config.hidden_size, self._source.config.intermediate_size))
        self._adopt()
        plan = self._planned(events)
        config = self._config if plan is None else plan.config(self._config)
        self._sink.describe(config)
        layers = self._state.layers()
        for layer in layers:
            self._record(layer)
        report = Reporter(len(quantizable_paths(self._source.config, config)), self._recording(events), layers)
        store = self._store()
        if self._state.phase in ("plan", "blocks"):
            if store is not self._sink:
                store.describe(config)
            self._quantize(store, config, plan, report, events)
        if self._tuning is not None and self._state.phase != "done":
            quantized, tuning = store.params() if isinstance(store, TreeSink) else store, self._tuning
            self._together.from_first(lambda: self._tune(quantized, tuning, events))
        self._state.save(phase="done", result=self._result_digests())
        return JobReport(config, plan, tuple(report.layers), self._state.seconds)

    # ---- what goes where --------------------------------------------------------------------

    def _store(self) -> ResultSink:
        """What takes quantized blocks: the sink, unless they are still to be trained."""
        if self._kept is not None:
            return self._kept.blocks
        return self._sink if self._tuning is None else TreeSink(self._source.config)

    def _adopt(self) -> None:
        """Takes over what an earlier run has finished, and removes what it has not."""
        if self._kept is None or not self._state.entries:
            return
        self._kept.blocks.adopt(self._state.blocks())
        if self._tuning is not None:
            self._kept.result.adopt(self._state.entries.get("result", {}))

    def _result_digests(self) -> dict[str, str] | None:
        return None if self._kept is None else self._kept.result.digests()

    def _record(self, layer: LayerReport) -> None:
        stats = dataclasses.asdict(layer.stats)
        self._sink.record(layer.path, stats)
        if self._kept is not None:
            self._kept.blocks.record(layer.path, stats)

    def _recording(self, events: Events) -> Events:
        """Events that the sink keeps the statistics of."""

        def told(event: Event) -> None:
            if isinstance(event.detail, LayerReport):
                self._record(event.detail)
            events(event)

        return told

    # ---- plan -------------------------------------------------------------------------------

    def _planned(self, events: Events) -> Plan | None:
        """The plan for a target, made now unless it was given or an earlier run has made it."""
        if self._config.target_bits is None:
            return self._plan
        plan, count = self._plan or self._state.plan(), 2 * self._source.config.num_layers
        if plan is None:
            plan = self._together.from_first(lambda: self._made_plan(events))
            self._state.save(phase="blocks", plan=self._state.put_plan(plan), measured=None)
        events(Event("measuring", count, count, "planned", plan))
        return plan

    def _made_plan(self, events: Events) -> Plan:
        return plan_budget(
            self._source, self._batches, self._config, self._safe_points(events),
            begin=self._state.measured(),
            keep=None if self._kept is None else lambda measured: self._keep_measured(measured, events),
            spill=self._spill,
        )  # fmt: skip

    def _keep_measured(self, measured: Measured, events: Events) -> None:
        """Saves where the measuring pass is, if it is time."""
        assert self._kept is not None
        if self._saves_measured_text is None:
            size = (1 + self._source.config.num_layers) * sum(stream.nbytes for stream in measured.place.streams)
            self._saves_measured_text = self._kept.has_room(size)
            if not self._saves_measured_text:
                text = f"activations of the measuring pass ({readable_size(size)}) are not saved: {NO_ROOM}"
                events(Event("measuring", 0, 0, detail=Remark(text)))
        with_text = self._saves_measured_text
        self._offer(lambda: self._state.save_measured(measured, with_text))

    # ---- safe points of long phases ---------------------------------------------------------

    def _offer(self, save: Callable[[], None]) -> None:
        """Work can be saved now: does so once a minute; else the next event offers to."""
        self._unsaved = None if self._pace.save_if_due(save) else save

    def _safe_points(self, events: Events) -> Events:
        """Events of a phase that offers its work before each of them."""

        def told(event: Event) -> None:
            save, self._unsaved = self._unsaved, None
            events(dataclasses.replace(event, detail=SafePoint() if save is None else SafePoint(save)))

        return told

    # ---- blocks and the head ----------------------------------------------------------------

    def _quantize(
        self, store: ResultSink, config: SpQRConfig, plan: Plan | None, report: Reporter, events: Events
    ) -> None:
        """Blocks, then the outer weights with the head."""
        source = self._source if self._mesh is None else HostSource(self._source)
        model, outer, activations = source.config, source.outer(), None
        if config.needs_calibration:
            linear = rounded_linear if config.calibration_dtype == "bfloat16" else plain_linear
            activations = text_activations(
                model, outer, self._batches, linear, mesh=self._mesh, spill=self._spill,
                hessian_bytes=self._hessian_bytes,
            )  # fmt: skip
        ledger = None if plan is None else Ledger(plan)
        solver = choose_solver(self._source, self._batches, activations, config, report, ledger, self._mesh)
        reads_end = head_needs_text(model.head_path, config)
        keeper, first, places = None, 0, dict[int, BlockPlace]()
        if self._kept is not None:
            keeper = QuantizingKeeper(
                self._kept, self._state, activations, solver, report, ledger, events, self._spill is not None
            )
            first, place = keeper.go_on(source, reads_end)
            places = {} if place is None else {first: place}

        def visit(index: int, block: Block) -> None:
            last = index + 1 == model.num_layers and not reads_end
            begin, keep = places.pop(index, None), None if keeper is None else keeper.inside(index)
            store.put_block(index, solver.solve(activations, block, f"layers.{index}.", last, begin, keep))
            give_back_memory(KEPT_BYTES)  # else what the C library keeps grows from block to block
            if keeper is not None:
                keeper.after_block(index, last)

        sweep.forward(source, visit, first=first)
        if not reads_end:  # the head, the largest matrix, needs their memory
            activations = None
            give_back_memory()
        begin = places.pop(model.num_layers, None)
        head = quantized_head(
            model.head_path, outer, activations, config, report, self._mesh,
            begin=None if begin is None else begin.sums, keep=None if keeper is None else keeper.inside_head,
        )  # fmt: skip
        store.put_outer(head)
        if keeper is not None:
            keeper.after_head("tune" if self._tuning is not None else "done")

    # ---- tuning -----------------------------------------------------------------------------

    def _tune(self, quantized: Any, tuning: TuneConfig, events: Events) -> None:
        """Trains the quantized model and puts it."""
        from spqr_jax.tune.objectives import TuningPlace, tune_into  # they need optax

        batches = regrouped(self._batches, tuning.batch_tokens)
        place, kept = self._state.tuning_place(), self._kept is not None
        tune_into(
            as_source(quantized), self._sink, self._source, batches, tuning, self._safe_points(events),
            begin=None if place is None else TuningPlace(*place), keep=self._keep_tuning if kept else None,
        )  # fmt: skip

    def _keep_tuning(self, place: Any) -> None:
        """Saves a `TuningPlace`, if it is time."""
        assert self._kept is not None
        result = self._kept.result
        self._offer(lambda: self._state.save_tuning(place.done, place.arrays, result.digests()))


def regrouped(batches: Sequence[Any], tokens_per_batch: int) -> Sequence[np.ndarray]:
    """The same text in batches of about so many tokens; as it is where its sequences differ in length."""
    arrays = [np.asarray(batch) for batch in batches]
    if len({array.shape[1:] for array in arrays}) != 1:
        return arrays
    return batched(np.concatenate(arrays), tokens_per_batch)
