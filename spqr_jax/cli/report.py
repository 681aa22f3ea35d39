"""`spqr analyze` and `spqr report`: which weights matter, and pages on it."""

from __future__ import annotations

import dataclasses
import re
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from spqr_jax.analysis import ModelAnalysis
from spqr_jax.analysis import analyze as analyze_model
from spqr_jax.atomic import AtomicDirectory
from spqr_jax.checkpoint import CheckpointSource
from spqr_jax.cli.display import EventView, say, table, tell
from spqr_jax.cli.help import OUTPUT, argument, option
from spqr_jax.cli.next_step import after_analyze
from spqr_jax.cli.options import (
    Calibration,
    CalibrationSeed,
    CalibrationSeqLen,
    Dtype,
    Model,
    Overwrite,
    Windows,
)
from spqr_jax.cli.outlook import before_analyze
from spqr_jax.config import SpQRConfig
from spqr_jax.errors import ModelError, SpQRError
from spqr_jax.inspection import summarize
from spqr_jax.output import Claim, check_file, refuse_existing, write_file
from spqr_jax.report import Run, figures, read_result, read_run, render_page, write_analysis
from spqr_jax.resolve import OpenedModel, open_model
from spqr_jax.stream.windows import batched
from spqr_jax.texts import read_calibration

ANALYSIS = "Analysis"

Results = Annotated[
    list[Path] | None,
    option(
        "Measured results",
        "FILE",
        "A result of 'spqr perplexity', 'compare' or 'eval' with --json, to show. Repeatable.",
    ),
]


def analyze(
    context: typer.Context,
    model: Model,
    out: Annotated[Path, option(OUTPUT, "DIR", "Directory to write: report.html, analysis.json and figures.")],
    overwrite: Overwrite = False,
    results: Results = None,
    calib: Calibration = None,
    nsamples: Windows = 16,
    seqlen: CalibrationSeqLen = 1024,
    seed: CalibrationSeed = 0,
    dense: Annotated[
        str | None,
        option(ANALYSIS, "MODEL", "The dense model of a quantized one.", show_default="the model it was made from"),
    ] = None,
    bits: Annotated[int, option(ANALYSIS, "BITS", "For a dense MODEL: bits per code to assume.", min=2, max=8)] = 3,
    maps: Annotated[
        str,
        option(
            ANALYSIS,
            "PATTERN",
            "Draw maps of the weights whose path matches this regular expression.",
            show_default="first, middle and last block",
        ),
    ] = "",
    dtype: Dtype = None,
) -> None:
    """Find the weights that are most sensitive to rounding, and the patterns that they form."""
    _check_pattern(maps)
    claim = context.with_resource(Claim(out, overwrite))
    _need_plots()
    measured = [read_result(path) for path in results or ()]
    opened = open_model(model, dtype, say)
    config, summary, original = SpQRConfig(bits=bits), None, opened
    if opened.quantized:
        config, summary = _quantization(opened)
        original = open_model(dense or _made_from(summary, model), dtype, say)
    windows, calibration = read_calibration(calib, original, seqlen, nsamples, seed)
    setting: dict[str, Any] = {
        "dense": original.label,
        "calibration": calibration,
        "config": config.to_json(),
        "command": shlex.join(["spqr", *sys.argv[1:]]),
    }
    outlook = before_analyze(original, calibration, dtype)
    begun = time.perf_counter()
    with EventView() as events:
        found = analyze_model(original.source, batched(windows), config, maps=maps, events=events)
    setting["seconds"] = time.perf_counter() - begun
    run = Run(model, summary, found, setting, tuple(r for r in measured if str(r.get("model")) == model))
    with AtomicDirectory(claim) as folder:
        write_analysis(folder.partial, model, found, summary, setting)
        page = render_page([run], f"{model}: which weights matter", setting["command"])
        (folder.partial / "report.html").write_text(page, encoding="utf-8", errors="backslashreplace")
        _write_figures(folder.partial / "figures", run)
    table(f"{model}: patterns among the 1% most sensitive weights", *structure_table(found))
    text = (
        "Share of cost: how much of the expected loss increase these weights cause. Rows to rotary pairs: number of "
        "patterns in all blocks, and the percentage of these weights in them. Percentages are means over blocks."
    )
    tell((text, "dim"))
    tell((f"{folder.path}/report.html", "bold"), f", {setting['seconds']:.0f} s")
    outlook.end(after_analyze(opened, out))


