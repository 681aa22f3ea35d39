"""The rows of scripts/rivals.py, seeds put together: a table, a CSV file, and SpQR's KL at a rival's bits."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from kept_rows import markdown_table

BASE = "SpQR"
FIGURES = ("perplexity", "kl_mean", "kl_stderr", "same_top", "flips", "dense_perplexity")
COLUMNS = (
    "method", "name", "seed", "stored_bits", "cpu_seconds", "wall_seconds", "peak_gib", "text", "windows", "tokens",
    *FIGURES, "kl_99.9",
)  # fmt: skip
TASK_COLUMNS = (
    "method", "name", "seed", "stored_bits", "task", "questions", "first", "second", "difference", "error", "lost",
    "gained",
)  # fmt: skip


def write_csv(path: Path, done: Sequence[dict[str, Any]]) -> None:
    """One line for each row, seed and text."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        for row in done:
            for label, text in row["texts"].items():
                writer.writerow(row | text | {"text": label, "kl_99.9": text["kl_percentiles"]["99.9"]}
                                | {name: row[name] for name in ("cpu_seconds", "wall_seconds")})  # fmt: skip


def write_tasks(path: Path, done: Sequence[dict[str, Any]]) -> None:
    """One line for each row, seed and task; `first` is the dense model's score."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, TASK_COLUMNS, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        for row in done:
            writer.writerows(row | result | {"task": task} for task, result in row.get("tasks", {}).items())


def by_name(done: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The seeds of each row."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in done:
        groups.setdefault(row["name"], []).append(row)
    return groups


def kl(rows: Sequence[dict[str, Any]], label: str) -> tuple[float, float]:
    """Mean over the seeds, and their standard deviation (nan for one seed)."""
    values = np.array([row["texts"][label]["kl_mean"] for row in rows])
    return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else math.nan


def points(done: Sequence[dict[str, Any]], method: str, label: str) -> list[tuple[float, float, float]]:
    """A method's curve on one text: stored bits, KL and its deviation over the seeds, fewest bits first."""
    rows = [seeds for seeds in by_name(done).values() if seeds[0]["method"] == method]
    return sorted((float(np.mean([row["stored_bits"] for row in seeds])), *kl(seeds, label)) for seeds in rows)


def at_equal_bits(done: Sequence[dict[str, Any]], bits: float, label: str) -> float:
    """SpQR's KL at so many stored bits: between its two neighbours, log KL linear in bits; nan outside its curve."""
    curve = points(done, BASE, label)
    if len(curve) < 2 or not curve[0][0] <= bits <= curve[-1][0]:
        return math.nan
    return float(np.exp(np.interp(bits, [point[0] for point in curve], np.log([point[1] for point in curve]))))


def _spread(mean: float, deviation: float, digits: int = 4) -> str:
    return f"{mean:.{digits}f}" + ("" if math.isnan(deviation) else f" ± {deviation:.{digits}f}")


def task_cells(seeds: Sequence[dict[str, Any]], tasks: Sequence[str]) -> list[str]:
    """Score minus the dense model's in points: on each task, and the mean over tasks; flips of all questions.

    ± is the standard error over questions, which are the same for all seeds.
    """
    results = [[row["tasks"][task] for task in tasks] for row in seeds]
    differences = 100 * np.array([[result["difference"] for result in line] for line in results]).mean(axis=0)
    errors = 100 * np.array([[result["error"] for result in line] for line in results]).mean(axis=0)
    flips, asked = (
        sum(sum(result[name] for name in names) for line in results for result in line)
        for names in (("lost", "gained"), ("questions",))
    )
    means = [*differences, differences.mean()], [*errors, math.sqrt(np.sum(errors**2)) / len(tasks)]
    cells = [f"{mean:+.1f} ± {error:.1f}".replace("-", "−") for mean, error in zip(*means, strict=True)]
    return [*cells, f"{100 * flips / asked:.1f}%"]


def write_table(path: Path, done: Sequence[dict[str, Any]]) -> None:
    """Markdown: a line for each row; for each text KL with its deviation over seeds, SpQR's KL at the same bits over
    it, and the 99.9% KL; for each task the difference from the dense model."""
    labels, tasks = list(done[0]["texts"]), list(done[0].get("tasks", {}))
    columns = ["method", "stored bits", "CPU s"]
    for label in labels:
        columns += [f"KL, {label}", f"SpQR at these bits / it, {label}", f"99.9% KL, {label}", f"same top, {label}"]
    if tasks:
        columns += [*(f"{task} against dense" for task in tasks), "mean of tasks", "flips"]
    lines = []
    for name, seeds in by_name(done).items():
        bits = float(np.mean([row["stored_bits"] for row in seeds]))
        line = [name, f"{bits:.3f}", f"{np.mean([row['cpu_seconds'] for row in seeds]):.0f}"]
        for label in labels:
            texts = [row["texts"][label] for row in seeds]
            mean, deviation = kl(seeds, label)
            ratio = at_equal_bits(done, bits, label) / mean
            line += [
                _spread(mean, deviation),
                "–" if math.isnan(ratio) or seeds[0]["method"] == BASE else f"{ratio:.2f}",
                f"{np.mean([text['kl_percentiles']['99.9'] for text in texts]):.2f}",
                f"{100 * np.mean([text['same_top'] for text in texts]):.1f}%",
            ]
        lines.append([*line, *task_cells(seeds, tasks)] if tasks else line)
    path.write_text(markdown_table(columns, lines), encoding="utf-8")
