"""The scripts that make the tables of the documentation, on a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_models import write_hf

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


def test_quality_measures_each_row_once(tiny_model, tmp_path):
    write_hf(tmp_path / "model", tiny_model)
    rng = np.random.default_rng(0)
    for name in ("calib", "text"):
        np.save(tmp_path / f"{name}.npy", rng.integers(0, 256, 2000))
    command = [sys.executable, SCRIPTS / "quality.py", "model", "--out", "found", "--calib", "calib.npy"]
    command += ["--nsamples", "4", "--seqlen", "32", "--data", "a text", "text.npy", "64", "5"]
    command += ["--row", "--method rtn --bits 4"]

    def run():
        return subprocess.run(
            command, cwd=tmp_path, env=os.environ | {"COLUMNS": "200"}, capture_output=True, text=True, check=True
        )

    run()
    table = (tmp_path / "found" / "table.md").read_text()
    files = list((tmp_path / "found").glob("*.json"))
    rows = {values["row"]: values for values in (json.loads(path.read_text()) for path in files)}
    assert set(rows) == {"dense", "--method rtn --bits 4"}
    dense, quantized = rows["dense"], rows["--method rtn --bits 4"]
    assert len(dense["texts"]["a text"]["window_losses"]) == 5
    assert quantized["texts"]["a text"]["perplexity"] != dense["texts"]["a text"]["perplexity"]
    assert quantized["ideal_bits"] == pytest.approx(6.0)  # 4 and two 16-bit floats for 16 weights
    assert quantized["cpu_seconds"] > 0.5
    assert quantized["peak_gib"] > 0.05
    assert f"{quantized['texts']['a text']['perplexity']:.2f}" in table
    times = [path.stat().st_mtime_ns for path in files]
    run()  # what is done is kept
    assert times == [path.stat().st_mtime_ns for path in files]
    assert (tmp_path / "found" / "table.md").read_text() == table


def test_the_tables_of_the_kernels_page_are_made_from_what_was_counted():
    command = [sys.executable, SCRIPTS.parent / "benchmarks" / "kernel_tables.py", "--check"]
    assert subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}).returncode == 0


@pytest.mark.slow
def test_the_accelerator_check_runs_where_there_is_none(tmp_path):
    command = [
        sys.executable,
        SCRIPTS.parent / "benchmarks" / "accelerator_check.py",
        "--out",
        tmp_path / "report.json",
    ]
    command += ["--shapes", "64x96", "--batch", "1", "--turns", "1"]
    subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, check=True, stdout=subprocess.DEVNULL)
    report = json.loads((tmp_path / "report.json").read_text())
    assert [c["right"] for c in report["checks"]] == [True] * 5
    assert set(report["times"][0]["seconds"]) == {"dense bfloat16", "dense float16", "xla"}
