#!/usr/bin/env python3
"""The rivals' figures that quality.md and README.md show: kept in benchmarks/results, rivals.csv and rivals_tasks.csv.

    scripts/rivals_results.py --add rivals --model "SmolLM2, off the grid" --calibration "prose, 16 x 1024"
    scripts/rivals_results.py            write the tables into the pages, and draw docs/images/rivals.png
    scripts/rivals_results.py --check    exit with 1 if a page or the picture was made from other figures

`--add` takes over what scripts/rivals.py wrote to a folder. A row of the same model, calibration, name, seed and text,
or task, is replaced.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from kept_rows import markdown_table, report_outdated, with_table
from plot_quality import text_chunk
from quality_csv import RESULTS, merge_rows, read_rows
from rivals_plot import plot
from rivals_table import COLUMNS as MEASURED
from rivals_table import TASK_COLUMNS as ASKED
from rivals_table import by_name, task_cells
from task_scores import NAMES

from spqr_jax import SpQRError

ROOT = Path(__file__).parent.parent
FILE, TASKS_FILE = RESULTS / "rivals.csv", RESULTS / "rivals_tasks.csv"
PICTURE = ROOT / "docs" / "images" / "rivals.png"
QUALITY, README = ROOT / "docs" / "explanation" / "quality.md", ROOT / "README.md"
COLUMNS = ("model", "calibration", *MEASURED)
KEY = ("model", "calibration", "name", "seed", "text")
TASK_COLUMNS = ("model", "calibration", *ASKED)
TASK_KEY = ("model", "calibration", "name", "seed", "task")
SMOLLM2, QWEN = "SmolLM2-135M, off the grid", "Qwen2.5-0.5B, off the grid"
GEMMA, OF_GEMMA = "Gemma 3 270M, off the grid, gains rescaled", "WikiText-2, code (1 : 1), 16 x 1024"
MIXTURE, PROSE = "WikiText-2, code, conversations (2 : 2 : 1), 16 x 1024", "WikiText-2, 16 x 1024"
CODE, CHAT = "code, 16 x 1024", "conversations, 16 x 1024"
CALIBRATIONS = {"prose": PROSE, "code": CODE, "conversations": CHAT, "2 : 2 : 1": MIXTURE}
"""What the table of kinds calls each calibration text."""
SHOWN = ("prose", "code", "German")
SHORT = ("SpQR 3.75", "SpQR 4.3", "IQ4_XS", "GPTQ 4 bits, groups of 64", "AWQ 4 bits, groups of 64", "Q4_K_M")
TASKS = "rivals-tasks"
"""The table of zero-shot tasks, which has the model and the calibration of "rivals", once they were measured."""


class Table(NamedTuple):
    """A table of a page, between `<!-- NAME -->` and `<!-- end of NAME -->`.

    Attributes:
      model, calibration: whose rows; without a calibration, those of all `CALIBRATIONS`, one after the other.
      figure: the CSV's column that is shown for each text.
      digits: of it.
      page: file that has the table.
      names: of the rows; () for all, fewest bits first.
      texts: that have a column; () for all, with columns for seeds and CPU seconds.
    """

    model: str
    calibration: str
    figure: str = "kl_mean"
    digits: int = 3
    page: Path = QUALITY
    names: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()


TABLES = {
    "rivals": Table(SMOLLM2, MIXTURE),
    "rivals-worst": Table(SMOLLM2, MIXTURE, "kl_99.9", 2),
    "rivals-prose": Table(SMOLLM2, PROSE),
    "rivals-qwen": Table(QWEN, MIXTURE),
    "rivals-gemma": Table(GEMMA, OF_GEMMA),
    "rivals-kinds": Table(SMOLLM2, "", names=("SpQR 4.3", "IQ4_XS")),
    "rivals-short": Table(SMOLLM2, MIXTURE, page=README, names=SHORT, texts=SHOWN),
}


def of_setting(rows: Iterable[dict[str, str]], model: str, calibration: str) -> list[dict[str, Any]]:
    """The rows of one model and calibration as scripts/rivals.py has them: seed by seed, with a dictionary of texts."""
    runs: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        if (row["model"], row["calibration"]) != (model, calibration):
            continue
        numbers = {name: float(row[name]) for name in ("stored_bits", "cpu_seconds")}
        begin = {"method": row["method"], "name": row["name"], "texts": {}, **numbers}
        run = runs.setdefault((row["name"], row["seed"]), begin)
        run["texts"][row["text"]] = {name: float(row[name]) for name in ("kl_mean", "kl_99.9", "same_top")}
    return list(runs.values())


def bits(seeds: list[dict[str, Any]]) -> float:
    """Stored bits of a weight, the mean over seeds."""
    return float(np.mean([run["stored_bits"] for run in seeds]))


def spread(seeds: list[dict[str, Any]], label: str, table: Table) -> str:
    """A table's figure on one text: the mean ± the standard deviation over seeds."""
    values = np.array([run["texts"][label][table.figure] for run in seeds])
    deviation = f" ± {values.std(ddof=1):.{table.digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{table.digits}f}{deviation}"


