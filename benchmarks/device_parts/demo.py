"""The demo model with the commands: quantize, perplexity, and the first tokens of generate in a new process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from report import Report


def measure(report: Report, small: bool) -> None:
    """DEMO_MODEL names the model's folder or file; without it the model is `demo`, which may need the network."""
    model = os.environ.get("DEMO_MODEL", "demo")
    tokens = (1, 64) if small else (16, 1024)
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "small")
        calibration = ["--calib", "pydoc", "--nsamples", str(tokens[0]), "--seqlen", str(tokens[1])]
        quantize = ["quantize", model, "--out", out, "--bits", "3", "--outlier-threshold", "0.2", "--head-bits", "none"]
        if not _command(report, [*quantize, *calibration]):
            return
        seqlen, windows = ("64", "2") if small else ("2048", "10")
        _command(report, ["perplexity", out, "--data", "pydoc", "--seqlen", seqlen, "--windows", windows])
        for run in ("first", "second"):
            _command(report, ["generate", out, "--prompt", "The sky is", "--max-new-tokens", "16"], run=run)


def _command(report: Report, words: list[str], **more: Any) -> bool:
    """Runs a spqr command; whether it succeeded."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        begun = time.perf_counter()
        command = [sys.executable, "-m", "spqr_jax", *words, "--json", str(result)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - begun
        values = json.loads(result.read_text()) if result.exists() else {}
    figures = {key: value for key, value in values.items() if isinstance(value, int | float)}
    entry = {"command": words[0], "process_seconds": seconds, **more, "result": figures}
    if done.returncode:
        entry["failed"] = done.stderr[-600:]
    report.line(**entry)
    return not done.returncode
