#!/usr/bin/env python3
"""The questions researchers ask of SpQR, answered on one model in one table.

    scripts/ablations.py demo                     all rows (an hour or two on two cores)
    scripts/ablations.py demo --quick             the main rows on little text (under 15 minutes)

Each row differs from SpQR's defaults in one thing, or is another method. Rows
that are done are kept in OUT and not run again, so a run can be stopped and
resumed. Writes table.md, table.csv and perplexity_by_bits.png into OUT.

    scripts/ablations.py demo --tasks winogrande,piqa,hellaswag,arc_easy,arc_challenge

adds a column for each task of the LM Evaluation Harness (the `eval` extra), zero-shot.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import math
import re
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from kept_rows import file_name, kept_or_made, markdown_table

from spqr_jax import SpQRConfig, SpQRError
from spqr_jax.data import calibration_windows, evaluation_windows
from spqr_jax.evaluate.perplexity import perplexity
from spqr_jax.integrations import import_harness
from spqr_jax.job.job import Job
from spqr_jax.quantized import quantized_leaves
from spqr_jax.resolve import OpenedModel, open_model
from spqr_jax.stream.blocks import TreeSink, collect
from spqr_jax.stream.windows import batched
from spqr_jax.terminal.display import console, number, say, table
from spqr_jax.texts import default_corpus, read_tokens

BASE = "SpQR"


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: what it asks, the configuration that answers, whether --quick runs it."""

    question: str
    name: str
    config: SpQRConfig | None  # None: the dense model
    quick: bool = False


def rows() -> list[Row]:
    """All rows, in the table's order."""

    def spqr(**changes: Any) -> SpQRConfig:
        return dataclasses.replace(SpQRConfig(), **changes)

    plain: dict[str, Any] = {"stats_bits": 16}
    return [
        Row("", "dense", None, True),
        Row("", BASE, spqr(), True),
        Row("outliers", "no outliers", spqr(outlier_threshold=math.inf), True),
        Row("outliers", "simplified (no leave-one-out)", spqr(leave_one_out=False), True),
        *(Row("outliers", f"tau {tau:g}", spqr(outlier_threshold=tau), tau == 1) for tau in (0.05, 0.1, 0.5, 1.0)),
        Row("statistics", "16-bit statistics (plain groups)", spqr(**plain), True),
        Row("statistics", "standard: one group a row, 16-bit", spqr(group_size=None, **plain), True),
        *(Row("statistics", f"{bits}-bit statistics", spqr(stats_bits=bits), bits == 2) for bits in (2, 4)),
        *(Row("group size", f"groups of {size}", spqr(group_size=size), size == 32) for size in (8, 32, 64, 128)),
        Row("order", "identity order", spqr(order="identity"), True),
        Row("order", "all of a block's inputs dense", spqr(sequential=False)),
        Row("fit", "min-max fit", spqr(fit="minmax"), True),
        Row("fit", "the original's choices", SpQRConfig.reference()),
        *(Row("bits", f"{bits} bits", spqr(bits=bits), True) for bits in (2, 4)),
        *(
            Row("budget", f"{name}, a threshold for each weight", spqr(target_bits=4.15, bit_choices=widths), quick)
            for name, widths, quick in (("2 to 4 bits", (2, 3, 4), True), ("3 bits", (3,), False))
        ),
        Row("other methods", "GPTQ 3-bit g16", SpQRConfig.gptq(3, 16), True),
        Row("other methods", "GPTQ 3-bit g64", SpQRConfig.gptq(3, 64)),
        Row("other methods", "GPTQ 4-bit g64", SpQRConfig.gptq(4, 64)),
        Row("other methods", "RTN 3-bit g16", SpQRConfig.rtn(3, 16), True),
        Row("other methods", "RTN 4-bit g16", SpQRConfig.rtn(4, 16)),
    ]


