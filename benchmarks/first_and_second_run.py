#!/usr/bin/env python3
"""Times each command twice: with an empty cache of compiled programs, and with the cache that this run filled.

    python benchmarks/first_and_second_run.py --model demo --turns 3

A turn runs `spqr quantize`, `spqr perplexity` and `spqr generate`, first with an empty cache, then all three again.
Seconds are wall-clock seconds of the whole process. The table shows medians over the turns.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from timings import StartRow, add_csv_options, check_csv, save


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--turns", type=int, default=3)
    add_csv_options(parser, "first_and_second_run.csv")
    options = parser.parse_args()
    check_csv(parser, options.csv, StartRow)
    return options


def commands(model: str, small: str) -> dict[str, list[str]]:
    text = ["--seqlen", "512"]
    return {
        "quantize": [
            "quantize",
            model,
            "--out",
            small,
            "--overwrite",
            "--bits",
            "3",
            "--calib",
            "pydoc",
            "--nsamples",
            "4",
            *text,
        ],
        "perplexity": ["perplexity", small, "--data", "pydoc", "--windows", "4", *text],
        "generate": ["generate", small, "--prompt", "A small robot", "--max-new-tokens", "32"],
    }


def run(command: list[str], cache: Path) -> tuple[float, int]:
    """Wall seconds of a command, and how many programs it compiled."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    before = sum(1 for _ in cache.rglob("*-cache"))
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "spqr_jax", *command],
        env=environment | {"SPQR_CACHE": str(cache)},
        capture_output=True,
        text=True,
    )
    seconds = time.perf_counter() - begun
    if done.returncode:
        sys.exit(f"spqr {' '.join(command)} failed:\n{done.stderr}")
    return seconds, sum(1 for _ in cache.rglob("*-cache")) - before


def main() -> None:
    options = arguments()
    seconds: dict[tuple[str, int], list[float]] = {}
    programs: dict[tuple[str, int], int] = {}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(options.turns):
            cache = Path(folder) / f"programs-{turn}"
            for time_round in (0, 1):
                for name, command in commands(options.model, str(Path(folder) / "small")).items():
                    took, compiled = run(command, cache)
                    seconds.setdefault((name, time_round), []).append(took)
                    programs[name, time_round] = compiled
                    print(f"{name}, run {time_round + 1}: {took:.1f} s, {compiled} programs compiled", file=sys.stderr)
            size = sum(path.stat().st_size for path in cache.rglob("*-cache"))
    rows = []
    print("| command | first run, s | programs | second run, s | programs | first / second |")
    print("|---|---:|---:|---:|---:|---:|")
    for name in commands("", ""):
        first, second = seconds[name, 0], seconds[name, 1]
        row = {
            "model": Path(options.model).name,
            "command": name,
            "turns": options.turns,
            "first_s": statistics.median(first),
            "first_programs": programs[name, 0],
            "second_s": statistics.median(second),
            "second_programs": programs[name, 1],
            "ratio": statistics.median(a / b for a, b in zip(first, second, strict=True)),
        }
        rows.append(row)
        print(
            f"| {name} | {row['first_s']:.1f} | {row['first_programs']} | {row['second_s']:.1f} "
            f"| {row['second_programs']} | {row['ratio']:.2f} |"
        )
    print(f"\nturns: {options.turns}; size of the cache of compiled programs: {size / 1e6:.0f} MB")
    save(options.csv, StartRow, options, rows)


if __name__ == "__main__":
    main()
