"""Seconds to lower and to compile the programs of generation, from an empty cache of programs and from a full one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from report import Report

PROGRAM = Path(__file__).resolve().parents[1] / "gpu_program.py"


def measure(report: Report, small: bool) -> None:
    """The same process twice with one cache; then other numbers of layers."""
    layers = ["2"] if small else ["2", "32"]
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(Path(folder) / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        for cache in ("empty", "full"):
            out = Path(folder) / f"{cache}.jsonl"
            command = [sys.executable, str(PROGRAM), "--device", "--json", str(out), "--layers", *layers]
            command += ["--size", "small"] if small else ["--mixed"]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            for line in out.read_text().splitlines() if out.exists() else []:
                report.line(
                    cache=cache, **{key: v for key, v in json.loads(line).items() if key not in ("layer", "kinds")}
                )
            if done.returncode:
                report.line(cache=cache, failed=done.stderr[-600:])
                return
