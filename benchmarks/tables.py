#!/usr/bin/env python3
"""Reads the timings in benchmarks/results and makes from them what docs/explanation/performance.md shows.

benchmarks/tables.py                 writes the page's tables
benchmarks/tables.py --check         only compares: exit status 1 if a table of the page differs from the files
benchmarks/tables.py --plot          draws docs/images/cpu_roofline.png (needs matplotlib)
benchmarks/tables.py --show products --only machine=zen3-avx2 --only batch=1
                                     prints the rows of one file; --only is repeatable
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from page import markdown, with_tables
from roofline import roofline
from timings import (
    RESULTS,
    ROOT,
    UNKNOWN,
    AcceleratorRow,
    CompareRow,
    GenerationRow,
    LoadRow,
    MemoryRow,
    ProductRow,
    QuantizeRow,
    Row,
    StartRow,
    TimingsError,
    read,
    texts,
)

PAGE = ROOT / "docs" / "explanation" / "performance.md"
PLOT = ROOT / "docs" / "images" / "cpu_roofline.png"
FILES: dict[str, type[Row]] = {
    "products": ProductRow,
    "generation": GenerationRow,
    "first_and_second_run": StartRow,
    "memory": MemoryRow,
    "load_memory": LoadRow,
    "quantize_time": QuantizeRow,
    "compare_cost": CompareRow,
    "accelerator": AcceleratorRow,
}
AVX2, AVX512 = "zen3-avx2", "zen4-avx512"  # machines
MAIN = "main"  # the run that the page shows

# The rows of the page's table of whole models: rival, its run on the AVX2 machine, its run on the other.
OLDER = "before native attention"
RIVALS = [
    ("dense float32", "5", OLDER),
    ("packed", "5", OLDER),
    ("packed, int8 activations", "5", OLDER),
    ("llama.cpp Q4_1", "5", OLDER),
    ("llama.cpp Q4_K_M", "5", f"{OLDER}, with Q4_K_M"),
    ("PyTorch float32", "3", OLDER),
    ("dense bfloat16", "short", OLDER),
]
SHAPES = ["1536x576", "4096x4096"]
BATCHES = [1, 4, 16, 512]


def cell(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def generation_table(prefill: bool) -> str:
    """Tokens per second and their ratio to dense float32, of the prompt or of new tokens, on both machines."""
    rows = {(row.machine, row.run, row.rival): row for row in read(RESULTS / "generation.csv", GenerationRow)}
    lines = []
    for rival, *runs in RIVALS:
        line = [rival]
        for machine, run in zip((AVX2, AVX512), runs, strict=True):
            row = rows[machine, run, rival]
            if prefill:
                line += [cell(row.prefill_tokens_per_s, 0), cell(row.prefill_ratio_to_dense_f32, 2)]
            else:
                line += [cell(row.tokens_per_s, 1), cell(row.ratio_to_dense_f32, 2)]
        lines.append(line)
    header = ["", "AVX2: tokens/s", "× dense float32", "AVX-512: tokens/s", "× dense float32"]
    return markdown(header, lines, numbers_from=1)


def product_table() -> str:
    """Ratios to dense float32 at two shapes."""
    rows = {
        (row.machine, row.shape, row.batch, row.rival): row
        for row in read(RESULTS / "products.csv", ProductRow)
        if row.run == MAIN
    }
    lines = []
    for shape in SHAPES:
        for batch in BATCHES:
            line = [shape, str(batch)]
            for machine, kernels in ((AVX2, "avx2"), (AVX512, "avx512vnni")):
                exact = rows[machine, shape, batch, f"{kernels}, all threads"]
                rounded = rows.get((machine, shape, batch, f"{kernels}, int8 activations"))
                line += [cell(exact.median_ms, 3), cell(exact.ratio_to_dense_f32, 2)]
                line.append(cell(rounded.ratio_to_dense_f32 if rounded else None, 2))
            lines.append(line)
    header = ["shape", "batch", "AVX2: ms", "× dense", "×, int8", "AVX-512: ms", "× dense", "×, int8"]
    return markdown(header, lines, numbers_from=1)


def start_table() -> str:
    """First and second run of three commands."""
    header = ["command", "first run, s", "programs compiled", "second run, s", "programs compiled", "first / second"]
    lines = [
        [
            row.command,
            cell(row.first_s, 1),
            str(row.first_programs),
            cell(row.second_s, 1),
            str(row.second_programs),
            cell(row.ratio, 2),
        ]
        for row in read(RESULTS / "first_and_second_run.csv", StartRow)
        if (row.machine, row.run) == (AVX2, MAIN)
    ]
    return markdown(header, lines, numbers_from=1)


def memory_table() -> str:
    """What a process holds while it generates."""
    [row] = [row for row in read(RESULTS / "memory.csv", MemoryRow) if (row.machine, row.run) == (UNKNOWN, MAIN)]
    lines = [
        ["Python, JAX and compiled programs", cell(row.runtime_mb, 0)],
        ["packed weights", cell(row.weights_mb, 0)],
        ["KV cache", cell(row.cache_mb, 0)],
        ["the whole process", cell(row.held_mb, 0)],
    ]
    return markdown(["while generating", "MB"], lines, numbers_from=1)


def load_table() -> str:
    """Peak memory of reading a model."""
    header = ["file", "read as", "weights, GiB", "peak, GiB", "peak / weights"]
    lines = [
        [row.file, row.read_as, cell(row.weights_gib, 2), cell(row.peak_gib, 2), cell(row.ratio, 2)]
        for row in read(RESULTS / "load_memory.csv", LoadRow)
        if (row.machine, row.run) == (UNKNOWN, MAIN)
    ]
    return markdown(header, lines, numbers_from=2)


def page_tables() -> dict[str, str]:
    """The page's tables by name."""
    return {
        "generation": generation_table(prefill=False),
        "prompts": generation_table(prefill=True),
        "first and second run": start_table(),
        "products": product_table(),
        "memory": memory_table(),
        "load memory": load_table(),
    }


