"""The solver's program for a GPU needs few launches a group, and one for the loop over a group's columns."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("solver_panel.py")


def test_launches():
    done = subprocess.run([sys.executable, str(SCRIPT), "h100"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert 10 < result["launches_per_group"] <= 32
    assert 0 < result["launches_outside"] <= 16
    assert len(result["dividing"]) == 1  # all sixteen columns
    assert result["temporary_bytes"] < 16 * 2**20
