"""Readers that fail in known ways, to see that each way is found. They run by name only."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from spqr_jax.errors import ModelError


def _fine(folder: Path) -> None:
    raise ModelError("refused, as it should be")


def _key_error(folder: Path) -> Any:
    return {}["absent"]


def _busy(folder: Path) -> None:
    while True:
        pass


def _asleep(folder: Path) -> None:
    """As a hang within a library: no Python code runs, no time of the processor passes."""
    time.sleep(3600)


def _hungry(folder: Path) -> None:
    bytearray(4 << 30)


def _hidden(folder: Path) -> None:
    """Memory that ran out is no reason to blame the file."""
    try:
        bytearray(4 << 30)
    except Exception as error:
        raise ModelError(f"{folder} is damaged: {type(error).__name__}") from None


def _dead(folder: Path) -> None:
    os.abort()


def _base_exception(folder: Path) -> None:
    """As a panic in Rust arrives in Python."""
    raise type("PanicException", (BaseException,), {})("panicked")


def _nameless(folder: Path) -> None:
    raise ModelError("something is wrong")


def _endless(folder: Path) -> None:
    error = ModelError()
    error.args = (f"{folder} is wrong: " + "very " * 1000,)  # our errors shorten what they are given
    raise error


READS = {
    "fine": _fine,
    "key-error": _key_error,
    "busy": _busy,
    "asleep": _asleep,
    "hungry": _hungry,
    "hidden": _hidden,
    "dead": _dead,
    "panic": _base_exception,
    "nameless": _nameless,
    "endless": _endless,
}
