#!/usr/bin/env python3
"""The ablations' figures that evaluation.md shows: kept in benchmarks/results/ablations.csv.

    scripts/ablations_results.py --add ablations --model "SmolLM2-135M, off the grid"
    scripts/ablations_results.py            write the tables into the page, and draw docs/images/ablations.png
    scripts/ablations_results.py --check    exit with 1 if the page or the picture was made from other figures

`--add` takes over the table.csv in a folder that `scripts/ablations.py --paper` wrote to. A row of the same
model, name, seed and measure is replaced.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ablations_table import BASE, DENSE
from kept_rows import markdown_table, report_outdated, with_table
from plot_quality import text_chunk
from quality_csv import RESULTS, merge_rows, read_rows
from task_scores import NAMES

from spqr_jax import SpQRError

ROOT = Path(__file__).parent.parent
FILE, PICTURE = RESULTS / "ablations.csv", ROOT / "docs" / "images" / "ablations.png"
PAGE = ROOT / "docs" / "explanation" / "evaluation.md"
COLUMNS = (
    "model", "row", "seed", "ideal_bits", "stored_bits", "outlier_percent", "measure", "value", "stderr",
)  # fmt: skip
KEY = ("model", "row", "seed", "measure")
PERPLEXITY = "perplexity, "
TABLES = {
    "ablations-smollm2": "SmolLM2-135M, off the grid",
    "ablations-gemma": "Gemma 3 270M, off the grid",
    "ablations-qwen": "Qwen2.5-0.5B, off the grid",
}
"""Name of the table in the page, and whose rows it has. A model that was not measured has none."""

Runs = dict[str, list[dict[str, Any]]]
"""By row, seed by seed: bits, outliers, and "values" by measure."""


def of_model(rows: Iterable[Mapping[str, str]], model: str) -> Runs:
    """The runs of one model, in the file's order."""
    runs: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        if row["model"] == model:
            begin = {name: float(row[name]) for name in ("stored_bits", "outlier_percent")}
            run = runs.setdefault((row["row"], row["seed"]), {"row": row["row"], "values": {}, **begin})
            run["values"][row["measure"]] = float(row["value"])
    done: Runs = {}
    for run in runs.values():
        done.setdefault(run["row"], []).append(run)
    return done


def tasks_of(done: Runs) -> list[str]:
    """The measures that are scores of tasks."""
    return [name for name in done[DENSE][0]["values"] if not name.startswith(PERPLEXITY)]


def scores(seeds: Sequence[dict[str, Any]], tasks: Sequence[str]) -> np.ndarray:
    """The mean over tasks in percent, seed by seed."""
    return np.array([100 * np.mean([run["values"][task] for task in tasks]) for run in seeds])


def spread(values: np.ndarray, digits: int) -> str:
    """The mean ± the standard deviation over seeds."""
    deviation = f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{deviation}"


def versus(values: np.ndarray, base: np.ndarray, digits: int) -> str:
    """The mean difference from SpQR of the same seeds ± its standard error over them."""
    differences = values - base
    error = differences.std(ddof=1) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
    return f"{differences.mean():+.{digits}f}{'' if math.isnan(error) else f' ± {error:.{digits}f}'}".replace("-", "−")


def markdown(done: Runs) -> str:
    """A line for each row."""
    texts = [name for name in done[DENSE][0]["values"] if name.startswith(PERPLEXITY)]
    tasks, lines = tasks_of(done), []
    for name, seeds in done.items():
        sizes = [f"{np.mean([run[field] for run in seeds]):.2f}" for field in ("stored_bits", "outlier_percent")]
        line = [name, sizes[0], f"{sizes[1]}%"]
        line += [spread(np.array([run["values"][text] for run in seeds]), 2) for text in texts]
        line += [spread(np.array([100 * run["values"][task] for run in seeds]), 1) for task in tasks]
        mean = scores(seeds, tasks)
        same = name in (BASE, DENSE) or len(seeds) != len(done[BASE])
        line += [spread(mean, 1), "–" if same else versus(mean, scores(done[BASE], tasks), 1)]
        lines.append(line)
    labels = [text.removeprefix(PERPLEXITY) for text in texts]
    headings = ["", "stored bits", "outliers", *labels, *(NAMES.get(task, task) for task in tasks)]
    return markdown_table([*headings, "mean", "mean vs SpQR"], lines)


