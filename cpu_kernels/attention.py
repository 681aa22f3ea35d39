"""One token's attention over a cache of keys and values."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from cpu_kernels.library import chosen_kernels
from cpu_kernels.packed import TILE


def can_attend(q: jax.Array, keys: jax.Array) -> bool:
    """Whether :func:`attend` takes these: float32, and a head size that is a multiple of 16."""
    return q.dtype == keys.dtype == jnp.float32 and keys.shape[-1] % TILE == 0


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    padding: jax.Array,
    position: jax.Array,
    *,
    kernels: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rotates one token's query and key, adds key and value to the cache, and attends to all that it holds.

    softmax(q · keysᵀ / √dim) · values over positions padding ≤ i ≤ position. Works under
    `jit` and `vmap`; has no gradient. Under `jit` with the cache donated it is written in place.

    Args:
      q: float32 [batch, kv_heads, share, dim], `share` query heads read one head of keys.
      k: float32 [batch, kv_heads, dim].
      v: the same.
      cos: float32 [batch, dim / 2], of the token's rotary angles; halves of a head are paired.
      sin: the same.
      keys: float32 [batch, kv_heads, length, dim], rotated, of the positions before.
      values: the same.
      padding: int32 [batch], positions at the start that do not count.
      position: int32, of the token; one outside 0..length-1 is clipped.
      kernels: as in `matmul`.

    Returns:
      float32 [batch, kv_heads, share, dim], and keys and values with the token's.

    Raises:
      ValueError: types, shapes, or a head size that is no multiple of 16.
      LibraryError: no library, or no such kernels.
    """
    if q.ndim != 4 or keys.ndim != 4:
        raise ValueError(f"attend: q and keys must have four axes, got {q.shape} and {keys.shape}")
    batch, kv_heads, _, dim = q.shape
    length = keys.shape[2]
    wanted: dict[str, tuple[Any, tuple[int, ...]]] = {
        "k": (k, (batch, kv_heads, dim)),
        "v": (v, (batch, kv_heads, dim)),
        "cos": (cos, (batch, dim // 2)),
        "sin": (sin, (batch, dim // 2)),
        "keys": (keys, (batch, kv_heads, length, dim)),
        "values": (values, (batch, kv_heads, length, dim)),
    }
    for name, (array, shape) in wanted.items():
        if array.shape != shape or array.dtype != jnp.float32:
            raise ValueError(f"attend: {name} must be float32 {shape}, got {array.dtype} {array.shape}")
    if not can_attend(q, keys):
        raise ValueError(
            f"attend: q must be float32 with a last axis that is a multiple of {TILE}, got {q.dtype} {q.shape}"
        )
    if padding.shape != (batch,) or position.shape != ():
        raise ValueError(
            f"attend: padding and position must be integers {(batch,)} and (), got {padding.shape} and {position.shape}"
        )
    results = tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (q.shape, keys.shape, values.shape))
    call = jax.ffi.ffi_call("spqr_attend", results, vmap_method="sequential", input_output_aliases={5: 1, 6: 2})
    out, keys, values = call(
        *(q, k, v, cos, sin, keys, values, padding.astype(jnp.int32), position.astype(jnp.int32)),
        kernels=chosen_kernels(kernels),
    )
    return out, keys, values
