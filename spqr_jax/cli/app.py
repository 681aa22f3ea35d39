"""The `spqr` command."""

from __future__ import annotations

import dataclasses
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import jax.numpy as jnp
import typer

from spqr_jax.blocks import TreeSink
from spqr_jax.budget import plan_budget
from spqr_jax.calibrate import batched
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
from spqr_jax.cli.exchange import export, import_original
from spqr_jax.cli.generate import generate
from spqr_jax.cli.help import PlainTyper
from spqr_jax.cli.main import run
from spqr_jax.cli.measure import compare, perplexity
from spqr_jax.cli.next_step import after_writing
from spqr_jax.cli.options import (
    METHOD_HELP,
    STEPS_HELP,
    Calibration,
    Dtype,
    Json,
    Model,
    SeqLen,
    build_config,
    build_tuning,
    parse_rule,
    read_calibration,
)
from spqr_jax.cli.outlook import before_quantize
from spqr_jax.cli.report import analyze, report
from spqr_jax.cli.stream import describe_products
from spqr_jax.cli.zero_shot import evaluate
from spqr_jax.config import DEFAULT_PRESET, PRESETS
from spqr_jax.errors import ModelError
from spqr_jax.estimate import quantized_bytes
from spqr_jax.inspection import summarize
from spqr_jax.output import Claim
from spqr_jax.quantize import quantizable_paths, quantize_blocks
from spqr_jax.resolve import OpenedModel, default_dtype, open_model
from spqr_jax.tune import TuneConfig
from spqr_jax.tune import tune as tune_model

app = PlainTyper(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Large language models, small: SpQR quantization in JAX.",
)


app.command()(perplexity)
app.command()(compare)
app.command("eval")(evaluate)
app.command()(generate)
app.command()(bench)
app.command()(analyze)
app.command()(report)
app.command()(export)
app.command("import")(import_original)


