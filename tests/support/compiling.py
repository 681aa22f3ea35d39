"""How tests compile: with little optimization, and each program once on this machine.

Most of a test's time is XLA compiling. Workers, later phases, the command lines that tests run, and later
runs share one folder of compiled programs. JAX names an entry by the program, its options and XLA's flags,
so a stale one is never read.
"""

from __future__ import annotations

import os
from pathlib import Path

import jax

from spqr_jax import compile_cache

FOLDER_VARIABLE = "SPQR_TEST_CACHE"
"""Where compiled programs are kept, if not in the user's cache folder."""
MANY_MAPS = 40_000
"""Memory maps of a process above which compiled programs are let go; Linux grants 65530."""
_MAX_BYTES = 4 * 2**30


def share_compiled_programs() -> None:
    """Points JAX, here and in processes that tests start, to the folder."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        root = Path(os.environ.get(FOLDER_VARIABLE) or _default_root())
        if problem := compile_cache.keep_programs(root, _MAX_BYTES):
            raise RuntimeError(f"{problem}; set {FOLDER_VARIABLE} to a folder that can be written")
        for name in compile_cache.settings(root):
            os.environ[name.upper()] = str(getattr(jax.config, name))


def _default_root() -> Path:
    import platformdirs

    return Path(platformdirs.user_cache_dir("spqr-jax")) / "tests-compiled"


def choose_optimization(quick: bool) -> None:
    """Less optimization for quick tests: half the time of compiling or less.

    Slow tests compile as users do, and so does a run with flags of its own, if empty: ``XLA_FLAGS= scripts/test``.
    """
    if quick:
        flags = "--xla_backend_optimization_level=0"
        if jax.__version_info__ < (0, 11):  # later versions have no other emitters
            flags += " --xla_cpu_use_fusion_emitters=false"
        os.environ.setdefault("XLA_FLAGS", flags)


def memory_maps() -> int:
    """Of this process; 0 where the system does not tell."""
    try:
        with open("/proc/self/maps", "rb") as maps:
            return sum(1 for _ in maps)
    except OSError:
        return 0


share_compiled_programs()
