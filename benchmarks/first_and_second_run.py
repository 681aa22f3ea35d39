#!/usr/bin/env python3
"""What the cache of compiled programs saves: each command with an empty cache, and again.

    python benchmarks/first_and_second_run.py --model demo --turns 3

A turn is `spqr quantize`, `perplexity` and `generate`, first with an empty folder of compiled programs, then with
the folder that this left behind. Seconds are of the whole process.
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


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--turns", type=int, default=3)
    return parser.parse_args()


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
    subprocess.run(
        [sys.executable, "-m", "spqr_jax", *command],
        env=environment | {"SPQR_CACHE": str(cache)},
        check=True,
        capture_output=True,
    )
    return time.perf_counter() - begun, sum(1 for _ in cache.rglob("*-cache")) - before


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
    print("| command | first run, s | programs | second run, s | programs | first / second |")
    print("|---|---:|---:|---:|---:|---:|")
    for name in commands("", ""):
        first, second = seconds[name, 0], seconds[name, 1]
        ratio = statistics.median(a / b for a, b in zip(first, second, strict=True))
        print(
            f"| {name} | {statistics.median(first):.1f} | {programs[name, 0]} | {statistics.median(second):.1f} "
            f"| {programs[name, 1]} | {ratio:.2f} |"
        )
    print(f"\n{options.turns} turns; the folder held {size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
