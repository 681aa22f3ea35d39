"""The `spqr` command."""

from __future__ import annotations

import dataclasses
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax.numpy as jnp
import typer

from spqr_jax.checkpoint import CheckpointSink, CheckpointSource
from spqr_jax.cli import interrupt
from spqr_jax.cli.bench import bench
from spqr_jax.cli.display import (
    QuantizeProgress,
    describe_head,
    number,
    progress_bar,
    say,
    show_plan,
    size,
    table,
    tell,
    write_json,
)
from spqr_jax.cli.examples import EXAMPLES, START
from spqr_jax.cli.exchange import export, import_original
from spqr_jax.cli.generate import generate
from spqr_jax.cli.help import EXCHANGE, MAKE, MEASURE, USE, PlainTyper, argument, flag
from spqr_jax.cli.main import run
from spqr_jax.cli.measure import compare, perplexity
from spqr_jax.cli.next_step import after_writing
from spqr_jax.cli.options import (
    Calibration,
    CalibrationSeed,
    CalibrationSeqLen,
    Dtype,
    Json,
    Model,
    Overwrite,
    Windows,
    build_config,
    build_tuning,
    parse_rule,
    read_calibration,
)
from spqr_jax.cli.outlook import before_quantize
from spqr_jax.cli.quantize_options import (
    Bits,
    CalibrationDtype,
    Damping,
    DriftCorrection,
    Fit,
    GroupSize,
    HeadBits,
    MachineName,
    MaxMemory,
    Method,
    Order,
    OutlierThreshold,
    OutUnlessPlanning,
    PlanOnly,
    Preset,
    Rule,
    Sequential,
    StatsBits,
    StatsGroupSize,
    Steps,
    TargetBits,
    TuneEpochs,
    TuneLearningRate,
    TuneObjective,
)
from spqr_jax.cli.report import analyze, report
from spqr_jax.cli.scale import MemoryWatch, Run, dry_run, needed_out, this_layout
from spqr_jax.cli.stream import describe_products
from spqr_jax.cli.version import show_version
from spqr_jax.cli.zero_shot import evaluate
from spqr_jax.errors import ModelError
from spqr_jax.estimate import quantized_bytes
from spqr_jax.forecast import Text
from spqr_jax.inspection import summarize
from spqr_jax.job.driver import quantizable_paths, quantize_blocks
from spqr_jax.output import Claim
from spqr_jax.planning.budget import plan_budget
from spqr_jax.resolve import OpenedModel, default_dtype, open_model
from spqr_jax.stream.blocks import TreeSink
from spqr_jax.stream.windows import batched
from spqr_jax.tune import TuneConfig
from spqr_jax.tune import tune as tune_model

app = PlainTyper(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Compress large language models to 3–4 bits per weight and run them, in JAX.",
    epilog=START,
)


@app.callback()
def settings(
    version: Annotated[
        bool,
        flag(
            None,
            "--version",
            "Show the versions of spqr-jax, JAX and Python, and the device.",
            is_eager=True,
            callback=show_version,
        ),
    ] = False,
) -> None:
    """What `spqr` takes before a command."""


