"""Dense weights, multiplied by XLA: the backend for every device."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import spqr_matmul
from spqr_jax.array import SpQRArray


class XlaBackend:
    """A weight becomes a dense array when it is prepared."""

    name = "xla"
    stacks = False

    def why_not(self, array: SpQRArray | None, device: spqr_matmul.Target | None) -> str:
        """See `Backend`: always empty."""
        return ""

    def prepare(self, array: SpQRArray, *, dtype: Any = None) -> jax.Array:
        """The dense weight in this type; None for float32."""
        return array.to_dense(jnp.float32 if dtype is None else dtype)


def multiply_dense(x: jax.Array, w: jax.Array) -> jax.Array:
    """y = x Wᵀ with a dense W [out, in], in the type of x."""
    return jax.lax.dot_general(x, w.astype(x.dtype), (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=x.dtype)
