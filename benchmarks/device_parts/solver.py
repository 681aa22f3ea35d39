"""Seconds of quantizing one matrix of 4096 x 4096."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
from report import Report


def measure(report: Report, small: bool) -> None:
    """The first time compiles; the second is the solver alone."""
    import spqr_jax

    size = 64 if small else 4096
    weight = jax.random.normal(jax.random.key(0), (size, size), jnp.float32) * 0.02
    x = jax.random.normal(jax.random.key(1), (2 * size, size), jnp.float32)
    hessian = (x.T @ x) * (2 / x.shape[0])
    for run in ("with compiling", "again", "again"):
        begun = time.perf_counter()
        array = spqr_jax.quantize_weight(weight, hessian)
        jax.block_until_ready(jax.tree.leaves(array))
        report.line(matrix=f"{size}x{size}", run=run, seconds=time.perf_counter() - begun)
