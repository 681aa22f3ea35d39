"""The `spqr` command as a process of its own; ``python -m spqr_jax`` is the same."""

from __future__ import annotations

import os
import signal
import sys

from spqr_jax.cli.app import main
from spqr_jax.cli.main import INTERRUPTED


def program() -> None:
    """Runs the command line. An interrupted one ends without Python's own clean-up.

    By then all that was half-written is gone. What Python would take down next may still be
    in use by native threads that compute what nobody waits for any more: now and then that
    ended with a crash in place of the exit status.
    """
    try:
        main()
    except SystemExit as end:
        if end.code == INTERRUPTED:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(INTERRUPTED)
        raise
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):  # what was asked for is done, or its failure is said
            signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    program()
