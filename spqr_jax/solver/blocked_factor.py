"""The factor of a large Hessian through host memory: a few panels of columns at a time are on the device.

Letters: A = L Lᵀ [n, n], A in reversed order; X = L⁻¹. `hessian.py` tells what they are for. A plain
factorization holds about six matrices at once. Here the device holds four panels, and host memory two matrices.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spqr_jax.layout import round_up
from spqr_jax.product_jit import product_jit

PANEL = 2048  # columns of a panel
_PLAIN_MATRICES = 6  # that the plain factorization holds at once, temporaries included


def fits_plainly(width: int, device: Any) -> bool:
    """Whether a device's free memory holds the plain factorization of [width, width]; yes where it does not tell."""
    try:
        stats = device.memory_stats() or {}
    except jax.errors.JaxRuntimeError:
        return True
    if "bytes_limit" not in stats:
        return True
    free = stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    return bool(_PLAIN_MATRICES * 4 * width**2 <= free)


def inverse_of_cholesky(a: np.ndarray, panel: int = PANEL) -> np.ndarray:
    """L⁻¹ of a symmetric matrix A = L Lᵀ.

    Args:
      a: float32 [n, n], in host memory. It is overwritten.
      panel: columns that are worked on together.

    Returns:
      float32 [n, n], lower triangular. NaN where A is not positive definite.
    """
    width = len(a)
    padded = round_up(width, panel)
    if padded > width:  # inputs of their own, unrelated to the others
        a = np.pad(a, ((0, padded - width), (0, padded - width)))
        np.fill_diagonal(a[width:, width:], 1)
    firsts = range(0, padded, panel)
    for first in firsts:
        columns = jax.device_put(a[:, first : first + panel])
        for before in range(0, first, panel):
            columns = _less(columns, jax.device_put(a[:, before : before + panel]), np.int32(first))
        a[:, first : first + panel] = _factored(columns, np.int32(first))
    inverse = np.zeros_like(a)
    for first in firsts:
        columns = _unit_columns(padded, panel, np.int32(first))
        for below in range(first, padded, panel):
            columns = _eliminated(columns, jax.device_put(a[:, below : below + panel]), np.int32(below))
        inverse[:, first : first + panel] = columns
    return inverse[:width, :width]


_matmul = partial(jnp.matmul, precision=lax.Precision.HIGHEST)


@product_jit(donate_argnums=0)
def _less(columns: jax.Array, before: jax.Array, first: np.int32) -> jax.Array:
    """Columns of A [n, panel] from `first` on, less what the finished panel `before` of L takes from them."""
    return columns - _matmul(before, lax.dynamic_slice_in_dim(before, first, columns.shape[1]).T)


@product_jit(donate_argnums=0)
def _factored(columns: jax.Array, first: np.int32) -> jax.Array:
    """Columns of L from those of A that all panels before are taken from."""
    rows, panel = columns.shape
    lower = jnp.linalg.cholesky(lax.dynamic_slice_in_dim(columns, first, panel))
    below = jax.scipy.linalg.solve_triangular(lower, columns.T, lower=True).T
    below = jnp.where(jnp.arange(rows)[:, None] >= first + panel, below, 0.0)
    return lax.dynamic_update_slice_in_dim(below, lower, first, axis=0)


@partial(jax.jit, static_argnums=(0, 1))
def _unit_columns(rows: int, panel: int, first: np.int32) -> jax.Array:
    """Columns of the identity from `first` on, [rows, panel]."""
    return (jnp.arange(rows)[:, None] == first + jnp.arange(panel)).astype(jnp.float32)


@product_jit(donate_argnums=0)
def _eliminated(columns: jax.Array, panel: jax.Array, first: np.int32) -> jax.Array:
    """One step of L X = I for some columns: rows of `panel`, columns of L from `first` on, are solved for."""
    size = panel.shape[1]
    solved = jax.scipy.linalg.solve_triangular(
        lax.dynamic_slice_in_dim(panel, first, size), lax.dynamic_slice_in_dim(columns, first, size), lower=True
    )
    below = jnp.where(jnp.arange(len(panel))[:, None] >= first + size, panel, 0.0)
    return lax.dynamic_update_slice_in_dim(columns - _matmul(below, solved), solved, first, axis=0)
