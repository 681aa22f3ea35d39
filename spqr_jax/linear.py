"""The functions that know whether a weight is dense or quantized; nothing else does."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from spqr_jax.array import SpQRArray
from spqr_jax.errors import SpQRError


def linear(w: jax.Array | SpQRArray, x: jax.Array) -> jax.Array:
    """y = x · Wᵀ.

    Args:
      w: [out, in], dense or quantized.
      x: activations [..., in].

    Returns:
      [..., out] in the type of `x`.

    Raises:
      SpQRError: the last axis of `x` is not `in`.
    """
    if x.shape[-1] != w.shape[1]:
        raise SpQRError(f"linear: activations {x.shape} do not fit a weight of shape {w.shape} [out, in]")
    if isinstance(w, SpQRArray):
        w = w.to_dense(x.dtype)
    return jax.lax.dot_general(x, w.astype(x.dtype), (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=x.dtype)


def take_rows(w: jax.Array | SpQRArray, index: jax.Array) -> jax.Array:
    """Rows of a matrix, as an embedding is read: [out, in], int [...] -> [..., in].

    Indices outside 0..out-1 are clipped. Rows of a quantized matrix are float32.
    """
    return jnp.take(w.to_dense() if isinstance(w, SpQRArray) else w, index, axis=0, mode="clip")


def prepare(params: Any, dtype: Any = None) -> Any:
    """Brings every quantized weight of a tree into the layout its matmul reads.

    Done once at load, never in a step. The XLA matmul reads dense weights, so
    they are dequantized here.

    Args:
      params: a tree with `SpQRArray` leaves.
      dtype: type of the dequantized weights; None for float32.
    """
    return jax.tree.map(
        lambda leaf: leaf.to_dense(dtype or jnp.float32) if isinstance(leaf, SpQRArray) else leaf,
        params,
        is_leaf=lambda leaf: isinstance(leaf, SpQRArray),
    )
