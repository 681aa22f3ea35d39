"""Attention at one position by XLA's operations: the reference, and what runs where the kernel does not."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

_MASKED = -1e30  # a finite minimum: no difference of two is a NaN


def attend_by_xla(
    qkv: jax.Array,
    cos: jax.Array | None,
    sin: jax.Array | None,
    keys: jax.Array,
    values: jax.Array,
    layer: jax.Array,
    first: jax.Array,
    start: jax.Array,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    rotated: int,
    scale: float,
    softcap: float | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As :func:`pallas_kernels.attention.attend`, on any device and for any sizes."""
    batch = qkv.shape[0]
    split = jnp.split(qkv.reshape(batch, heads + 2 * kv_heads, head_dim), (heads, heads + kv_heads), axis=1)
    q, k = (_rotate(x.astype(jnp.float32), cos, sin, rotated) for x in split[:2])
    # The products are in the cache's dtype, as far as their operands go: XLA would convert the whole cache otherwise.
    q = (scale * q).reshape(batch, kv_heads, heads // kv_heads, head_dim).astype(keys.dtype)
    k, v = k.astype(keys.dtype), split[2].astype(values.dtype)
    old_keys, old_values = (lax.dynamic_index_in_dim(a, layer, keepdims=False) for a in (keys, values))
    scores = _capped(jnp.einsum("bhsd,bhld->bhsl", q, old_keys, preferred_element_type=jnp.float32), softcap)
    position = jnp.arange(keys.shape[3])
    seen = (position < start) & (position >= first[:, None])  # [batch, length]
    scores = jnp.where(seen[:, None, None], scores, _MASKED)
    score = _capped(
        jnp.sum(q.astype(jnp.float32) * k.astype(jnp.float32)[:, :, None], axis=-1, keepdims=True), softcap
    )  # the token's
    top = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), score)
    weights, weight = jnp.exp(scores - top), jnp.exp(score - top)
    total = jnp.sum(weights, axis=-1, keepdims=True) + weight
    out = jnp.einsum("bhsl,bhld->bhsd", weights.astype(values.dtype), old_values, preferred_element_type=jnp.float32)
    out = ((out + weight * v.astype(jnp.float32)[:, :, None]) / total).astype(qkv.dtype)
    # Zero, but it depends on `out`: only after the old cache was read can the new one be written in its place.
    # Without it XLA copies the cache.
    zero = 0.0 * out[:, :, 0, :1]  # [batch, kv_heads, 1]
    at = (layer, 0, 0, start, 0)
    keys, values = (
        lax.dynamic_update_slice(cache, (new + zero.astype(new.dtype))[None, :, :, None], at)
        for cache, new in ((keys, k), (values, v))
    )
    return out.reshape(batch, heads * head_dim), keys, values


def _rotate(x: jax.Array, cos: jax.Array | None, sin: jax.Array | None, rotated: int) -> jax.Array:
    """Rotary embedding of float32 [batch, heads, head_dim], halves of the first `rotated` dimensions paired."""
    if cos is None or sin is None:
        return x
    cos, sin = cos[:, None], sin[:, None]
    a, b, rest = jnp.split(x, (rotated // 2, rotated), axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


def _capped(scores: jax.Array, softcap: float | None) -> jax.Array:
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def combine(sums: jax.Array, tops: jax.Array, weights: jax.Array) -> jax.Array:
    """The output from that of splits, as one elementwise expression, which XLA makes one fusion of.

    Args:
      sums: float32 [batch, heads, splits, head_dim]; of a split without keys anything.
      tops: float32 [batch, heads, splits], maxima of the scores in units of log2; below -1e29 without keys.
      weights: float32 [batch, heads, splits], sums of 2^(score - maximum).

    Returns:
      float32 [batch, heads, head_dim].
    """
    each = [tops[..., i, None] for i in range(tops.shape[-1])]
    top = each[0]
    for other in each[1:]:
        top = jnp.maximum(top, other)
    out, total = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32)
    for i, of_split in enumerate(each):
        has_keys, factor = of_split > 0.1 * _MASKED, jnp.exp2(of_split - top)
        out = out + jnp.where(has_keys, sums[:, :, i] * factor, 0.0)
        total = total + jnp.where(has_keys, weights[..., i, None] * factor, 0.0)
    return out / total
