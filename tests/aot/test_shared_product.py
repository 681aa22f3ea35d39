"""A product whose inputs two GPUs share takes the kernel on each, and one sum over both."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("shared_product.py")


def test_the_kernel_runs_on_each_device():
    done = subprocess.run([sys.executable, str(SCRIPT), "h100"], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert result == {"calls": ["mosaic_gpu_v2"], "sums": 1}
