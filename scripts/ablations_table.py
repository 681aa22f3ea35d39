"""The results of scripts/ablations.py, seeds put together: a table, a CSV file and a picture."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from kept_rows import markdown_table

BASE, DENSE = "SpQR", "dense"

_SHOWN = 1.4  # times the dense perplexity, up to which a row is in the picture
_LINE = 9.0  # points from one label to the next

Seeds = Sequence[dict[str, Any]]
"""One row's results, seed by seed; those of the dense model once."""


def _spread(values: Sequence[float], digits: int, error: float = math.nan) -> str:
    """The mean, and the standard deviation over seeds; of one seed, its own standard error."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else error
    return f"{np.mean(values):.{digits}f}" + ("" if math.isnan(deviation) else f" ± {deviation:.{digits}f}")


def perplexities(seeds: Seeds, label: str) -> list[float]:
    """On one text, seed by seed."""
    return [values["texts"][label]["perplexity"] for values in seeds]


def versus(seeds: Seeds, base: Seeds, label: str) -> str:
    """Loss above SpQR's on one text in nats: the mean over windows, seed by seed; ± over seeds, or over windows."""
    if seeds is base:
        return "–"
    differences = [
        np.array(values["texts"][label]["window_losses"]) - np.array(other["texts"][label]["window_losses"])
        for values, other in zip([*seeds] * (len(base) // len(seeds)), base, strict=True)
    ]
    windows = len(differences[0])
    error = float(differences[0].std(ddof=1) / math.sqrt(windows)) if windows > 1 else math.nan
    return f"{'+' if np.mean(differences) >= 0 else ''}{_spread([float(d.mean()) for d in differences], 3, error)}"


def average(values: dict[str, Any]) -> float:
    """Mean score over the tasks."""
    return float(np.mean([value for value, _ in values["tasks"].values()]))


def columns(done: dict[str, Seeds]) -> list[str]:
    """Headings."""
    some = next(iter(done.values()))[0]
    labels, tasks = list(some["texts"]), list(some["tasks"])
    headings = ["question", "what", "stored bits", "ideal bits", "outliers"]
    for label in labels:
        headings += [f"perplexity, {label}", f"loss vs SpQR, {label}"]
    return [*headings, *tasks, *(["mean of tasks"] if tasks else []), "seconds"]


def cells(seeds: Seeds, base: Seeds) -> list[str]:
    """One line as text."""
    some = seeds[0]
    line = [
        some["question"],
        some["row"],
        f"{np.mean([values['stored_bits'] for values in seeds]):.3f}",
        f"{np.mean([values['ideal_bits'] for values in seeds]):.3f}",
        f"{np.mean([values['outlier_percent'] for values in seeds]):.2f}%",
    ]
    for label in some["texts"]:
        line.append(_spread(perplexities(seeds, label), 2, some["texts"][label]["stderr"]))
        line.append(versus(seeds, base, label))
    for task, (_, error) in some["tasks"].items():
        line.append(_spread([100 * values["tasks"][task][0] for values in seeds], 1, 100 * error))
    if some["tasks"]:
        line.append(_spread([100 * average(values) for values in seeds], 1))
    return [*line, f"{np.mean([values['seconds'] for values in seeds]):.0f}"]


def lines(done: dict[str, Seeds]) -> list[list[str]]:
    """All lines as text."""
    return [cells(seeds, done[BASE]) for seeds in done.values()]


def write_tables(out: Path, title: str, done: dict[str, Seeds]) -> None:
    """table.md, and table.csv with a line for each row, seed and text or task."""
    text = markdown_table(columns(done), lines(done), left=2)
    (out / "table.md").write_text(f"{title}\n\n{text}", encoding="utf-8")
    with (out / "table.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        settings = ("question", "row", "seed", "ideal_bits", "stored_bits", "outlier_percent", "seconds")
        writer.writerow([*settings, "measure", "value", "stderr"])
        for seeds in done.values():
            for values in seeds:
                begin = [values[name] for name in settings]
                for label, result in values["texts"].items():
                    writer.writerow([*begin, f"perplexity, {label}", result["perplexity"], result["stderr"]])
                for task, (value, error) in values["tasks"].items():
                    writer.writerow([*begin, task, value, error])


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


def plot(out: Path, title: str, done: dict[str, Seeds]) -> None:
    """Perplexity on the first text against stored bits; rows far above the rest are left to the table."""
    import matplotlib  # the `plots` extra

    matplotlib.use("Agg")
    from matplotlib import pyplot

    label = next(iter(done[BASE][0]["texts"]))
    dense = perplexities(done[DENSE], label)[0]
    points = {
        name: (float(np.mean([values["stored_bits"] for values in seeds])), perplexities(seeds, label))
        for name, seeds in done.items()
        if name != DENSE
    }
    shown = {name: point for name, point in points.items() if np.mean(point[1]) < _SHOWN * dense}
    figure, axes = pyplot.subplots(figsize=(9, 6), layout="constrained")
    for index, question in enumerate(dict.fromkeys(done[name][0]["question"] for name in shown)):
        alike = [point for name, point in shown.items() if done[name][0]["question"] == question]
        base = question == ""
        deviations = [np.std(values, ddof=1) if len(values) > 1 else 0 for _, values in alike]
        axes.errorbar(
            [bits for bits, _ in alike], [np.mean(values) for _, values in alike], yerr=deviations, linestyle="",
            label=question or "SpQR's defaults", marker="*" if base else "os^Dvph"[index % 7],
            markersize=14 if base else 6, capsize=2, zorder=3 if base else 2,
        )  # fmt: skip
    axes.axhline(dense, color="grey", linestyle="--", linewidth=1, label=f"dense float32: {dense:.2f}")
    axes.set_xlabel("stored bits per weight")
    axes.set_ylabel(f"perplexity ({label})")
    axes.set_title(f"{title}: what each part of SpQR is worth")
    if left_out := len(points) - len(shown):
        axes.text(0.99, 0.01, f"{left_out} above {_SHOWN * dense:.0f} not shown", transform=axes.transAxes,
                  ha="right", fontsize=8)  # fmt: skip
    axes.margins(x=0.15)
    labelled = [(bits, float(np.mean(values)), name) for name, (bits, values) in shown.items()]
    for (x, y, name), lift in zip(labelled, label_lifts(labelled, axes), strict=True):
        axes.annotate(name, (x, y), textcoords="offset points", xytext=(8, 3 + lift), fontsize=7,
                      arrowprops={"arrowstyle": "-", "lw": 0.4, "color": "grey"} if lift else None)  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(out / "perplexity_by_bits.png", dpi=150)
