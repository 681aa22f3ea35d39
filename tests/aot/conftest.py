"""These tests need compilers for accelerators (tests/aot/requirements.txt) and skip where they are not.

With AOT_REQUIRED in the environment (scripts/test_aot sets it) a missing compiler fails the run instead.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).resolve().parent)]

NEEDED = ("jax_cuda13_plugin", "libtpu")


def missing() -> str:
    """What is not there, in a sentence; empty if all is."""
    from sass import tool

    gone = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    gone += [name for name in ("ptxas", "nvdisasm") if tool(name) is None]
    return f"compiling for accelerators needs {', '.join(gone)}: scripts/test_aot installs them" if gone else ""


def pytest_collection_modifyitems(items):
    if why := missing():
        if os.environ.get("AOT_REQUIRED"):
            raise pytest.UsageError(why)
        for item in items:
            if Path(__file__).parent in Path(item.fspath).parents:
                item.add_marker(pytest.mark.skip(reason=why))
