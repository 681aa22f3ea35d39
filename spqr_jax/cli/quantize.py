"""`spqr quantize`: a model, calibration text and options in, a directory out."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import typer

from spqr_jax._compat import keep_freed_memory
from spqr_jax.checkpoint import CheckpointSource
from spqr_jax.cli.amount import AUTO, Amount
from spqr_jax.cli.display import EventView, console, describe_head, errors, say, size, tell, write_json
from spqr_jax.cli.next_step import after_writing
from spqr_jax.cli.options import (
    Calibration,
    CalibrationSeed,
    CalibrationSeqLen,
    Dtype,
    Hosts,
    Json,
    Mesh,
    Model,
    Overwrite,
    Restart,
    Resume,
    build_config,
    build_tuning,
    parse_mesh,
    parse_rule,
)
from spqr_jax.cli.outlook import before_quantize
from spqr_jax.cli.plans import given_plan, saving_plan
from spqr_jax.cli.quantize_options import (
    Amount as Windows,
)
from spqr_jax.cli.quantize_options import (
    Bits,
    CalibrationDtype,
    Damping,
    DriftCorrection,
    Fit,
    GroupSize,
    HeadBits,
    InputShards,
    MachineName,
    MaxMemory,
    MaxMinutes,
    Method,
    Order,
    OutlierThreshold,
    OutUnlessPlanning,
    PlanOnly,
    Preset,
    Rule,
    SavePlan,
    Sequential,
    StatsBits,
    StatsGroupSize,
    Steps,
    TargetBits,
    TuneEpochs,
    TuneLearningRate,
    TuneObjective,
    UsePlan,
)
from spqr_jax.cli.scale import MemoryWatch, dry_run, needed_out
from spqr_jax.config import SpQRConfig
from spqr_jax.errors import ModelError, SpQRError
from spqr_jax.estimate import quantized_bytes
from spqr_jax.inspection import summarize
from spqr_jax.job.directory import quantize_to, take_part
from spqr_jax.job.job import JobReport
from spqr_jax.output import AlreadyFinished, Claim
from spqr_jax.output.run_folder import Run
from spqr_jax.resolve import OpenedModel, default_dtype, open_model
from spqr_jax.stream.hosts import ALONE, Together, start_hosts
from spqr_jax.stream.windows import batched
from spqr_jax.terminal import interrupt
from spqr_jax.texts import read_calibration
from spqr_jax.tune.config import TuneConfig


def quantize(
    context: typer.Context,
    model: Model,
    out: OutUnlessPlanning = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    restart: Restart = False,
    json: Json = None,
    preset: Preset = None,
    target_bits: TargetBits = None,
    bits: Bits = None,
    outlier_threshold: OutlierThreshold = None,
    head_bits: HeadBits = None,
    rule: Rule = None,
    calib: Calibration = None,
    nsamples: Windows = AUTO,
    max_minutes: MaxMinutes = None,
    seqlen: CalibrationSeqLen = 2048,
    seed: CalibrationSeed = 0,
    tune: TuneObjective = "none",
    tune_epochs: TuneEpochs = None,
    tune_learning_rate: TuneLearningRate = None,
    method: Method = "spqr",
    steps: Steps = None,
    group_size: GroupSize = None,
    stats_bits: StatsBits = None,
    stats_group_size: StatsGroupSize = None,
    fit: Fit = None,
    order: Order = None,
    input_shards: InputShards = None,
    damping: Damping = None,
    drift_correction: DriftCorrection = None,
    sequential: Sequential = None,
    calibration_dtype: CalibrationDtype = None,
    save_plan: SavePlan = None,
    use_plan: UsePlan = None,
    dtype: Dtype = None,
    max_memory: MaxMemory = None,
    plan_only: PlanOnly = False,
    machine: MachineName = None,
    mesh: Mesh = None,
    hosts: Hosts = None,
) -> None:
    """Compress a model and save it."""
    keep_freed_memory()
    together = _join_hosts(hosts)
    with together.watched(interrupt.received, interrupt.ask):
        mesh = "auto" if mesh is None and hosts is not None else mesh
        tuning = build_tuning(tune, epochs=tune_epochs, learning_rate=tune_learning_rate)
        config = build_config(
            method, preset, target_bits=target_bits, bits=bits, group_size=group_size, stats_bits=stats_bits,
            stats_group_size=stats_group_size, outlier_threshold=outlier_threshold, damping=damping,
            drift_correction=drift_correction, calibration_dtype=calibration_dtype, order=order, fit=fit,
            input_shards=input_shards, sequential=sequential, steps=steps,
            rules=tuple(parse_rule(text) for text in rule or ()), head_bits=head_bits,
        )  # fmt: skip
        amount = Amount.parse(nsamples, seqlen, max_minutes)
        if plan_only:
            dry_run(model, method, config, amount, tuning, dtype, machine, mesh, max_memory, json)
            return
        config, out = together.from_first(config.resolved), needed_out(out, machine)
        claim = _claim(context, together, out, overwrite, resume, restart)
        opened = _open_dense(model, dtype, claim, config)
        plan = together.from_first(lambda: given_plan(use_plan, opened.source.config, config))
        windows, calibration = _read_text(together, amount, calib, opened, config, tuning, dtype, method, seed)
        outlook = before_quantize(opened, method, config, calibration, tuning, dtype)
        devices = None if mesh is None else parse_mesh(mesh)
        watch = MemoryWatch(opened.source.config, config, windows, tuning, dtype, max_memory, devices)
        watch.thrift = together.from_first(lambda: watch.thrift)  # the same chunks in all processes
        batches = None if windows is None else batched(windows, watch.thrift.chunk_tokens)
        spill, at_once = context.with_resource(watch.spill(out)), watch.thrift.hessian_bytes
        job: dict[str, Any] = {
            "tuning": tuning, "plan": plan, "mesh": devices, "together": together, "spill": spill,
            "hessian_bytes": at_once,
        }  # fmt: skip
        done = _run(claim, opened, batches, config, _provenance(opened, method, calibration), save_plan, job)
        if done is None:
            return
        place, report = done
        summary = _show_result(place, report, watch)
        write_json(json, {"seconds": report.seconds, **outlook.to_json(), **watch.to_json(), **summary})
        outlook.end(after_writing(out), opened.note)


def _join_hosts(hosts: str | None) -> Together:
    """Joins the processes of ``--hosts``; all but the first say nothing."""
    if hosts is None:
        return ALONE
    together = start_hosts(hosts)
    console.quiet = errors.quiet = not together.is_first
    return together


def _claim(
    context: typer.Context, together: Together, out: Path, overwrite: bool, resume: bool, restart: bool
) -> Claim | None:
    """The result's name, and what to do with an unfinished run of that name.

    Of several processes the first one has the name, the others None.
    """
    if resume and restart:
        raise SpQRError("--resume goes on with a run, --restart begins again: give one of them")
    claims: list[Claim] = []
    run: Run = "resume" if resume else "restart" if restart else "new"
    try:
        together.from_first(lambda: claims.append(context.with_resource(Claim(out, overwrite, run=run))))
    except AlreadyFinished as error:
        say(str(error))
        raise typer.Exit from None
    return claims[0] if claims else None


def _open_dense(model: str, dtype: str | None, claim: Claim | None, config: SpQRConfig) -> OpenedModel:
    """The model, and room for its result."""
    opened = open_model(model, dtype, say)
    if opened.quantized:
        raise ModelError(f"{model} is already quantized: give the original model instead")
    if claim is not None:
        claim.need(quantized_bytes(opened.source.config, config, jnp.dtype(dtype or default_dtype()).itemsize))
    return opened


def _read_text(
    together: Together,
    amount: Amount,
    calib: list[str] | None,
    opened: OpenedModel,
    config: SpQRConfig,
    tuning: TuneConfig | None,
    dtype: str | None,
    method: str,
    seed: int,
) -> tuple[np.ndarray | None, dict[str, Any] | None]:
    """Windows of calibration text and what is kept about them; None where none is needed."""
    if not config.needs_calibration and tuning is None:
        if calib:
            say(f"--method {method} uses no calibration text: --calib is ignored")
        return None, None
    text = together.from_first(lambda: amount.text(opened.source.config, config, tuning, dtype))
    return read_calibration(calib, opened, text.seqlen, text.windows, seed)


def _run(
    claim: Claim | None,
    opened: OpenedModel,
    batches: Sequence[Any] | None,
    config: SpQRConfig,
    provenance: dict[str, Any],
    save_plan: Path | None,
    job: dict[str, Any],
) -> tuple[Path, JobReport] | None:
    """Does the work and shows it; None in a process that writes no result. `job` is for `quantize_to`."""
    together = job["together"]
    with EventView() as view, interrupt.at_safe_points():
        told = saving_plan(view, save_plan, config) if together.is_first else view
        events = together.stopping(told, interrupt.received)
        if claim is None:
            take_part(opened.source, batches, config, events=events, **job)
            return None
        files = _files_to_keep(opened)
        return quantize_to(
            claim, opened.source, batches, config, events=events, files=files, provenance=provenance, **job
        )


def _provenance(opened: OpenedModel, method: str, calibration: dict[str, Any] | None) -> dict[str, Any]:
    """Where the model comes from, and how to make it again."""
    return {
        "model": opened.label,
        "method": method,
        "calibration": calibration,
        "command": shlex.join(["spqr", *(word for word in sys.argv[1:] if word not in ("--resume", "--restart"))]),
        "source_quantization": opened.quantized_by,
    }


def _files_to_keep(opened: OpenedModel) -> dict[str, bytes]:
    """The model's configurations and its tokenizer's files, as they are."""
    try:
        opened.tokenizer()
        return opened.configurations() | opened.tokenizer_files()
    except ModelError as error:
        say(f"the tokenizer is not copied: {error}")
        return opened.configurations()


def _show_result(place: Path, report: JobReport, watch: MemoryWatch) -> dict[str, Any]:
    """The line that a run ends with; returns the checkpoint's summary."""
    summary = summarize(CheckpointSource(place))
    tell(
        (str(place), "bold"),
        f": {summary['stored_bits']:.3f} stored bits per weight (ideal: {summary['ideal_bits']:.3f}), "
        f"{summary['outlier_percent']:.2f}% outliers; {describe_head(summary)}; {size(summary['bytes'])} in total "
        f"(dense: {size(summary['dense_bytes'])}); {report.seconds:.0f} s; {watch.measured()}",
    )
    return summary
