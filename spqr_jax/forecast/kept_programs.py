"""Which runs have left their compiled programs in the cache folder.

JAX names a program by its contents, which are not known before it is built. So a command that ended well
leaves an empty file beside the programs, named by what its programs depend on; the next such run compiles
next to nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
from pathlib import Path

import jax

from spqr_jax.config import SpQRConfig


def run_key(command: str, *settings: object) -> str:
    """A short name for runs that share programs. Settings count as Python writes them."""
    return hashlib.sha256(repr((command, jax.__version__, settings)).encode()).hexdigest()[:16]


def program_settings(config: SpQRConfig) -> SpQRConfig:
    """A configuration without what programs get as data: code bits, finite thresholds, damping and a target's size."""
    threshold = 1.0 if config.outliers else math.inf
    target = None if config.target_bits is None else 4.0
    return dataclasses.replace(config, bits=3, outlier_threshold=threshold, damping=0.0, target_bits=target)


def are_kept(key: str) -> bool:
    """Whether a run of this key has ended well and its programs were kept."""
    place = _mark(key)
    return place is not None and place.exists()


def note_kept(key: str) -> None:
    """Remembers that a run of this key has ended well; says nothing where that cannot be written."""
    place = _mark(key)
    if place is not None:
        with contextlib.suppress(OSError):
            place.touch()


def _mark(key: str) -> Path | None:
    folder = _folder()
    return None if not folder else Path(folder) / f"spqr-run-{key}"


def _folder() -> str | None:
    return jax.config.values["jax_compilation_cache_dir"] or None
