"""The `spqr` command: in the test's own process, which has compiled what it needs, or as a user runs it."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import traceback
from unittest import mock

QUICK = ["--nsamples", "4", "--seqlen", "32"]
_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "COLUMNS": "200"}


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def spqr(*arguments, cwd, stdin=None, columns=200, terminal=False) -> subprocess.CompletedProcess:
    """Runs a command line in this process: its exit status and all that it wrote, as `spqr_process`.

    With `terminal`, a user types `stdin` at a terminal.
    """
    from spqr_jax.cli.app import main

    command = ["spqr", *map(str, arguments)]
    out, errors = io.StringIO(), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with (
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(errors),
        mock.patch.dict(os.environ, _ENVIRONMENT | {"COLUMNS": str(columns)}),
        mock.patch.object(sys, "argv", command),
        mock.patch.object(sys, "stdin", (_Terminal if terminal else io.StringIO)(stdin or "")),
    ):
        try:
            main()
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        except Exception:
            traceback.print_exc()
            status = 1
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return subprocess.CompletedProcess(command, status, out.getvalue(), errors.getvalue())


def spqr_process(*arguments, cwd, stdin=None) -> subprocess.CompletedProcess:
    """Runs a command line as a user does, in a process of its own."""
    command = [sys.executable, "-m", "spqr_jax", *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env=os.environ | _ENVIRONMENT, input=stdin, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
