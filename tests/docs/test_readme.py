"""What the README promises: it is short, its commands and its Python run, and its table is the measured one."""

from __future__ import annotations

import csv
import re

import pytest
from support import ROOT
from support.pages import blocks_to_run, run_page

README = ROOT / "README.md"
LONGEST = 1100
"""Words, tables and code included: a reader decides in two minutes."""
FIRST_PYTHON = 80
"""A line before which the Python example begins."""


def test_it_takes_two_minutes():
    words = len(README.read_text(encoding="utf-8").split())
    assert words <= LONGEST, f"{words} words: move the details to docs/"


def test_python_is_seen_early():
    python = next(block for block in blocks_to_run(README) if block.language == "python")
    assert python.line < FIRST_PYTHON


def test_its_commands_and_its_python_run(tmp_path):
    run_page(README, tmp_path)


@pytest.mark.slow
def test_its_commands_and_its_python_run_with_the_real_model(tmp_path):
    run_page(README, tmp_path, real_demo=True)


def test_its_table_holds_the_measured_figures():
    """Each row of the table against rivals is a row of benchmarks/results/quality.csv."""
    section = README.read_text(encoding="utf-8").split("## How good is it?")[1].split("\n## ")[0]
    rows = [re.findall(r"\d+(?:\.\d+)?|–", _cells(line)) for line in section.splitlines() if line.startswith("| ")]
    rows = [row for row in rows if len(row) == 4]  # not the heading
    assert len(rows) == 5
    measured = _perplexities()
    for ideal, stored, wikitext, ptb in rows:
        key = (float(ideal), None if stored == "–" else float(stored))
        assert (float(wikitext), float(ptb)) in measured[key], (key, measured[key])


def _cells(line: str) -> str:
    """The numbers' columns: all but the first."""
    return "|".join(line.split("|")[2:]).replace("*", "")


def _perplexities() -> dict[tuple[float, float | None], set[tuple[float, float]]]:
    """(ideal bits, stored bits) to all pairs of perplexities (WikiText-2, PTB) measured for one row of a table."""
    runs: dict[tuple[str, ...], dict[str, float]] = {}
    with (ROOT / "benchmarks" / "results" / "quality.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["text"] in ("WikiText-2 test", "PTB validation") and row["perplexity"] and row["ideal_bits"]:
                run = tuple(
                    row[column] for column in ("table", "name", "options", "tuned", "ideal_bits", "stored_bits")
                )
                runs.setdefault(run, {})[row["text"]] = float(row["perplexity"])
    pairs: dict[tuple[float, float | None], set[tuple[float, float]]] = {}
    for (*_, ideal, stored), texts in runs.items():
        if len(texts) == 2:
            bits = (round(float(ideal), 2), round(float(stored), 2) if stored else None)
            pairs.setdefault(bits, set()).add((texts["WikiText-2 test"], texts["PTB validation"]))
    return pairs