@dataclasses.dataclass(frozen=True)
class Setup:
    """What all rows share; its fingerprint is part of every kept result's name."""

    model: str
    calib: str
    nsamples: int
    seqlen: int
    seed: int
    data: str
    windows: int
    eval_seqlen: int
    tasks: tuple[str, ...] = ()
    limit: float | None = None
    include_path: str | None = None


def run(row: Row, setup: Setup, opened: OpenedModel, calibration: np.ndarray, windows: np.ndarray) -> dict[str, Any]:
    """Quantizes (unless dense) and measures."""
    begun = time.perf_counter()
    values: dict[str, Any] = {"ideal_bits": 32.0, "stored_bits": 32.0, "outlier_percent": 0.0}
    if row.config is None:
        params = collect(opened.source)
    else:
        sink, arrays = TreeSink(opened.source.config), []
        Job(opened.source, sink, batched(calibration), row.config).run()
        params = sink.params()
        for block in params.layers:
            arrays += quantized_leaves(block)
        size = sum(array.size for array in arrays)
        values = {
            "ideal_bits": sum(array.ideal_bits * array.size for array in arrays) / size,
            "stored_bits": 8 * sum(array.stored_bytes for array in arrays) / size,
            "outlier_percent": 100 * sum(array.nnz for array in arrays) / size,
        }
    values["seconds"] = time.perf_counter() - begun
    result = perplexity(params, windows)
    return {
        **values,
        "tasks": answer_tasks(setup, opened, params),
        "perplexity": result.perplexity,
        "stderr": result.stderr,
        "window_losses": result.window_losses.tolist(),
    }


METRICS = ("acc_norm,none", "acc,none", "exact_match,none")
"""What stands in a task's column: the first of these that the task has."""


def answer_tasks(setup: Setup, opened: OpenedModel, params: Any) -> dict[str, tuple[float, float]]:
    """(value, standard error) of each task; none if none were asked for."""
    if not setup.tasks:
        return {}
    harness = import_harness()
    run = harness.evaluate_tasks(
        harness.HarnessModel(params, opened.tokenizer()),
        setup.tasks,
        num_fewshot=0,
        limit=setup.limit,
        include_path=setup.include_path,
        seed=setup.seed,
    )
    values = {}
    for task in setup.tasks:
        metrics = run.values["results"][task]
        name = next((name for name in METRICS if name in metrics), None)
        if name is None:
            raise SpQRError(f"task {task} has none of the metrics {', '.join(METRICS)}: it has {', '.join(metrics)}")
        error = metrics.get(name.replace(",", "_stderr,"), math.nan)
        values[task] = (metrics[name], error if isinstance(error, float) else math.nan)
    return values


def name_of(setup: Setup, row: Row) -> str:
    """A file name that changes with anything that changes the result."""
    settings = {name: value for name, value in dataclasses.asdict(setup).items() if value not in (None, ())}
    return file_name(row.name, settings, row.config and row.config.to_json())


def versus(values: dict[str, Any], base: dict[str, Any]) -> str:
    """Loss against SpQR's, window by window: mean and standard error in nats."""
    difference = np.array(values["window_losses"]) - np.array(base["window_losses"])
    if len(difference) < 2 or values is base:
        return "–"
    return f"{difference.mean():+.3f} ± {difference.std(ddof=1) / math.sqrt(len(difference)):.3f}"


COLUMNS = ["question", "what", "perplexity", "loss vs SpQR", "ideal bits", "stored bits", "outliers", "seconds"]


def cells(row: Row, values: dict[str, Any], base: dict[str, Any]) -> list[str]:
    """One line as text."""
    return [
        row.question,
        row.name,
        number(values["perplexity"]),
        versus(values, base),
        number(values["ideal_bits"], 3),
        number(values["stored_bits"], 3),
        f"{values['outlier_percent']:.2f}%",
        number(values["seconds"], 0),
        *(f"{100 * value:.1f}" for value, _ in values["tasks"].values()),
    ]


