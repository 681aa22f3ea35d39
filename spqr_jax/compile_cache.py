"""Compiled programs kept between runs: the second run of a command compiles next to nothing.

JAX does the keeping (its persistent compilation cache) and names an entry by the program, its
options, XLA's flags and the version of everything that compiles. What is added here is a place,
a bound on its size, and one folder for each kind of processor: a program compiled for one may hold
instructions that another lacks.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
from pathlib import Path

import jax

CACHE_VARIABLE = "SPQR_CACHE"
"""``off`` keeps nothing; a path is another place than the user's cache folder."""
MAX_BYTES = 2 * 2**30
"""Size that the folder is cut to when a command starts, what was used longest ago first."""


def cache_root() -> Path | None:
    """The folder of compiled programs, whether it is there or not; None for none."""
    choice = os.environ.get(CACHE_VARIABLE, "")
    if choice.lower() == "off":
        return None
    if choice:
        return Path(choice).expanduser()
    import platformdirs  # the platform's own place for caches

    return Path(platformdirs.user_cache_dir("spqr-jax")) / "compiled"


def keep_programs(root: Path | None = None, max_bytes: int = MAX_BYTES) -> str | None:
    """Makes JAX keep what this process compiles, and read what earlier ones compiled.

    A folder that JAX was already given (``JAX_COMPILATION_CACHE_DIR``) stays as it is.

    Args:
      root: the folder; None for `cache_root`.
      max_bytes: size that the folder is cut to now.

    Returns:
      Why nothing can be kept, or None: a slower start is no reason to stop.
    """
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return None
    root = root or cache_root()
    if root is None:
        return None
    folder = root / f"jax-{jax.__version__}-{_processor()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trim(root, max_bytes)
    except OSError as error:
        return (
            f"compiled programs cannot be cached in {folder}: {error.strerror or error}. "
            f"Set {CACHE_VARIABLE} to another directory, or to off"
        )
    for name, value in settings(folder).items():
        jax.config.update(name, value)
    return None


def settings(folder: Path) -> dict[str, str | float | int]:
    """JAX's settings for keeping every program, the smallest too: a command has hundreds of those."""
    return {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }


def trim(root: Path, max_bytes: int) -> None:
    """Removes the entries used longest ago until those under `root` take at most `max_bytes`."""
    entries = []
    for path in root.rglob("*-cache"):
        with contextlib.suppress(OSError):  # another process trims, too
            found = path.stat()
            entries.append((max(found.st_atime, found.st_mtime), found.st_size, path))
    excess = sum(size for _, size, _ in entries) - max_bytes
    for _, size, path in sorted(entries, key=lambda entry: entry[0]):
        if excess <= 0:
            break
        path.unlink(missing_ok=True)
        excess -= size


def _processor() -> str:
    """A short name for the instructions that this machine's processor has."""
    described = platform.machine() + platform.processor()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
        described += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(described.encode()).hexdigest()[:8]
