#!/usr/bin/env python3
"""Makes the tables of docs/explanation/kernels.md from tests/aot/budgets.json and gpu_model.py.

--check only compares.
"""

from __future__ import annotations

import json
import sys

from gpu_model import HEADER, ROOT, TITLES, bits_a_weight, rows_of_table

DOCS = ROOT / "docs" / "explanation" / "kernels.md"
NAMES = {**TITLES, "v6e": "TPU v6e"}


def budget_rows() -> list[list[str]]:
    """Device, kernel, rows of x, what was counted, registers, shared memory, wide loads."""
    found = []
    for case, budget in json.loads((ROOT / "tests" / "aot" / "budgets.json").read_text())["cases"].items():
        name, kernel, *options = case.split()
        if kernel == "xla":
            continue  # no kernel of ours
        given = dict(zip(options[::2], options[1::2], strict=True))
        batch = given.pop("--batch", "1")
        given.pop("--splits", None)
        form = ", ".join(f"{key.strip('-').replace('-', ' ')} {value}" for key, value in given.items())
        if kernel == "tpu":
            counted = [f"{budget['weights_per_bundle']:.0f} weights a bundle", "", "", ""]
        else:
            wide = ", ".join(f"{count} {op}" for op, count in budget["wide_loads"].items())
            counted = [
                f"{budget['instructions_per_weight']:.2f}",
                str(budget["registers"]),
                f"{budget['shared_bytes'] / 1024:.0f} KiB",
                wide,
            ]
        found.append([NAMES[name], kernel, batch, form, *counted])
    return found


def markdown(header: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *lines])


def filled(text: str) -> str:
    """The page with its tables made anew."""
    header = [
        "device",
        "kernel",
        "rows of x",
        "format",
        "instructions a weight",
        "registers",
        "shared memory",
        "wide loads",
    ]
    tables = {"budgets": markdown(header, budget_rows()), "predictions": markdown(HEADER, rows_of_table())}
    for marker, table in tables.items():
        begin, end = f"<!-- {marker} -->", f"<!-- end of {marker} -->"
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}"
    return text


def main() -> int:
    text = DOCS.read_text()
    new = filled(text)
    if "--check" in sys.argv[1:]:
        return 0 if new == text and f"{bits_a_weight('fragments'):.2f} bits" in text else 1
    DOCS.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
