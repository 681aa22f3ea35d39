"""Which sources the compiled kernels depend on, and that a change of one is noticed."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
from aot import proof
from support import ROOT


def test_every_kernel_is_looked_at():
    kernels, step = (set(proof.sources(judges)) for judges in proof._JUDGES.values())
    assert set((ROOT / "pallas_kernels").rglob("*.py")) <= kernels
    in_a_step = ("generate", "products/pallas", "sampling", "models/decoder", "models/ready", "array", "packing")
    assert {ROOT / "spqr_jax" / f"{name}.py" for name in in_a_step} <= step


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("pallas_kernels/spqr_matmul/tpu.py", "kernels, step"),
        ("tests/aot/requirements.txt", "kernels, step"),
        ("tests/aot/cases.py", "kernels"),
        ("tests/support/ptx/races.py", "kernels"),
        ("tests/support/ptx/arithmetic.py", "kernels"),
        ("spqr_jax/models/attention.py", "step"),
        ("spqr_jax/solver/grid.py", ""),
    ],
)
def test_a_change_is_noticed_where_it_matters(tmp_path, file, says):
    ignored = shutil.ignore_patterns("__pycache__", "*.so", ".*")
    for folder in ("spqr_jax", "pallas_kernels", "cpu_kernels", "tests/aot", "tests/support"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)

    def run(*options):
        command = [sys.executable, tmp_path / "tests" / "aot" / "proof.py", *options]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert run("--write").returncode == 0
    assert run().returncode == 0
    with open(tmp_path / file, "a") as source:
        source.write("\n# changed\n")
    result = run()
    assert result.returncode == (1 if says else 0)
    assert result.stderr.strip() == (f"not proven for these sources: {says}" if says else "")