def write_tables(out: Path, setup: Setup, done: list[tuple[Row, dict[str, Any]]]) -> None:
    """table.md and table.csv."""
    base = next(values for row, values in done if row.name == BASE)
    lines = [cells(row, values, base) for row, values in done]
    header = [
        f"{setup.model}; calibrated on {setup.nsamples} x {setup.seqlen} tokens of {setup.calib} (seed {setup.seed}); "
        f"perplexity on {setup.windows} x {setup.eval_seqlen} tokens of {setup.data}.",
    ]
    (out / "table.md").write_text("\n".join([*header, "", markdown_table([*COLUMNS, *setup.tasks], lines, left=2)]))
    with (out / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        names = ("perplexity", "stderr", "ideal_bits", "stored_bits", "outlier_percent", "seconds")
        errors = [f"{task}_stderr" for task in setup.tasks]
        writer.writerow(["question", "what", *names, *setup.tasks, *errors])
        for row, values in done:
            tasks = values["tasks"].values()
            numbers = [
                *(values[name] for name in names),
                *(value for value, _ in tasks),
                *(error for _, error in tasks),
            ]
            writer.writerow([row.question, row.name, *numbers])


_SHOWN = 1.4  # times the dense perplexity, up to which a row is in the plot
_LINE = 9.0  # points from one label to the next


def label_lifts(points: list[tuple[float, float, str]], axes: Any) -> list[float]:
    """How far, in points, each label must be moved up to clear those below it."""
    axes.figure.canvas.draw()
    scale = 72 / axes.figure.dpi
    places = [scale * axes.transData.transform(point[:2]) for point in points]
    lifts = [0.0] * len(points)
    placed: list[tuple[float, float, float]] = []  # left, right, height
    for index in sorted(range(len(points)), key=lambda index: places[index][1]):
        left, height = places[index]
        right = left + 4.0 * len(points[index][2]) + 10
        for other_left, other_right, other in sorted(placed, key=lambda label: label[2]):
            if left < other_right and other_left < right and abs(height - other) < _LINE:
                height = other + _LINE
        lifts[index] = height - places[index][1]
        placed.append((left, right, height))
    return lifts


def plot(out: Path, setup: Setup, done: list[tuple[Row, dict[str, Any]]]) -> None:
    """Perplexity against stored bits; rows far above the rest are left to the table."""
    import matplotlib  # the `plots` extra

    matplotlib.use("Agg")
    from matplotlib import pyplot

    dense = next(values["perplexity"] for row, values in done if row.config is None)
    shown = [(row, v) for row, v in done if row.config is not None and v["perplexity"] < _SHOWN * dense]
    left_out = len(done) - 1 - len(shown)
    figure, axes = pyplot.subplots(figsize=(9, 6), layout="constrained")
    questions = list(dict.fromkeys(row.question for row, _ in shown))
    for index, question in enumerate(questions):
        own = [(v["stored_bits"], v["perplexity"], row.name) for row, v in shown if row.question == question]
        marker = "*" if question == "" else "os^Dvph"[index % 7]
        bits, perplexities = zip(*[point[:2] for point in own], strict=True)
        axes.scatter(bits, perplexities, label=question or "SpQR's defaults",
                     marker=marker, s=220 if question == "" else 45, zorder=3 if question == "" else 2)  # fmt: skip
    axes.axhline(dense, color="grey", linestyle="--", linewidth=1, label=f"dense float32: {dense:.2f}")
    axes.set_xlabel("stored bits per weight")
    axes.set_ylabel(f"perplexity ({setup.data})")
    axes.set_title(f"{setup.model}: what each part of SpQR is worth")
    if left_out:
        axes.text(0.99, 0.01, f"{left_out} above {_SHOWN * dense:.0f} not shown", transform=axes.transAxes,
                  ha="right", fontsize=8)  # fmt: skip
    axes.margins(x=0.15)
    points = [(v["stored_bits"], v["perplexity"], row.name) for row, v in shown]
    for (x, y, name), lift in zip(points, label_lifts(points, axes), strict=True):
        axes.annotate(name, (x, y), textcoords="offset points", xytext=(8, 3 + lift), fontsize=7,
                      arrowprops={"arrowstyle": "-", "lw": 0.4, "color": "grey"} if lift else None)  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(out / "perplexity_by_bits.png", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="demo, a GGUF file, a Hugging Face directory or hub id")
    parser.add_argument("--quick", action="store_true", help="fewer rows, less text")
    parser.add_argument("--out", type=Path, default=Path("ablations"), help="where results are kept")
    parser.add_argument("--calib", help="calibration text; as for spqr quantize")
    parser.add_argument("--data", help="evaluation text; as for spqr perplexity")
    parser.add_argument("--nsamples", type=int, help="calibration windows")
    parser.add_argument("--seqlen", type=int, help="tokens a calibration window")
    parser.add_argument("--windows", type=int, help="evaluation windows")
    parser.add_argument("--eval-seqlen", type=int, help="tokens an evaluation window")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", default="", help="regular expression: only rows whose name it matches (and SpQR)")
    parser.add_argument("--tasks", default="", help="zero-shot tasks of the harness, separated by commas")
    parser.add_argument("--limit", type=float, help="questions a task, or below 1 the share of them")
    parser.add_argument("--include-path", help="folder of task files of your own")
    given = parser.parse_args()
    corpus = (given.calib and given.data) or default_corpus()
    fallback = (4, 512, 8, 512) if given.quick else (16, 1024, 10, 2048)
    numbers = (given.nsamples, given.seqlen, given.windows, given.eval_seqlen)
    nsamples, seqlen, windows, eval_seqlen = (a or b for a, b in zip(numbers, fallback, strict=True))
    setup = Setup(
        given.model, given.calib or corpus, nsamples, seqlen, given.seed, given.data or corpus, windows, eval_seqlen
    )
    tasks = tuple(task.strip() for task in given.tasks.split(",") if task.strip())
    limit = int(given.limit) if given.limit is not None and given.limit >= 1 else given.limit
    setup = dataclasses.replace(setup, tasks=tasks, limit=limit, include_path=given.include_path)
    if tasks:
        import_harness()  # says now what is missing
    opened = open_model(given.model, "float32", say)
    tokens = read_tokens(setup.calib, "calibration", opened)
    calibration = calibration_windows(tokens, seqlen, nsamples, given.seed, setup.calib, opened.first_token)
    evaluation = evaluation_windows(
        read_tokens(setup.data, "evaluation", opened), eval_seqlen, windows, setup.data, opened.first_token
    )
    setup = dataclasses.replace(setup, nsamples=len(calibration), windows=len(evaluation))
    todo = [row for row in rows() if row.quick or not given.quick]
    todo = [row for row in todo if row.name == BASE or row.config is None or re.search(given.rows, row.name)]
    done = []
    for index, row in enumerate(todo):
        path = given.out / "rows" / name_of(setup, row)
        values = kept_or_made(path, partial(run, row, setup, opened, calibration, evaluation))
        done.append((row, values))
        console.print(
            f"{index + 1:3d}/{len(todo)}  {row.name:<36} perplexity {values['perplexity']:9.2f}   "
            f"{values['stored_bits']:6.3f} stored bits   {values['seconds']:5.0f} s"
        )
    base = next(values for row, values in done if row.name == BASE)
    columns = [*COLUMNS, *setup.tasks]
    table(f"Ablations on {setup.model}", columns, [cells(row, values, base) for row, values in done])
    write_tables(given.out, setup, done)
    plot(given.out, setup, done)
    console.print(f"{given.out}/table.md, table.csv, perplexity_by_bits.png")


if __name__ == "__main__":
    try:
        main()
    except SpQRError as error:
        sys.exit(f"ablations: {error}")
