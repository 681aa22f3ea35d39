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
    assert result["kernels"] >= 15  # seven matrices in two blocks, and the head
    # No layer's packed weights are copied, as a scan over stacked layers would do. What the step keeps on the side is
    # vectors; on a TPU also parts of the cache of keys and values, and what is fetched ahead into the core's memory.
    assert result["copies_of_packed"] == []
    assert result["temporary_bytes"] < (0.4 if target == "v5e" else 0.1) * result["packed_bytes"]
