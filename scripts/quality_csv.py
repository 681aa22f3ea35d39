"""The columns of benchmarks/results/quality.csv: one row for each configuration and text.

`scripts/quality.py --csv` writes this format; `plot_quality.py` and `quality_tables.py` read it.
Values are text, so that a page shows exactly the digits that were recorded. An empty field was not measured:
`stored_bits` is empty for implementations that publish only the bits of the paper's formula (`ideal_bits`).
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
COLUMNS = (
    "table",  # which comparison the row belongs to
    "name",
    "model",
    "method",
    "options",  # of `spqr quantize`
    "tuned",  # the value of --tune
    "calibration",
    "calibration_windows",  # count x tokens
    "seed",  # that draws the calibration windows
    "bits_of",  # "blocks" or "output head": which weights the two columns of bits count
    "ideal_bits",  # per weight, by the paper's formula
    "stored_bits",  # per weight, every stored byte
    "text",
    "text_windows",  # count x tokens
    "perplexity",
    "loss_above_dense",  # nats per token
    "loss_stderr",
    "kl",  # KL divergence from the dense model, nats per token
    "kl_stderr",
    "same_top_percent",  # tokens where both models have the same likeliest token
    "same_top_stderr",
    "outlier_percent",
    "cpu_seconds",  # of the whole quantization
    "wall_seconds",
    "peak_gib",
    "note",
)


def read_rows(path: Path) -> list[dict[str, str]]:
    """All rows of a CSV file, as text.

    Raises:
      ValueError: a row has too many or too few fields.
    """
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, restval=None))
    for number, row in enumerate(rows, start=2):
        if None in row or None in row.values():
            raise ValueError(f"{path}: row {number} does not have the header's number of fields")
    return rows


def write_rows(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Writes rows in the format above; columns that a row lacks stay empty."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def merge_rows(
    path: Path, columns: Sequence[str], key: Sequence[str], rows: Iterable[Mapping[str, str]], rounded: Sequence[str]
) -> None:
    """Adds rows to a CSV file, which need not exist; a row with the same values of `key` is replaced.

    Args:
      path: the file.
      columns: of the file; what else the rows have is left out.
      key: columns that tell rows apart.
      rows: what is added, as text.
      rounded: columns whose values, where they have a decimal point, are kept with six digits.
    """
    kept = {tuple(row[name] for name in key): row for row in (read_rows(path) if path.exists() else [])}
    for row in rows:
        numbers = {name: f"{float(row[name]):.6g}" for name in rounded if _is_fraction(row[name])}
        kept[tuple(row[name] for name in key)] = {**row, **numbers}
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(kept.values())


def _is_fraction(text: str) -> bool:
    try:
        return "." in text and math.isfinite(float(text))
    except ValueError:
        return False