@app.command()
def quantize(
    context: typer.Context,
    model: Model,
    out: Annotated[Path, typer.Option(help="Directory to write the quantized model to.")],
    method: Annotated[str, typer.Option(help=METHOD_HELP)] = "spqr",
    calib: Calibration = None,
    nsamples: Annotated[int, typer.Option(help="Calibration windows.", min=1)] = 128,
    seqlen: SeqLen = 2048,
    seed: Annotated[int, typer.Option(help="Of the draw of calibration windows.", min=0)] = 0,
    preset: Annotated[
        str | None,
        typer.Option(
            help=f"A documented point between size and quality: {', '.join(PRESETS)}. {DEFAULT_PRESET} if neither "
            "--bits, --outlier-threshold nor --target-bits is given."
        ),
    ] = None,
    target_bits: Annotated[
        float | None, typer.Option(help="Stored bits a weight to come to, widths and thresholds chosen to lose least.")
    ] = None,
    bits: Annotated[
        str | None,
        typer.Option(help="Bits a weight code, 2..8; several (3,4) or auto (2,3,4): to choose from, with a target."),
    ] = None,
    tune: Annotated[
        str, typer.Option(help="Train statistics and outlier values afterwards: none, blocks or logits.")
    ] = "none",
    tune_epochs: Annotated[int | None, typer.Option(help="Times that tuning goes through the text.", min=1)] = None,
    tune_learning_rate: Annotated[
        float | None, typer.Option(help="Highest rate of tuning, in shares of a parameter's size.")
    ] = None,
    group_size: Annotated[int | None, typer.Option(help="Inputs that share a scale; 0: one group a row.")] = None,
    stats_bits: Annotated[int | None, typer.Option(help="Bits of a scale or zero; 16: 16-bit floats.")] = None,
    stats_group_size: Annotated[int | None, typer.Option(help="Rows that share second-level statistics.")] = None,
    outlier_threshold: Annotated[float | None, typer.Option(help="Relative threshold tau; inf: no outliers.")] = None,
    damping: Annotated[float | None, typer.Option(help="Share of the Hessian's mean diagonal added to it.")] = None,
    drift_correction: Annotated[
        float | None, typer.Option(help="Share, 0..1, to which weights make up for their inputs' drift; see the docs.")
    ] = None,
    calibration_dtype: Annotated[
        str | None, typer.Option(help="Of products that calibration text goes through: bfloat16 or float32.")
    ] = None,
    order: Annotated[str | None, typer.Option(help="Order of the inputs: activation or identity.")] = None,
    fit: Annotated[str | None, typer.Option(help="How scales are fitted: search, minmax or reference.")] = None,
    sequential: Annotated[
        bool | None, typer.Option(help="Later weights of a block see its earlier ones quantized.")
    ] = None,
    rule: Annotated[
        list[str] | None, typer.Option(help="PATTERN=skip or PATTERN=BITS for weights whose path matches; repeatable.")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help=STEPS_HELP, min=1),
    ] = None,
    head_bits: Annotated[
        str | None,
        typer.Option(
            help="Bits of the output head (a tied one is the embedding): 8, as presets have it, 4, .. or none."
        ),
    ] = None,
    dtype: Dtype = None,
    overwrite: Annotated[bool, typer.Option(help="Replace OUT if it exists.")] = False,
    json: Json = None,
) -> None:
    """Quantize MODEL and write it to OUT."""
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
    claim = context.with_resource(Claim(out, overwrite))
    opened = open_model(model, dtype, say)
    if opened.quantized:
        raise ModelError(f"{model} is quantized already: quantize the original model")
    claim.need(quantized_bytes(opened.source, config, jnp.dtype(dtype or default_dtype()).itemsize))
    batches, calibration, windows = None, None, None
    if config.needs_calibration or tuning is not None:
        windows, calibration = read_calibration(calib, opened, seqlen, nsamples, seed)
        batches = batched(windows)
    elif calib:
        say(f"--method {method} reads no text: --calib is not used")
    outlook = before_quantize(opened, method, config, calibration, tuning, dtype)
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
            quantize_blocks(opened.source, target, batches, config, on_layer=on_layer, plan=plan)
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
        f": {summary['ideal_bits']:.3f} ideal and {summary['stored_bits']:.3f} stored bits a weight, "
        f"{summary['outlier_percent']:.2f}% outliers; {describe_head(summary)}; {size(summary['bytes'])} in all "
        f"({size(summary['dense_bytes'])} dense), {seconds:.0f} s",
    )
    figures = {k: v for k, v in summary.items() if k != "layers"}
    write_json(json, {**figures, "seconds": seconds, **outlook.to_json(), "layers": summary["layers"]})
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
        say(f"no tokenizer is kept: {error}")
        return opened.configurations()


@app.command()
def inspect(
    directory: Annotated[Path, typer.Argument(help="A directory that spqr wrote.", show_default=False)],
    json: Json = None,
) -> None:
    """Verify a quantized model and show what it holds."""
    source = CheckpointSource(directory)
    summary = summarize(source)
    rows = [
        [
            path,
            f"{layer['shape'][0]}×{layer['shape'][1]}",
            str(layer["bits"]),
            number(layer["ideal_bits"], 3),
            number(layer["stored_bits"], 3),
            f"{layer['outlier_percent']:.2f}%",
            number(layer["output_error"], 4),
        ]
        for path, layer in summary["layers"].items()
    ]
    table(str(directory), ["weight", "shape", "bits", "ideal", "stored", "outliers", "output error"], rows)
    tell(
        f"{summary['ideal_bits']:.3f} ideal and {summary['stored_bits']:.3f} stored bits a quantized weight, "
        f"{summary['outlier_percent']:.2f}% outliers; {describe_head(summary)}\n"
        f"{size(summary['bytes'])} in all: {size(summary['quantized_bytes'])} quantized, "
        f"{size(summary['bytes'] - summary['quantized_bytes'])} dense (norms and what was left out); "
        f"{size(summary['dense_bytes'])} before"
    )
    tell(describe_products())
    write_json(json, summary)


def main() -> None:
    """Runs the command line: bad input exits with 2 and one message, Ctrl-C with 130; see `spqr_jax.cli.main`."""
    run(app)
