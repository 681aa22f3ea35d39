"""The CPU kernels for ARM: compiled by Clang, run in an emulator. What they compute, not how fast."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cpu_kernels import build

pytestmark = pytest.mark.slow


def test_neon_kernels_are_right(tmp_path):
    """The program that checks random matrices and attention against float64, as on x86 under sanitizers."""
    pytest.importorskip("ziglang", reason="needs ziglang, a compiler for other processors (the `arm` extra)")
    pytest.importorskip("unicorn", reason="needs the unicorn emulator (the `arm` extra)")
    from arm_emulator import run

    sources = [path for path in build.SOURCES.glob("*.cc") if path.name != "ffi.cc"]
    sources.append(Path(__file__).parent / "cpu_kernels_fuzz.cc")
    flags = ["-target", "aarch64-linux-musl", "-static", "-O1", "-std=c++17", f"-I{build.SOURCES}"]
    program = tmp_path / "fuzz"
    command = [sys.executable, "-m", "ziglang", "c++", *flags, *map(str, sources), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for seed in range(3):
        finished = run(program, "0.5", str(seed), "1")
        assert finished.status == 0, finished.output
        assert finished.output.startswith("neondot, neon: "), finished.output
