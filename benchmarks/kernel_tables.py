#!/usr/bin/env python3
"""Writes the tables of docs/explanation/kernels.md from budgets.json, gpu_model.py and results/accelerator.csv.

benchmarks/kernel_tables.py           writes them
benchmarks/kernel_tables.py --check   only compares: exit status 1 if a table of the page is out of date
"""

from __future__ import annotations

import argparse
import json
import sys

from gpu_model import (
    CHECK_HEADER,
    HEADER,
    PRODUCTS_HEADER,
    ROOT,
    TITLES,
    bits_a_weight,
    check,
    options_of,
    products_of_h100,
    rows_of_table,
)
from page import markdown, with_tables

DOCS = ROOT / "docs" / "explanation" / "kernels.md"
NAMES = {**TITLES, "v6e": "TPU v6e"}


def budget_rows() -> list[list[str]]:
    """Device, kernel, rows of x, format, counted instructions, registers, shared memory, wide loads."""
    rows = []
    for case, budget in json.loads((ROOT / "tests" / "aot" / "budgets.json").read_text())["cases"].items():
        name, kernel, given = options_of(case)
        if kernel == "xla":
            continue  # not one of our kernels
        batch = given.pop("--batch", "1")
        for name_of_size in ("--splits", "--out", "--inner"):
            given.pop(name_of_size, None)
        form = ", ".join(f"{key.strip('-').replace('-', ' ')} {value}".strip() for key, value in given.items())
        if kernel == "tpu":
            counted = [f"{budget['weights_per_bundle']:.0f} weights per bundle", "", "", ""]
        else:
            wide = ", ".join(f"{count} {op}" for op, count in budget["wide_loads"].items())
            counted = [
                f"{budget['instructions_per_weight']:.2f}",
                str(budget["registers"]),
                f"{budget['shared_bytes'] / 1024:.0f} KiB",
                wide,
            ]
        rows.append([NAMES[name], kernel, batch, form, *counted])
    return rows


def filled(text: str) -> str:
    """The page with new tables."""
    header = [
        "device",
        "kernel",
        "rows of x",
        "format",
        "instructions per weight",
        "registers",
        "shared memory",
        "wide loads",
    ]
    tables = {
        "budgets": markdown(header, budget_rows()),
        "predictions": markdown(HEADER, rows_of_table()),
        "products on an H100": markdown(PRODUCTS_HEADER, products_of_h100()),
        "model against measurements": markdown(CHECK_HEADER, check()),
    }
    return with_tables(text, tables)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare the page with the tables, write nothing")
    given = parser.parse_args()
    text = DOCS.read_text()
    new = filled(text)
    if not given.check:
        DOCS.write_text(new)
        return 0
    bits = f"{bits_a_weight():.2f} bits"
    if new == text and bits in text:
        return 0
    reason = "a table is out of date; run benchmarks/kernel_tables.py" if new != text else f"it must say '{bits}'"
    print(f"{DOCS}: {reason}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