def report(
    directories: Annotated[
        list[Path], argument("MODEL", "Quantized models, and directories that 'spqr analyze' wrote.")
    ],
    out: Annotated[Path, option(OUTPUT, "FILE", "The HTML file to write.")] = Path("report.html"),
    overwrite: Overwrite = False,
    title: Annotated[str, option(OUTPUT, "TEXT", "Title of the page.")] = "Quantized models",
    results: Results = None,
) -> None:
    """Write one HTML page about quantized models: tables, figures, settings and commands."""
    refuse_existing(out, overwrite, directory=False)
    check_file(out)
    _need_plots()
    measured = [read_result(path) for path in results or ()]
    runs = [read_run(directory, measured) for directory in directories]
    for path, result in zip(results or (), measured, strict=True):
        if not any(result in run.results for run in runs):
            say(f"{path} is left out: it is about {result.get('model')!r}, which is none of the models given")
    page = render_page(runs, title, shlex.join(["spqr", *sys.argv[1:]]))
    write_file(out, page)
    tell((str(out), "bold"), f", {len(page) / 1e6:.1f} MB, {len(runs)} models")


def structure_table(found: ModelAnalysis) -> tuple[list[str], list[list[str]]]:
    """Columns and lines: how many patterns each kind of matrix has, and what share of the costliest lies there."""
    columns = ["weight", "share of cost", "rows", "columns", "heads", "rotary pairs", "no pattern"]
    lines = []
    for kind in figures.kinds_of([weight.path for weight in found.weights]):
        own = [weight.structures for weight in found.weights if weight.kind == kind]
        line = [kind, f"{100 * np.mean([s.top_share for s in own]):.0f}%"]
        for name in ("rows", "columns", "heads", "rotary_pairs"):
            count = sum(len(getattr(s, name)) for s in own)
            share = 100 * np.mean([s.shares.get(name.removesuffix("_pairs"), 0.0) for s in own])
            line.append(f"{count}: {share:.0f}%" if count else "–")
        lines.append([*line, f"{100 * np.mean([s.shares['unstructured'] for s in own]):.0f}%"])
    return columns, lines


def _need_plots() -> None:
    """Says what is missing before work is done."""
    figures.heat({"layers.0.q_proj": 1.0}, "")


def _check_pattern(maps: str) -> None:
    try:
        re.compile(maps)
    except (re.error, RecursionError, OverflowError) as error:
        raise SpQRError(f"--maps {maps!r} is not a regular expression: {error}") from None


def _quantization(opened: OpenedModel) -> tuple[SpQRConfig, dict[str, Any]]:
    if not isinstance(opened.source, CheckpointSource):
        raise ModelError(
            f"{opened.label} is quantized but not a directory that spqr quantize wrote: give its dense model"
        )
    config = opened.source.quantization or SpQRConfig()
    return dataclasses.replace(config, target_bits=None), summarize(opened.source)


def _made_from(summary: dict[str, Any], model: str) -> str:
    origin = (summary["provenance"] or {}).get("model")
    if origin is None:
        raise ModelError(f"{model} does not record the model it was made from: name the dense model with --dense")
    return str(origin)


def _write_figures(folder: Path, run: Run) -> None:
    """The figures as PNG files."""
    folder.mkdir()
    assert run.analysis is not None
    by_block: dict[str, dict[str, Any]] = {}
    for path, values in run.analysis.maps().items():
        by_block.setdefault(path.split(".")[1], {})[path] = values
    for block, maps in by_block.items():
        figures.to_png(figures.sensitivity_maps(maps), folder / f"sensitivities-block-{block}.png")
    figures.to_png(figures.structure_shares(run.analysis), folder / "structures.png")
    figures.to_png(figures.by_column(run.analysis), folder / "cost-by-column.png")
