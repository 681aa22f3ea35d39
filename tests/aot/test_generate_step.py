"""A whole decoding step compiles for accelerators, takes the right kernel, and copies no packed weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("generate_step.py")


@pytest.mark.parametrize(
    ("target", "options", "kernel", "call"),
    [
        ("h100", [], "mosaic_gpu", "mosaic_gpu_v2"),
        ("a100", ["--batch", "4"], "mosaic_gpu", "mosaic_gpu_v2"),
        ("h100", ["--implementation", "triton"], "triton", "__gpu$xla.gpu.triton"),
        ("v5e", [], "tpu", "tpu_custom_call"),
    ],
)
def test_step(target, options, kernel, call):
    done = subprocess.run([sys.executable, str(SCRIPT), target, *options], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert result["implementation"] == kernel
    assert call in result["calls"]
    assert result["kernels"] >= 21  # seven matrices in three blocks
    # What the step keeps on the side is a few vectors: nowhere a layer's packed weights, of which the least matrix is
    # a small part (a scan over stacked layers would copy each layer's).
    assert result["temporary_bytes"] < 0.1 * result["packed_bytes"]
