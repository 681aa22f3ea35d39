"""Products with packed matrices, and what JAX's transformations make of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap

from cpu_kernels.library import chosen_kernels, loaded
from cpu_kernels.packed import Packed


def _format(w: Packed) -> dict[str, np.int64]:
    return {"bits": np.int64(w.bits), "group": np.int64(w.group), "kind": np.int64(w.kind)}


def _one_by_one(call: Callable[..., jax.Array], axis_size: int, in_batched: Any, arguments: Any) -> jax.Array:
    """vmap of a call where the matrix itself is batched: matrix after matrix."""
    batched = jax.tree.map(
        lambda leaf, is_batched: leaf if is_batched else jnp.broadcast_to(leaf, (axis_size, *leaf.shape)),
        tuple(arguments),
        tuple(in_batched),
    )
    return jax.lax.map(lambda each: call(*each), batched)


@lru_cache
def _product(kernels: str, rounded: bool, threads: int) -> Callable[[jax.Array, Packed], jax.Array]:
    """x f32 [rows, in], w -> f32 [rows, out], with rules for vmap and for gradients by x."""

    @custom_vmap
    def call(x: jax.Array, w: Packed) -> jax.Array:
        result = jax.ShapeDtypeStruct((x.shape[0], w.shape[0]), jnp.float32)
        return jax.ffi.ffi_call("spqr_matmul", result)(
            x, *w.leaves(), **_format(w), kernels=kernels, rounded=rounded, threads=np.int64(threads)
        )

    @call.def_vmap
    def _(axis_size: int, in_batched: Any, x: jax.Array, w: Packed) -> tuple[jax.Array, bool]:
        if any(jax.tree.leaves(in_batched[1])):
            return _one_by_one(call, axis_size, in_batched, (x, w)), True
        y = call(x.reshape(-1, x.shape[-1]), w)  # more rows of one product
        return y.reshape(axis_size, -1, y.shape[-1]), True

    @jax.custom_vjp
    def product(x: jax.Array, w: Packed) -> jax.Array:
        return call(x, w)

    def forward(x: jax.Array, w: Packed) -> tuple[jax.Array, Packed]:
        return call(x, w), w

    def backward(w: Packed, gradient: jax.Array) -> tuple[jax.Array, None]:
        return jnp.dot(gradient, to_dense(w), precision=jax.lax.Precision.HIGHEST), None

    product.defvjp(forward, backward)
    return product


def matmul(x: jax.Array, w: Packed, *, kernels: str | None = None, threads: int = 0) -> jax.Array:
    """y = x · Wᵀ.

    Works under `jit`, `vmap`, `shard_map` and `grad` (by x; W counts as constant).

    Args:
      x: activations [..., in] of any float type; the product is made in float32.
      w: the packed matrix. With `int8_activations` x is rounded to 8 bits, one scale
        for 32 of a row, and multiplied in integers: up to 16 rows of x, and where
        these kernels can; otherwise nothing is rounded.
      kernels: their name, such as ``avx2``; by default the environment's choice or the
        best that the processor has.
      threads: at most so many; 0 for all of XLA's.

    Returns:
      [..., out] in the type of x.

    Raises:
      ValueError: shapes that do not fit.
      LibraryError: no library, or no such kernels.
    """
    if x.ndim < 1 or x.shape[-1] != w.shape[1]:
        raise ValueError(f"matmul: activations {x.shape} do not fit a matrix of shape {w.shape} [out, in]")
    name = chosen_kernels(kernels)
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    y = _product(name, w.int8_activations, threads)(rows, w)
    return y.astype(x.dtype).reshape(*x.shape[:-1], w.shape[0])


def take_rows(w: Packed, index: jax.Array) -> jax.Array:
    """Rows of the matrix, dequantized: int [...] -> float32 [..., in].

    Indices outside 0..out-1 are clipped. Also defined under `vmap` of `index`.

    Raises:
      LibraryError: no library.
    """
    loaded()
    flat = jnp.asarray(index).astype(jnp.int32).reshape(-1)
    return _rows(flat, w).reshape(*jnp.shape(index), w.shape[1])


@custom_vmap
def _rows(index: jax.Array, w: Packed) -> jax.Array:
    result = jax.ShapeDtypeStruct((index.shape[0], w.shape[1]), jnp.float32)
    return jax.ffi.ffi_call("spqr_take_rows", result)(index, *w.leaves(), **_format(w), rows=np.int64(w.shape[0]))


@_rows.def_vmap
def _rows_vmap(axis_size: int, in_batched: Any, index: jax.Array, w: Packed) -> tuple[jax.Array, bool]:
    if any(jax.tree.leaves(in_batched[1])):
        return _one_by_one(_rows, axis_size, in_batched, (index, w)), True
    rows = _rows(index.reshape(-1), w)
    return rows.reshape(axis_size, -1, rows.shape[-1]), True


def to_dense(w: Packed) -> jax.Array:
    """The whole matrix, float32 [out, in]."""
    return take_rows(w, jnp.arange(w.shape[0], dtype=jnp.int32))
