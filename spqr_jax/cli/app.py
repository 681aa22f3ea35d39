"""The `spqr` command."""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from spqr_jax.atomic import refuse_existing
from spqr_jax.blocks import TreeSink
from spqr_jax.budget import plan_budget
from spqr_jax.calibrate import batched
from spqr_jax.checkpoint import CheckpointSink, CheckpointSource
from spqr_jax.cli import interrupt
from spqr_jax.cli.bench import bench
from spqr_jax.cli.display import (
    QuantizeProgress,
    console,
    describe_head,
    errors,
    number,
    progress_bar,
    say,
    show_plan,
    size,
    table,
    write_json,
)
from spqr_jax.cli.exchange import export, import_original
from spqr_jax.cli.measure import compare, perplexity
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
from spqr_jax.cli.report import analyze, report
from spqr_jax.cli.stream import TextStream, converse, describe_products, encode_prompts, load_generator, read_prompts
from spqr_jax.cli.zero_shot import evaluate
from spqr_jax.compile_cache import keep_programs
from spqr_jax.config import DEFAULT_PRESET, PRESETS
from spqr_jax.errors import ModelError, SpQRError
from spqr_jax.generate import Generation
from spqr_jax.inspection import summarize
from spqr_jax.models.tokenizer import pick_template
from spqr_jax.quantize import quantizable_paths, quantize_blocks
from spqr_jax.resolve import OpenedModel, open_model
from spqr_jax.sampling import Sampling
from spqr_jax.tune import TuneConfig
from spqr_jax.tune import tune as tune_model

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Large language models, small: SpQR quantization in JAX.",
)


app.command()(perplexity)
app.command()(compare)
app.command("eval")(evaluate)
app.command()(bench)
app.command()(analyze)
app.command()(report)
app.command()(export)
app.command("import")(import_original)


@app.command()
def quantize(
    model: Model,
    out: Annotated[Path, typer.Option(help="Directory to write the quantized model to.")],
    method: Annotated[str, typer.Option(help=METHOD_HELP)] = "spqr",
    calib: Calibration = None,
    nsamples: Annotated[int, typer.Option(help="Calibration windows.", min=1)] = 128,
    seqlen: SeqLen = 2048,
    seed: Annotated[int, typer.Option(help="Of the draw of calibration windows.")] = 0,
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
    refuse_existing(out, overwrite)
    opened = open_model(model, dtype, say)
    if opened.quantized:
        raise ModelError(f"{model} is quantized already: quantize the original model")
    batches, calibration, windows = None, None, None
    if config.needs_calibration or tuning is not None:
        windows, calibration = read_calibration(calib, opened, seqlen, nsamples, seed)
        batches = batched(windows)
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
        out,
        opened.source.config,
        config,
        tokenizer=_tokenizer_or_none(opened),
        provenance=provenance,
        overwrite=overwrite,
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
    summary = summarize(CheckpointSource(out))
    console.print(
        f"[bold]{out}[/bold]: {summary['ideal_bits']:.3f} ideal and {summary['stored_bits']:.3f} stored bits a weight, "
        f"{summary['outlier_percent']:.2f}% outliers; {describe_head(summary)}; {size(summary['bytes'])} in all "
        f"({size(summary['dense_bytes'])} dense), {seconds:.0f} s"
    )
    write_json(
        json, {**{k: v for k, v in summary.items() if k != "layers"}, "seconds": seconds, "layers": summary["layers"]}
    )
    if opened.note is not None:
        say(opened.note)


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


def _tokenizer_or_none(opened: OpenedModel) -> Any:
    try:
        return opened.tokenizer()
    except ModelError as error:
        say(f"no tokenizer is kept: {error}")
        return None


@app.command()
def generate(
    model: Model,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text to continue; repeatable. Default: read from stdin.")
    ] = None,
    chat: Annotated[
        bool, typer.Option(help="The prompt is a user's message: apply the model's chat template.")
    ] = False,
    chat_template: Annotated[
        str | None,
        typer.Option(help="With --chat: name of one of the model's chat templates, or path of a Jinja file."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Only the k likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Only the likeliest tokens up to this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the random draws.")] = 0,
    int8_activations: Annotated[
        bool, typer.Option(help="On a CPU, round activations to 8 bits: faster, at some 0.5% of error a product.")
    ] = False,
    dtype: Dtype = None,
    json: Json = None,
) -> None:
    """Continue a prompt, or answer it with --chat; at a terminal, --chat alone is a conversation."""
    sampling = Sampling(temperature, top_k, top_p)
    if chat_template is not None and not chat:
        raise SpQRError("--chat-template is for --chat: add it, or leave the template out")
    opened = open_model(model, dtype, say)
    tokenizer = opened.tokenizer()
    template = pick_template(tokenizer, chat_template) if chat else None

    def answer(ids: list[list[int]], stream: TextStream) -> Generation:
        return generator(
            ids,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=seed,
            on_token=lambda row, token: stream.put(token),
        )

    if chat and not prompt and sys.stdin is not None and sys.stdin.isatty():
        generator = load_generator(opened.source, int8_activations)
        converse(tokenizer, lambda ids, stream: answer([ids], stream), template)
        return
    prompts = read_prompts(prompt)
    ids = encode_prompts(tokenizer, prompts, chat, template)
    generator = load_generator(opened.source, int8_activations)
    stream = TextStream(tokenizer, live=len(prompts) == 1)
    result = answer(ids, stream)
    texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in result.tokens]
    stream.finish(prompts, texts)
    say(
        f"{sum(map(len, result.tokens))} tokens, {number(result.decode_tokens_per_second, 1)} tokens/s; "
        f"prompt of {max(result.prompt_tokens)} in {result.prefill_seconds:.2f} s "
        f"(and {result.compile_seconds:.1f} s to compile)"
    )
    several = len(prompts) > 1
    write_json(
        json,
        {
            "text": texts if several else texts[0],
            "prompt_tokens": result.prompt_tokens if several else result.prompt_tokens[0],
            "new_tokens": [len(t) for t in result.tokens] if several else len(result.tokens[0]),
            "prefill_seconds": result.prefill_seconds,
            "decode_tokens_per_second": result.decode_tokens_per_second,
            "first_token_seconds": result.first_token_seconds,
            "compile_seconds": result.compile_seconds,
        },
    )


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
    console.print(
        f"{summary['ideal_bits']:.3f} ideal and {summary['stored_bits']:.3f} stored bits a quantized weight, "
        f"{summary['outlier_percent']:.2f}% outliers; {describe_head(summary)}\n"
        f"{size(summary['bytes'])} in all: {size(summary['quantized_bytes'])} quantized, "
        f"{size(summary['bytes'] - summary['quantized_bytes'])} dense (norms and what was left out); "
        f"{size(summary['dense_bytes'])} before"
    )
    console.print(describe_products(), markup=False)
    write_json(json, summary)


_INTERRUPTED = 130


def main() -> None:
    """Runs the command line: bad input exits with 2 and one message, Ctrl-C with 130."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would advise to install torch
    interrupt.install()
    if problem := keep_programs():
        say(problem)
    try:
        app()
    except SpQRError as error:
        errors.print("error:", style="bold red", end=" ")
        errors.print(str(error), markup=False)
        sys.exit(2)
    except SystemExit as end:
        if end.code == _INTERRUPTED:  # what typer makes of Ctrl-C
            errors.print("stopped; nothing is left half-written", style="yellow")
        raise
