"""`jax.jit` for programs of a few large products, with the compiler options that they need on a GPU."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, TypeVar

import jax

_Function = TypeVar("_Function", bound=Callable[..., Any])
_LIBRARY = "xla_gpu_enable_triton_gemm"


def product_options(platform: str) -> dict[str, bool] | None:
    """Compiler options of such programs.

    On a GPU, the vendor's library multiplies. XLA's own kernels are no faster for large products, and to choose among
    them XLA compiles dozens for each shape. What the user sets in ``XLA_FLAGS`` stays.
    """
    if platform != "gpu" or _LIBRARY in os.environ.get("XLA_FLAGS", ""):
        return None
    return {_LIBRARY: False}


def product_jit(**options: Any) -> Callable[[_Function], _Function]:
    """A decorator like ``jax.jit(**options)``. What it returns cannot be called while JAX traces another function."""

    def decorate(function: _Function) -> _Function:
        @functools.lru_cache
        def compiled(platform: str) -> Any:
            return jax.jit(function, compiler_options=product_options(platform), **options)

        @functools.wraps(function)
        def call(*arguments: Any, **keywords: Any) -> Any:
            return compiled(jax.default_backend())(*arguments, **keywords)

        return call  # type: ignore[return-value]

    return decorate
