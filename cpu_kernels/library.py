"""The compiled library: where it is, what it can do here, and telling XLA of it."""

from __future__ import annotations

import ctypes
import os
from functools import lru_cache
from pathlib import Path

import jax

from cpu_kernels.build import ffi_version

FOLDER = Path(__file__).parent
"""Where building leaves the library."""

KERNELS_VARIABLE = "SPQR_CPU_KERNELS"
"""Environment variable that names the kernels to use, or `none`."""

_HANDLERS = {"spqr_matmul": "SpqrMatmul", "spqr_take_rows": "SpqrTakeRows", "spqr_attend": "SpqrAttend"}


class LibraryError(RuntimeError):
    """The library cannot be used, or not in the way that was asked for."""


def _library_file() -> Path | None:
    """The newest library that this jaxlib can load: it accepts older versions of its FFI, not newer ones."""
    installed = ffi_version(jax.ffi.include_dir())
    found = {}
    for path in FOLDER.glob("_spqr_cpu_ffi*_*.so"):
        major, _, minor = path.stem.removeprefix("_spqr_cpu_ffi").partition("_")
        if (version := (int(major), int(minor))) <= installed and version[0] == installed[0]:
            found[version] = path
    return found[max(found)] if found else None


@lru_cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, its handlers registered; or None and why."""
    path = _library_file()
    if path is None:
        return None, (
            "the native CPU kernels are not built: with a C++17 compiler (g++ or clang++) installed, run "
            "`python -m cpu_kernels`"
        )
    try:
        library = ctypes.CDLL(str(path))
        library.spqr_kernel_names.restype = ctypes.c_char_p
        library.spqr_problem.restype = ctypes.c_char_p
        for target, symbol in _HANDLERS.items():
            jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, symbol)), platform="cpu")
    except Exception as error:  # whatever the loader or another version of XLA says
        return None, (
            f"the native CPU kernels cannot be loaded ({error}): were they built for another jaxlib or machine? "
            "Run `python -m cpu_kernels`"
        )
    return library, ""


def loaded() -> ctypes.CDLL:
    """The library.

    Raises:
      LibraryError: it is not there or does not load.
    """
    library, why = _load()
    if library is None:
        raise LibraryError(why)
    return library


def why_unavailable() -> str:
    """Why the kernels are not used, and what to do; empty if they are.

    Raises:
      LibraryError: the environment asks for kernels that are not here.
    """
    if os.environ.get(KERNELS_VARIABLE) == "none":
        return f"{KERNELS_VARIABLE}=none"
    why = _load()[1]
    if not why:
        chosen_kernels()
    return why


def kernel_names() -> tuple[str, ...]:
    """Kernels that this processor can run, best first; none without the library."""
    library, _ = _load()
    return tuple(library.spqr_kernel_names().decode().split(",")) if library is not None else ()


def chosen_kernels(wanted: str | None = None) -> str:
    """Name of the kernels to use: `wanted`, what the environment says, or the best.

    Raises:
      LibraryError: there are none of that name.
    """
    loaded()
    wanted = wanted or os.environ.get(KERNELS_VARIABLE)
    names = kernel_names()
    if not wanted or wanted == "none":
        return names[0]
    if wanted not in names:
        raise LibraryError(
            f"no CPU kernels called {wanted!r} ({KERNELS_VARIABLE}); this machine has {', '.join(names)}"
        )
    return wanted
