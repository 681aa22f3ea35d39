"""How a command ends: its exit status, and one message where it cannot do what was asked."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from spqr_jax.compile_cache import keep_programs
from spqr_jax.errors import SpQRError
from spqr_jax.terminal import interrupt
from spqr_jax.terminal.display import errors, fail, say

BAD_INPUT, OUR_FAULT, INTERRUPTED, BROKEN_PIPE = 2, 70, 130, 141
"""Exit statuses: as sysexits.h has it, and as shells name what SIGINT and SIGPIPE end."""
TRACEBACK_VARIABLE = "SPQR_TRACEBACK"
"""``1`` shows where an error was raised, for those who mend it."""


def run(command: Callable[[], Any]) -> None:
    """Runs the command line. Bad input, no room and no memory exit with 2 and one message, Ctrl-C with 130."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would advise to install torch
    _write_any_text()
    interrupt.install()
    if problem := keep_programs():
        say(problem)
    with _warnings_as_notes() as notes, _quiet_libraries():
        try:
            command()
        except SystemExit as end:
            if end.code == INTERRUPTED:  # what typer makes of Ctrl-C
                _say_stopped(notes)
            raise
        except BrokenPipeError:
            _leave_pipe()
        except Exception as error:
            if interrupt.received():
                _say_stopped(notes)
                sys.exit(INTERRUPTED)
            sys.exit(_explain(error))


def _say_stopped(notes: set[str]) -> None:
    goes_on = any("--resume" in note for note in notes)
    what = "run the same command with --resume to go on" if goes_on else "no incomplete output is left"
    errors.print(f"stopped; {what}", style="yellow")
    _cancel_timers()


def _explain(error: Exception) -> int:
    """Says what went wrong; the exit status."""
    if os.environ.get(TRACEBACK_VARIABLE, "") not in ("", "0"):
        errors.print("".join(traceback.format_exception(error)), soft_wrap=True)
    if isinstance(error, SpQRError):
        fail(str(error))
    elif _is_out_of_memory(error):
        fail(f"not enough memory: {_first_line(error)}; close other programs, choose smaller values (--seqlen, "
             "--nsamples, --batch-size, --max-new-tokens), or use --dtype bfloat16")  # fmt: skip
    elif isinstance(error, OSError):
        fail(_describe_system_error(error))
    else:
        fail(f"internal error: {type(error).__name__}: {_first_line(error)} at {_place(error)}; this is a bug in "
             f"spqr-jax, please report it{_kept_traceback(error)}")  # fmt: skip
        return OUR_FAULT
    return BAD_INPUT


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or (
        isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
    )


def _describe_system_error(error: OSError) -> str:
    reason = error.strerror or _first_line(error)
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, (str, bytes))]
    return f"{' and '.join(names)}: {reason}" if names else f"system error: {reason}"


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "") or "no message"


def _place(error: Exception) -> str:
    """File and line of the last step in our own code."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame for frame in frames if f"{os.sep}spqr_jax{os.sep}" in frame.filename] or frames
    if not inside:
        return "an unknown place"
    folder = Path(__file__).parents[2]
    path = Path(inside[-1].filename)
    return f"{path.relative_to(folder) if path.is_relative_to(folder) else path}:{inside[-1].lineno}"


def _kept_traceback(error: Exception) -> str:
    """Writes the traceback to a file, and says where."""
    text = "".join(traceback.format_exception(error))
    try:
        descriptor, name = tempfile.mkstemp(prefix="spqr-error-", suffix=".txt")
        with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError:
        return f" ({TRACEBACK_VARIABLE}=1 shows the traceback)"
    return f" with {name}"


def _write_any_text() -> None:
    """Terminals that are not UTF-8 show escapes for what they cannot."""
    for stream in (sys.stdout, sys.stderr):
        if (reconfigure := getattr(stream, "reconfigure", None)) is not None:
            reconfigure(errors="backslashreplace")


def _cancel_timers() -> None:
    """Timers of libraries that were interrupted before they could cancel them: Python would wait minutes for them."""
    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer):
            thread.cancel()


def _leave_pipe() -> None:
    """Ends as programs do whose reader, such as `head`, has read enough: without a word."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what Python flushes as it exits
    sys.exit(BROKEN_PIPE)


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Orbax logs the tracebacks of its threads; what they mean is said in our own message."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _warnings_as_notes() -> Iterator[set[str]]:
    """Warnings of libraries and our own are one line each, each text once; yields the texts so far."""
    noted: set[str] = set()

    def show(message: Warning | str, category: Any, *where: Any, **more: Any) -> None:
        text = " ".join(str(message).split())
        if text not in noted:
            noted.add(text)
            say(f"note: {text}")

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", category)  # for those who write programs
        warnings.showwarning = show
        yield noted
