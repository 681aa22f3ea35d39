"""What differs between the versions and systems we support, in one place.

Python 3.11 with JAX 0.10 and Python >= 3.12 with the newest JAX both work.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
from types import ModuleType


def orbax_v1() -> ModuleType:
    """Orbax's version-1 API, which moves out of ``experimental`` in newer releases."""
    try:
        return importlib.import_module("orbax.checkpoint.v1")
    except ModuleNotFoundError:
        return importlib.import_module("orbax.checkpoint.experimental.v1")


def give_back_memory() -> None:
    """Returns what was freed to the system, where the C library keeps it otherwise (glibc's `malloc_trim`)."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # no such function; TypeError: Windows
        ctypes.CDLL(None).malloc_trim(0)