def filled(rows: Sequence[Mapping[str, str]]) -> str:
    """The page's text with its tables made anew."""
    text = PAGE.read_text(encoding="utf-8")
    for name, model in TABLES.items():
        if done := of_model(rows, model):
            text = with_table(text, name, markdown(done))
    return text


def drawn_from(rows: Sequence[Mapping[str, str]]) -> str:
    """The numbers of the picture as text, for its description."""
    return json.dumps({model: of_model(rows, model) for model in TABLES.values()})


def plot(rows: Sequence[Mapping[str, str]]) -> None:
    """Loss above the dense model's on the first text, and the tasks' mean score against it; a group of bars a row."""
    import matplotlib  # the `plots` extra

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (losses, means) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    models = [model for model in TABLES.values() if of_model(rows, model)]
    width = 0.8 / len(models)
    for place, model in enumerate(models):
        done = of_model(rows, model)
        dense, arms, tasks = done[DENSE], [name for name in done if name != DENSE], tasks_of(done)
        text = next(iter(dense[0]["values"]))
        x = np.arange(len(arms)) + (place - (len(models) - 1) / 2) * width
        by_arm = (
            (losses, lambda run, text=text: np.log(run["values"][text])),
            (means, lambda run, tasks=tasks: float(scores([run], tasks)[0])),
        )
        for axes, figure_of in by_arm:
            above = [np.array([figure_of(run) for run in done[arm]]) - figure_of(dense[0]) for arm in arms]
            deviations = [values.std(ddof=1) if len(values) > 1 else 0.0 for values in above]
            axes.bar(x, [values.mean() for values in above], width, yerr=deviations, capsize=3, label=model)
            axes.set_xticks(range(len(arms)), [arm.split(" (")[0].replace(": ", ":\n") for arm in arms], fontsize=8)
            axes.grid(axis="y", alpha=0.3)
            axes.set_axisbelow(True)
    losses.set_ylabel(f"loss above the dense model, nats ({text.removeprefix(PERPLEXITY)})")
    means.set_ylabel("mean of five tasks, points from the dense model")
    means.axhline(0, color="black", linewidth=1)
    losses.legend(fontsize=9)
    figure.savefig(PICTURE, dpi=110, metadata={"Description": drawn_from(rows)})


def add(folder: Path, model: str) -> None:
    """Takes over what was measured."""
    rounded = ("ideal_bits", "stored_bits", "outlier_percent", "value", "stderr")
    rows = read_rows(folder / "table.csv")
    merge_rows(FILE, COLUMNS, KEY, [row | {"model": model} for row in rows], rounded)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--add", type=Path, help="folder of scripts/ablations.py")
    parser.add_argument("--model", help="with --add: its name")
    parser.add_argument("--check", action="store_true", help="only compare the page and the picture with the CSV")
    given = parser.parse_args()
    if given.add is not None:
        if not given.model:
            raise SpQRError("--add needs --model")
        add(given.add, given.model)
        return 0
    rows = read_rows(FILE)
    text, numbers = filled(rows), drawn_from(rows)
    if not given.check:
        PAGE.write_text(text, encoding="utf-8")
        plot(rows)
        return 0
    same = {PAGE: PAGE.read_text(encoding="utf-8") == text}
    same[PICTURE] = text_chunk(PICTURE.read_bytes(), "Description") == numbers
    return report_outdated(same, "scripts/ablations_results.py")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SpQRError as error:
        sys.exit(f"ablations_results: {error}")
