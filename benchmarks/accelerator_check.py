#!/usr/bin/env python3
"""Checks and measures everything that needs a GPU (or a TPU), the most important first, in under 8 minutes.

    scripts/gpu_check.sh                                  sets up, runs this script and says what to send back
    benchmarks/accelerator_check.py --parts right card    only these parts
    benchmarks/accelerator_check.py --dry-run             the same code on a CPU, on tiny problems: no figures

Each part runs in a process of its own and has a time limit; a part that fails or hangs does not stop the others. Every
figure is written to the report (one JSON object a line) as soon as it is known. Weights are random; only the part
`demo` needs a model, and the network if the model is not there.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import report as reports
from timings import AcceleratorRow, add_csv_options, check_csv, save

ROOT = Path(__file__).resolve().parents[1]
PARTS = {
    "right": ("right", 75, {}),
    "card": ("card", 30, {}),
    "products": ("products", 120, {}),
    "steps_2_layers": ("steps", 60, {"LAYERS": "2"}),
    "steps_32_layers": ("steps", 130, {"LAYERS": "32"}),
    "steps_with_host_loops": (
        "steps",
        60,
        {"LAYERS": "32", "ONLY": "packed 1", "XLA_FLAGS": "--xla_gpu_enable_command_buffer=-WHILE"},
    ),
    "compiling": ("compiling", 75, {}),
    "steps_without_graphs": (
        "steps",
        45,
        {"LAYERS": "2", "ONLY": "packed 1", "XLA_FLAGS": "--xla_gpu_enable_command_buffer="},
    ),
    "settings": ("settings", 50, {}),
    "demo": ("demo", 75, {}),
    "solver": ("solver", 45, {}),
}
"""{part: (module of device_parts, seconds, environment)}, the most important first."""
SECONDS = 470
"""Limit of all parts together."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="limit of all parts together")
    parser.add_argument("--dry-run", action="store_true", help="tiny problems on this machine's CPU, in this process")
    parser.add_argument("--out", type=Path, default=Path("accelerator_report.jsonl"), help="the report")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # a process of one part
    parser.add_argument("--begun", type=float, default=time.time(), help=argparse.SUPPRESS)
    add_csv_options(parser, "accelerator.csv")
    given = parser.parse_args()
    check_csv(parser, given.csv, AcceleratorRow)
    if given.part:
        return measure(given.part, given.out, given.begun, small=False)
    given.out.write_text("")
    if given.dry_run:
        failed = [part for part in given.parts if measure(part, given.out, given.begun, small=True)]
    else:
        failed = run_parts(given)
    lines = reports.read(given.out)
    save(given.csv, AcceleratorRow, given, rows_of(lines))
    wrong = [line for line in lines if line.get("right") is False]
    print(f"report: {given.out}; parts that failed: {', '.join(failed) or 'none'}; wrong results: {len(wrong)}")
    return 1 if failed or wrong else 0


def measure(part: str, out: Path, begun: float, *, small: bool) -> int:
    """Runs one part in this process: its exit status."""
    module, _, environment = PARTS[part]
    report = reports.Report(out, part, begun)
    os.environ.update({key: value for key, value in environment.items() if key != "XLA_FLAGS"})
    try:
        importlib.import_module(f"device_parts.{module}").measure(report, small)
    except Exception as error:  # belongs into the report, whatever it is
        report.line(failed=f"{type(error).__name__}: {error}"[:2000])
        return 1
    return 0


def run_parts(given: argparse.Namespace) -> list[str]:
    """Runs parts in processes until the time is up: the names of those that failed."""
    failed = []
    with tempfile.TemporaryDirectory() as cache:  # empty, so that the first compilation is one
        for part in given.parts:
            _, limit, environment = PARTS[part]
            left = given.begun + given.seconds - time.time()
            report = reports.Report(given.out, part, given.begun)
            if left < 10:
                report.line(skipped="the time is up")
                failed.append(part)
                continue
            command = [sys.executable, __file__, "--part", part, "--out", str(given.out), "--begun", str(given.begun)]
            begun = time.time()
            reason = run(command, _environment(environment, cache), min(limit, left))
            report.line(part_seconds=time.time() - begun, **({"failed": reason} if reason else {}))
            failed += [part] if reason else []
    return failed


def _environment(environment: dict[str, str], cache: str) -> dict[str, str]:
    flags = f"{os.environ.get('XLA_FLAGS', '')} {environment.get('XLA_FLAGS', '')}".strip()
    values = {
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "PYTHONUNBUFFERED": "1",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # parts start processes of their own
    }
    return os.environ | values | environment | {"XLA_FLAGS": flags}


def run(command: list[str], environment: dict[str, str], seconds: float) -> str:
    """Runs a command in a process group of its own; why it failed, or ""."""
    process = subprocess.Popen(command, env=environment, cwd=ROOT, start_new_session=True)
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return f"exit status {status}" if status else ""


def rows_of(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The columns of `AcceleratorRow` for every product."""
    return [
        {
            "shape": line["shape"],
            "batch": line["rows"],
            "rival": line["rival"],
            "median_us": line["us"],
            "ratio_to_dense_16bit": line.get("times_dense"),
        }
        for line in lines
        if line["part"] == "products" and "us" in line
    ]


if __name__ == "__main__":
    sys.exit(main())
