"""Products with packed matrices, and what JAX's transformations make of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap

from cpu_kernels.library import chosen_kernels, loaded
from cpu_kernels.packed import Packed


def _one_by_one(call: Callable[..., Any], axis_size: int, in_batched: Any, arguments: Any) -> Any:
    """vmap of a call where the matrix itself is batched: matrix after matrix."""
    batched = jax.tree.map(
        lambda leaf, is_batched: leaf if is_batched else jnp.broadcast_to(leaf, (axis_size, *leaf.shape)),
        tuple(arguments),
        tuple(in_batched),
    )
    return jax.lax.map(lambda each: call(*each), batched)


_Products = Callable[[jax.Array, tuple[Packed, ...]], tuple[jax.Array, ...]]


@lru_cache
def _products(kernels: str, rounded: bool, threads: int) -> _Products:
    """x f32 [rows, in], matrices -> f32 [rows, out] each, with rules for vmap and for gradients by x."""

    @custom_vmap
    def call(x: jax.Array, ws: tuple[Packed, ...]) -> tuple[jax.Array, ...]:
        results = tuple(jax.ShapeDtypeStruct((x.shape[0], w.shape[0]), jnp.float32) for w in ws)
        return tuple(
            jax.ffi.ffi_call("spqr_matmul", results)(
                x, *(w.data for w in ws), kernels=kernels, rounded=rounded, threads=np.int64(threads)
            )
        )

    @call.def_vmap
    def _(axis_size: int, in_batched: Any, x: jax.Array, ws: tuple[Packed, ...]) -> tuple[Any, Any]:
        if any(jax.tree.leaves(in_batched[1])):
            return _one_by_one(call, axis_size, in_batched, (x, ws)), (True,) * len(ws)
        ys = call(x.reshape(-1, x.shape[-1]), ws)  # more rows of the same products
        return tuple(y.reshape(axis_size, -1, y.shape[-1]) for y in ys), (True,) * len(ws)

    @jax.custom_vjp
    def products(x: jax.Array, ws: tuple[Packed, ...]) -> tuple[jax.Array, ...]:
        return call(x, ws)

    def forward(x: jax.Array, ws: tuple[Packed, ...]) -> tuple[tuple[jax.Array, ...], tuple[Packed, ...]]:
        return call(x, ws), ws

    def backward(ws: tuple[Packed, ...], gradients: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        parts = [
            jnp.dot(gradient, to_dense(w), precision=jax.lax.Precision.HIGHEST)
            for gradient, w in zip(gradients, ws, strict=True)
        ]
        return sum(parts[1:], start=parts[0]), None

    products.defvjp(forward, backward)
    return products


def matmul_all(x: jax.Array, ws: Sequence[Packed], *, kernels: str | None = None, threads: int = 0) -> list[jax.Array]:
    """The products of one x with several matrices, in one call: as :func:`matmul` of each, only sooner done.

    Args:
      x: activations [..., in] of any float type, as in `matmul`.
      ws: matrices [out, in] with the same `in`; `out` and formats may differ.
      kernels: as in `matmul`.
      threads: as in `matmul`.

    Returns:
      [..., out] for each matrix, in the type of x.

    Raises:
      ValueError: as `matmul`; no matrices; or some that round activations beside some that do not.
    """
    for w in ws:
        if x.ndim < 1 or x.shape[-1] != w.shape[1]:
            raise ValueError(f"matmul: activations {x.shape} do not fit a matrix of shape {w.shape} [out, in]")
    rounding = {w.int8_activations for w in ws}
    if len(rounding) != 1:
        raise ValueError(
            "matmul_all: either all matrices must round activations, or none (and at least one matrix is needed)"
        )
    name = chosen_kernels(kernels)
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    ys = _products(name, rounding.pop(), threads)(rows, tuple(ws))
    return [y.astype(x.dtype).reshape(*x.shape[:-1], w.shape[0]) for y, w in zip(ys, ws, strict=True)]


def matmul(x: jax.Array, w: Packed, *, kernels: str | None = None, threads: int = 0) -> jax.Array:
    """y = x · Wᵀ.

    Works under `jit`, `vmap`, `shard_map` and `grad` (by x; W counts as constant).

    Args:
      x: activations [..., in] of any float type. For few rows (up to 16; exact with AVX2, 2) they are held in
        fixed point, 24 bits with one scale for 32 of a row, and sums of a group are
        exact; for more rows the product is made in float32.
      w: the packed matrix. With `int8_activations`, 8 bits instead of 24.
      kernels: their name, such as ``avx2``; by default the environment's choice or the
        best that the processor has.
      threads: at most so many; 0 for all of XLA's.

    Returns:
      [..., out] in the type of x.

    Raises:
      ValueError: shapes that do not fit.
      LibraryError: no library, or no such kernels.
    """
    return matmul_all(x, [w], kernels=kernels, threads=threads)[0]


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
    return jax.ffi.ffi_call("spqr_take_rows", result)(index, w.data, rows=np.int64(w.shape[0]))


@_rows.def_vmap
def _rows_vmap(axis_size: int, in_batched: Any, index: jax.Array, w: Packed) -> tuple[jax.Array, bool]:
    if any(jax.tree.leaves(in_batched[1])):
        return _one_by_one(_rows, axis_size, in_batched, (index, w)), True
    rows = _rows(index.reshape(-1), w)
    return rows.reshape(axis_size, -1, rows.shape[-1]), True


def to_dense(w: Packed) -> jax.Array:
    """The whole matrix, float32 [out, in]."""
    return take_rows(w, jnp.arange(w.shape[0], dtype=jnp.int32))
