"""The command as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys

QUICK = ["--nsamples", "4", "--seqlen", "32"]


def spqr(*arguments, cwd, stdin=None):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-m", "spqr_jax", *map(str, arguments)],
        cwd=cwd, env=environment, input=stdin, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