def update(page: Path, tables: dict[str, str], only_check: bool) -> int:
    """Writes the tables into the page, or says which differ. Returns the exit status."""
    text = page.read_text(encoding="utf-8")
    if not only_check:
        page.write_text(with_tables(text, tables), encoding="utf-8")
        return 0
    stale = [name for name, table in tables.items() if with_tables(text, {name: table}) != text]
    for name in stale:
        print(f"{page}: the table '{name}' differs from {RESULTS}; run benchmarks/tables.py", file=sys.stderr)
    return 1 if stale else 0


def show(name: str, conditions: list[str]) -> None:
    """Prints the rows of a file that meet all conditions, each COLUMN=VALUE; columns that are all empty are left out.

    Raises:
      TimingsError: the file has no such column.
    """
    rows = [texts(row) for row in read(RESULTS / f"{name}.csv", FILES[name])]
    for condition in conditions:
        column, _, value = condition.partition("=")
        if rows and column not in rows[0]:
            raise TimingsError(f"{name}.csv has no column {column!r}: it has {', '.join(rows[0])}")
        rows = [row for row in rows if row[column] == value]
    columns = [column for column in (rows[0] if rows else {}) if any(row[column] for row in rows)]
    print(markdown(columns, [[row[column] for column in columns] for row in rows]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="compare the page with the files, write nothing")
    action.add_argument("--plot", action="store_true", help="draw the roofline figure")
    action.add_argument("--show", choices=FILES, help="print one file")
    parser.add_argument("--only", action="append", default=[], metavar="COLUMN=VALUE", help="with --show: these rows")
    given = parser.parse_args()
    try:
        if given.show:
            show(given.show, given.only)
        elif given.plot:
            rows = read(RESULTS / "products.csv", ProductRow)
            roofline([row for row in rows if (row.machine, row.run) == (AVX2, MAIN)], PLOT)
        else:
            return update(PAGE, page_tables(), given.check)
    except (TimingsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