def quantize(
    context: typer.Context,
    model: Model,
    out: OutUnlessPlanning = None,
    overwrite: Overwrite = False,
    json: Json = None,
    preset: Preset = None,
    target_bits: TargetBits = None,
    bits: Bits = None,
    outlier_threshold: OutlierThreshold = None,
    head_bits: HeadBits = None,
    rule: Rule = None,
    calib: Calibration = None,
    nsamples: Windows = 128,
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
    damping: Damping = None,
    drift_correction: DriftCorrection = None,
    sequential: Sequential = None,
    calibration_dtype: CalibrationDtype = None,
    dtype: Dtype = None,
    max_memory: MaxMemory = None,
    plan_only: PlanOnly = False,
    machine: MachineName = None,
) -> None:
    """Compress a model and save it."""
    tuning = build_tuning(tune, epochs=tune_epochs, learning_rate=tune_learning_rate)
    config = build_config(
        method,
        preset,
        target_bits=target_bits,
        bits=bits,
        group_size=group_size,
        stats_bits=stats_bits,
        stats_group_size=stats_group_size,
        outlier_threshold=outlier_threshold,
        damping=damping,
        drift_correction=drift_correction,
        calibration_dtype=calibration_dtype,
        order=order,
        fit=fit,
        sequential=sequential,
        steps=steps,
        rules=tuple(parse_rule(text) for text in rule or ()),
        head_bits=head_bits,
    )
    if plan_only:
        text = Text(nsamples, seqlen) if config.needs_calibration or tuning is not None else Text(0, 2)
        dry_run(model, method, config, text, tuning, dtype, machine, None, max_memory, json)
        return
    out = needed_out(out, machine)
    claim = context.with_resource(Claim(out, overwrite))
    opened = open_model(model, dtype, say)
    if opened.quantized:
        raise ModelError(f"{model} is already quantized: give the original model instead")
    claim.need(quantized_bytes(opened.source, config, jnp.dtype(dtype or default_dtype()).itemsize))
    batches, calibration, windows = None, None, None
    if config.needs_calibration or tuning is not None:
        windows, calibration = read_calibration(calib, opened, seqlen, nsamples, seed)
    elif calib:
        say(f"--method {method} uses no calibration text: --calib is ignored")
    outlook = before_quantize(opened, method, config, calibration, tuning, dtype)
    text = Text(0, 2) if windows is None else Text(*windows.shape)
    run_shape = Run(opened.source.config, config, text, tuning, dtype or default_dtype(), this_layout())
    memory_watch = MemoryWatch(run_shape, max_memory)
    if windows is not None:
        batches = batched(windows, memory_watch.thrift.chunk_tokens)
    spill = context.with_resource(memory_watch.spill(out))
    begun = time.perf_counter()
    plan = None
    if config.target_bits is not None:
        assert batches is not None
        with progress_bar("measuring", 2 * opened.source.config.num_layers) as advance:
            plan = plan_budget(opened.source, batches, config, advance)
        show_plan(plan)
        config = plan.config(config)
    paths = quantizable_paths(opened.source, config)
    provenance: dict[str, Any] = {"model": model, "method": method, "calibration": calibration, "tuned": None}
    provenance["command"] = shlex.join(["spqr", *sys.argv[1:]])
    provenance["source_quantization"] = opened.quantized_by
    if plan is not None:
        provenance["target_bits"] = plan.target_bits
    memory = TreeSink(opened.source.config)
    with CheckpointSink(
        claim,
        opened.source.config,
        config,
        provenance=provenance,
        files=_files_to_keep(opened),
    ) as sink:
        with progress_bar("quantizing", len(paths)) as advance:
            view = QuantizeProgress(advance)

            def on_layer(done: Any) -> None:
                interrupt.check()
                sink.record(done.path, dataclasses.asdict(done.stats))
                view(done)

            target = sink if tuning is None else memory
            quantize_blocks(
                opened.source,
                target,
                batches,
                config,
                on_layer=on_layer,
                plan=plan,
                spill=spill,
                hessian_bytes=memory_watch.thrift.hessian_bytes,
            )
            view.finish()
            interrupt.check()
        if tuning is not None:
            assert windows is not None
            provenance["tuned"] = dataclasses.asdict(tuning)
            _tune_into(sink, memory, opened, windows, tuning)
    seconds = time.perf_counter() - begun
    summary = summarize(CheckpointSource(sink.path))
    tell(
        (str(sink.path), "bold"),
        f": {summary['stored_bits']:.3f} stored bits per weight (ideal: {summary['ideal_bits']:.3f}), "
        f"{summary['outlier_percent']:.2f}% outliers; {describe_head(summary)}; {size(summary['bytes'])} in total "
        f"(dense: {size(summary['dense_bytes'])}); {seconds:.0f} s; {memory_watch.measured()}",
    )
    figures = {k: v for k, v in summary.items() if k != "layers"}
    write_json(
        json,
        {**figures, "seconds": seconds, **outlook.to_json(), **memory_watch.to_json(), "layers": summary["layers"]},
    )
    if opened.note is not None:
        say(opened.note)
    outlook.end(after_writing(out))


