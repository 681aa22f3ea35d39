"""Names that differ between the versions we support, in one place.

Python 3.11 with JAX 0.10 and Python >= 3.12 with the newest JAX both work.
"""

from __future__ import annotations

import importlib
from types import ModuleType


def orbax_v1() -> ModuleType:
    """Orbax's version-1 API, which moves out of ``experimental`` in newer releases."""
    try:
        return importlib.import_module("orbax.checkpoint.v1")
    except ModuleNotFoundError:
        return importlib.import_module("orbax.checkpoint.experimental.v1")
