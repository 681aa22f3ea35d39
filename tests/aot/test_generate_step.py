"""A whole decoding step compiles for accelerators, takes the right kernel, and copies no packed weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("generate_step.py")


def figures(*arguments: str) -> Any:
    done = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_layers_in_a_loop():
    """Twelve launches a layer, four of them products; and nothing grows with the number of layers."""
    few, many, mixed = results = figures("loop", "h100", "2", "32")
    for result in results:
        assert result["implementation"] == "mosaic_gpu"
        assert result["launches"] <= 12
        assert result["kernels"] == 5  # four products and attention
        assert result["temporary_bytes"] < 0.1 * result["layer_bytes"]  # no layer's weights are copied
    # What is compiled is the same program but for the number of turns, so compiling takes as long.
    assert many["instructions"] == few["instructions"]
    assert many["temporary_bytes"] == few["temporary_bytes"]
    assert mixed["launches"] == many["launches"]


@pytest.mark.parametrize(
    ("kernel", "target", "call"), [("triton", "h100", "__gpu$xla.gpu.triton"), ("tpu", "v5e", "tpu_custom_call")]
)
def test_unrolled_layers(kernel, target, call):
    result = figures(kernel, target)
    assert call in result["calls"]
    assert result["kernels"] >= 15  # seven matrices in two blocks, and the head
    # What the step keeps on the side is vectors; on a TPU also parts of the cache of keys and values, and what is
    # fetched ahead into the core's memory.
    assert result["copies_of_packed"] == []
    assert result["temporary_bytes"] < (0.4 if target == "v5e" else 0.1) * result["packed_bytes"]