def _tune_into(sink: CheckpointSink, memory: TreeSink, opened: OpenedModel, windows: Any, settings: TuneConfig) -> None:
    """Trains a model in memory and writes it."""
    batches = batched(windows, settings.batch_tokens)
    steps = settings.epochs * len(batches) if settings.objective == "logits" else opened.source.config.num_layers
    with progress_bar("tuning", steps) as advance:

        def on_step(done: str, loss: float) -> None:
            interrupt.check()
            advance(f"{done}  loss {loss:.4f}")

        params = tune_model(memory.params(), opened.source, batches, settings, on_step)
    for index, block in enumerate(params.layers):
        sink.put_block(index, block)
    sink.put_outer(params.outer)


def _files_to_keep(opened: OpenedModel) -> dict[str, bytes]:
    """The model's configurations and its tokenizer's files, as they are."""
    try:
        opened.tokenizer()
        return opened.configurations() | opened.tokenizer_files()
    except ModelError as error:
        say(f"the tokenizer is not copied: {error}")
        return opened.configurations()


def inspect(
    directory: Annotated[Path, argument("MODEL", "A directory that spqr wrote.")],
    json: Json = None,
) -> None:
    """Check a quantized model's files, and show each weight's bits, outliers and error.

    For a model with experts, also show how many calibration tokens each weight read.
    """
    source = CheckpointSource(directory)
    summary = summarize(source)
    with_tokens = bool(source.config.num_experts)
    rows = [
        [
            path,
            f"{layer['shape'][0]}×{layer['shape'][1]}",
            str(layer["bits"]),
            number(layer["ideal_bits"], 3),
            number(layer["stored_bits"], 3),
            f"{layer['outlier_percent']:.2f}%",
            number(layer["output_error"], 4),
            *(["–" if layer["tokens"] is None else f"{layer['tokens']:.0f}"] if with_tokens else []),
        ]
        for path, layer in summary["layers"].items()
    ]
    columns = ["weight", "shape", "code bits", "ideal bits", "stored bits", "outliers", "output error"]
    table(str(directory), [*columns, "tokens"] if with_tokens else columns, rows)
    tell(
        f"Quantized weights: {summary['stored_bits']:.3f} stored bits per weight (ideal: {summary['ideal_bits']:.3f}), "
        f"{summary['outlier_percent']:.2f}% outliers; {describe_head(summary)}.\n"
        f"Size: {size(summary['bytes'])} in total: {size(summary['quantized_bytes'])} quantized, "
        f"{size(summary['bytes'] - summary['quantized_bytes'])} dense. The dense model: {size(summary['dense_bytes'])}."
    )
    tell(describe_products())
    write_json(json, summary)


def _register(panel: str, commands: dict[str, Callable[..., Any]]) -> None:
    """Adds commands to a panel of ``spqr --help``, in this order."""
    for name, command in commands.items():
        app.command(name, rich_help_panel=panel, epilog=EXAMPLES[name])(command)


_register(MAKE, {"quantize": quantize})
_register(MEASURE, {"perplexity": perplexity, "compare": compare, "eval": evaluate, "bench": bench, "analyze": analyze})
_register(USE, {"generate": generate, "inspect": inspect, "report": report})
_register(EXCHANGE, {"export": export, "import": import_original})


def main() -> None:
    """Runs the command line: bad input exits with 2 and one message, Ctrl-C with 130; see `spqr_jax.cli.main`."""
    run(app)
