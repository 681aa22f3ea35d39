#!/usr/bin/env python3
"""Makes the tables of docs/explanation/quality.md and evaluation.md from the CSV files in benchmarks/results.

scripts/quality_tables.py            write the tables into the pages
scripts/quality_tables.py --check    exit with 1 if a page differs from the CSV files
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from kept_rows import markdown_table, with_table
from quality_csv import RESULTS, read_rows

PAGES = Path(__file__).parent.parent / "docs" / "explanation"
WIKITEXT2, PTB, HELD_BACK = "WikiText-2 test", "PTB validation", "held back"


@dataclasses.dataclass(frozen=True)
class Column:
    """One column: its heading, the CSV's field, and from which text's row ("": the configuration's first row)."""

    heading: str
    field: str
    text: str = ""
    error: str = ""  # the field with the standard error, written after ±
    unit: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of a page, between `<!-- NAME -->` and `<!-- end of NAME -->`."""

    page: str
    columns: tuple[Column, ...]
    rows: str = ""  # whose rows: a value of the CSV's column `table`; "": the table's name
    names: tuple[str, ...] = ()  # the configurations shown; (): all


NAME = Column("", "name")
OPTIONS = Column("options of `spqr quantize`", "options")
BITS = (Column("ideal bits", "ideal_bits"), Column("stored bits", "stored_bits"))
PERPLEXITY = tuple(
    Column(text.split()[0] if text != HELD_BACK else text, "perplexity", text) for text in (WIKITEXT2, PTB)
)
HELD = Column("held back", "perplexity", HELD_BACK)
LOSS = Column("loss above dense, nats", "loss_above_dense", WIKITEXT2, "loss_stderr")
SECONDS = Column("CPU seconds", "cpu_seconds")


def fidelity_columns(text: str) -> tuple[Column, ...]:
    """How far each preset's predictions on one text are from the dense model's."""
    return (
        Column("preset", "name"),
        Column("stored bits", "stored_bits"),
        Column("perplexity", "perplexity", text),
        *((LOSS,) if text == LOSS.text else ()),
        Column("KL divergence, nats", "kl", text, "kl_stderr"),
        Column("same top token", "same_top_percent", text, "same_top_stderr", "%"),
    )


TABLES = {
    "main": Table("quality.md", (NAME, *BITS, HELD, *PERPLEXITY, SECONDS)),
    "off-grid": Table("quality.md", (NAME, *BITS, HELD, *PERPLEXITY)),
    "gemma": Table("quality.md", (NAME, *BITS, HELD, PERPLEXITY[0], LOSS)),
    "llama_cpp": Table(
        "quality.md",
        (
            NAME,
            BITS[1],
            Column("KL, prose", "kl_prose"),
            Column("KL, code", "kl_code"),
            Column("same top token, prose", "same_top_prose_percent", unit="%"),
            SECONDS,
        ),
    ),
    "fidelity": Table("evaluation.md", fidelity_columns(WIKITEXT2)),
    "fidelity-ptb": Table("evaluation.md", fidelity_columns(PTB), rows="fidelity"),
    "distributions": Table(
        "evaluation.md",
        (
            Column("WikiText-2 test", "name"),
            *(Column(f"`{preset}`", "value", preset) for preset in ("near-lossless", "4bit", "3bit")),
        ),
        names=(
            "KL divergence, median",
            "KL divergence, 99%",
            "same top token where the dense model is sure, %",
            "flips, %",
            "Δp of the true token, root mean square, %",
        ),
    ),
    "methods": Table(
        "evaluation.md",
        (
            NAME,
            *BITS,
            Column("perplexity", "perplexity"),
            LOSS,
            Column("KL", "kl"),
            Column("same top token", "same_top_percent", unit="%"),
            SECONDS,
            Column("peak GiB", "peak_gib"),
        ),
    ),
}


def read_tables() -> dict[str, list[dict[str, str]]]:
    """The rows of each table, in the order of the CSV files."""
    tables: dict[str, list[dict[str, str]]] = {"llama_cpp": read_rows(RESULTS / "llama_cpp.csv")}
    statistics = read_rows(RESULTS / "quality_distributions.csv")
    tables["distributions"] = [row | {"name": row["statistic"], "text": row["preset"]} for row in statistics]
    for row in read_rows(RESULTS / "quality.csv"):
        tables.setdefault(row["table"], []).append(row)
    return tables


def cell(column: Column, rows: list[dict[str, str]]) -> str:
    """One configuration's value, from its rows (one for each text)."""
    values = next((row for row in rows if column.text in ("", row.get("text"))), {})
    value = values.get(column.field, "")
    if not value:
        return "–"
    error = f" ± {values[column.error]}{column.unit}" if column.error and values[column.error] else ""
    return f"{value}{column.unit}{error}"


def markdown(columns: tuple[Column, ...], rows: list[dict[str, str]]) -> str:
    """A table with one line for each configuration."""
    configurations: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        configurations.setdefault(row["name"], []).append(row)
    lines = [[cell(column, texts) for column in columns] for texts in configurations.values()]
    return markdown_table([column.heading for column in columns], lines)


def filled(page: str, text: str, rows: dict[str, list[dict[str, str]]]) -> str:
    """The page's text with its tables made anew."""
    for name, table in TABLES.items():
        if table.page == page:
            shown = [row for row in rows[table.rows or name] if not table.names or row["name"] in table.names]
            text = with_table(text, name, markdown(table.columns, shown))
    return text


def main() -> int:
    rows, status = read_tables(), 0
    for page in sorted({table.page for table in TABLES.values()}):
        text = (PAGES / page).read_text(encoding="utf-8")
        new = filled(page, text, rows)
        if "--check" not in sys.argv[1:]:
            (PAGES / page).write_text(new, encoding="utf-8")
        elif new != text:
            print(f"{page} differs from benchmarks/results: run scripts/quality_tables.py", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