def markdown(done: list[dict[str, Any]], table: Table) -> str:
    """A line for each method and size, fewest bits first; ± is the standard deviation over seeds."""
    if table.names:
        done = [run for run in done if run["name"] in table.names]
    labels, lines = table.texts or tuple(done[0]["texts"]), []
    for name, seeds in sorted(by_name(done).items(), key=lambda item: bits(item[1])):
        line = [name, f"{bits(seeds):.2f}", *(spread(seeds, label, table) for label in labels)]
        cost = [str(len(seeds)), f"{np.mean([run['cpu_seconds'] for run in seeds]):.0f}"]
        lines.append(line if table.texts else [*line, *cost])
    headings = ["", "stored bits", *labels]
    return markdown_table(headings if table.texts else [*headings, "seeds", "CPU seconds"], lines)


def markdown_of_kinds(rows: list[dict[str, str]], table: Table) -> str:
    """A line for each method and text that it was calibrated on."""
    lines, labels = [], tuple[str, ...]()
    for name in table.names:
        for kind, calibration in CALIBRATIONS.items():
            if seeds := by_name(of_setting(rows, table.model, calibration)).get(name):
                labels = tuple(seeds[0]["texts"])
                figures = [spread(seeds, label, table) for label in labels]
                lines.append([name, kind, f"{bits(seeds):.2f}", *figures, str(len(seeds))])
    return markdown_table(["", "calibrated on", "stored bits", *labels, "seeds"], lines, left=2)


def table_of(name: str, rows: list[dict[str, str]]) -> str:
    """A table of `TABLES`."""
    table = TABLES[name]
    if not table.calibration:
        return markdown_of_kinds(rows, table)
    return markdown(of_setting(rows, table.model, table.calibration), table)


def markdown_of_tasks(rows: Iterable[dict[str, str]]) -> str:
    """A line for each method and size of the setting of "rivals", fewest bits first: differences from the dense model
    in points."""
    runs: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        if (row["model"], row["calibration"]) != (SMOLLM2, MIXTURE):
            continue
        begin = {"name": row["name"], "stored_bits": float(row["stored_bits"]), "tasks": {}}
        run = runs.setdefault((row["name"], row["seed"]), begin)
        numbers = ("questions", "first", "difference", "error", "lost", "gained")
        run["tasks"][row["task"]] = {name: float(row[name]) for name in numbers}
    done = list(runs.values())
    dense = {task: 100 * result["first"] for task, result in done[0]["tasks"].items()}
    questions = sum(result["questions"] for result in done[0]["tasks"].values())
    lines = [["dense", "32", *(f"{score:.1f}" for score in [*dense.values(), np.mean([*dense.values()])]), "–", "–"]]
    for name, seeds in sorted(by_name(done).items(), key=lambda item: bits(item[1])):
        lines.append([name, f"{bits(seeds):.2f}", *task_cells(seeds, list(dense)), str(len(seeds))])
    headings = ["", "stored bits", *(NAMES.get(task, task) for task in dense), "mean"]
    return markdown_table([*headings, f"flips of {questions:,.0f}", "seeds"], lines)


def filled(page: Path, rows: list[dict[str, str]], asked: list[dict[str, str]]) -> str:
    """A page's text with its tables made anew."""
    text = page.read_text(encoding="utf-8")
    for name, table in TABLES.items():
        if table.page == page:
            text = with_table(text, name, table_of(name, rows))
    return with_table(text, TASKS, markdown_of_tasks(asked)) if asked and page == QUALITY else text


def drawn_from(rows: list[dict[str, str]]) -> str:
    """The numbers of the picture as text, for its description."""
    done = of_setting(rows, SMOLLM2, MIXTURE)
    numbers = [
        [run["name"], run["stored_bits"], {label: text["kl_mean"] for label, text in run["texts"].items()}]
        for run in done
    ]
    return json.dumps(numbers)


def add(folder: Path, model: str, calibration: str) -> None:
    """Takes over what was measured."""
    begin = {"model": model, "calibration": calibration}
    for kept, columns, key, rounded in ((FILE, COLUMNS, KEY, MEASURED), (TASKS_FILE, TASK_COLUMNS, TASK_KEY, ASKED)):
        if (new := folder / kept.name).exists():
            merge_rows(kept, columns, key, [row | begin for row in read_rows(new)], rounded)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--add", type=Path, help="folder of scripts/rivals.py")
    parser.add_argument("--model", help="with --add: its name")
    parser.add_argument("--calibration", help="with --add: the text")
    parser.add_argument("--check", action="store_true", help="only compare the page and the picture with the CSV")
    given = parser.parse_args()
    if given.add is not None:
        if not (given.model and given.calibration):
            raise SpQRError("--add needs --model and --calibration")
        add(given.add, given.model, given.calibration)
        return 0
    rows, asked = read_rows(FILE), read_rows(TASKS_FILE) if TASKS_FILE.exists() else []
    pages, numbers = {page: filled(page, rows, asked) for page in (QUALITY, README)}, drawn_from(rows)
    if not given.check:
        for page, text in pages.items():
            page.write_text(text, encoding="utf-8")
        plot(PICTURE, of_setting(rows, SMOLLM2, MIXTURE), labels=SHOWN, description=numbers)
        return 0
    same = {page: page.read_text(encoding="utf-8") == text for page, text in pages.items()}
    same[PICTURE] = text_chunk(PICTURE.read_bytes(), "Description") == numbers
    return report_outdated(same, "scripts/rivals_results.py")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SpQRError as error:
        sys.exit(f"rivals_results: {error}")
