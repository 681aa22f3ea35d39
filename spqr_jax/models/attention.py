"""Rotary embedding and grouped-query attention, with and without a KV cache."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from spqr_jax.models.config import DecoderConfig

_QUERY_CHUNK = 128  # queries whose scores are held at once; later keys are skipped, not masked
_MASKED = -1e30  # a finite minimum: a row with no key at all gives a mean, not NaN


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of one block, [batch, length, kv_heads, head_dim] each."""

    keys: jax.Array
    values: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Positions:
    """Where the tokens of a call stand.

    Attributes:
      cos, sin: f32 [batch, tokens, head_dim/2], rotary angles.
      padding: int32 [batch], left-padding tokens of each sequence.
      start: int32 scalar, index of the first token in the cache.
    """

    cos: jax.Array
    sin: jax.Array
    padding: jax.Array
    start: jax.Array


def positions(config: DecoderConfig, tokens: int, padding: jax.Array, start: jax.Array) -> Positions:
    """Rotary angles for `tokens` tokens from index `start` on; padding does not count."""
    half = config.head_dim // 2
    frequency = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if config.rope_factors is not None:
        frequency = frequency / jnp.array(config.rope_factors, jnp.float32)
    index = start + jnp.arange(tokens) - padding[:, None]
    angle = jnp.maximum(index, 0).astype(jnp.float32)[..., None] * frequency
    return Positions(jnp.cos(angle), jnp.sin(angle), padding, start)


def rotate(x: jax.Array, where: Positions) -> jax.Array:
    """Rotary embedding of [batch, tokens, heads, head_dim], halves paired as Hugging Face pairs them."""
    cos, sin = where.cos[:, :, None], where.sin[:, :, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def attend(
    q: jax.Array,  # [batch, tokens, heads, head_dim]
    k: jax.Array,  # [batch, tokens, kv_heads, head_dim]
    v: jax.Array,
    where: Positions,
    cache: KVCache | None,
) -> tuple[jax.Array, KVCache | None]:
    """Causal attention, softmax in float32.

    More than one token at a time is a prefill and starts an empty cache.

    Returns:
      [batch, tokens, heads * head_dim] and the cache with the new keys and values.
    """
    if cache is not None:
        cache = KVCache(
            lax.dynamic_update_slice_in_dim(cache.keys, k.astype(cache.keys.dtype), where.start, axis=1),
            lax.dynamic_update_slice_in_dim(cache.values, v.astype(cache.values.dtype), where.start, axis=1),
        )
    if cache is None or q.shape[1] > 1:
        return _attend_chunks(q, k, v, where.padding), cache
    query = where.start + jnp.arange(q.shape[1])
    return _attend(q, cache.keys, cache.values, query, where.padding), cache


def _attend_chunks(q: jax.Array, k: jax.Array, v: jax.Array, padding: jax.Array) -> jax.Array:
    """Self-attention in chunks of queries, each against the keys that it can see."""
    chunks = []
    for first in range(0, q.shape[1], _QUERY_CHUNK):
        last = min(first + _QUERY_CHUNK, q.shape[1])
        chunks.append(_attend(q[:, first:last], k[:, :last], v[:, :last], jnp.arange(first, last), padding))
    return jnp.concatenate(chunks, axis=1)


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, query: jax.Array, padding: jax.Array) -> jax.Array:
    """Scores of the heads that share keys and values stand as rows of one product."""
    batch, tokens, heads, head_dim = q.shape
    kv_heads, length = k.shape[2], k.shape[1]
    share = heads // kv_heads
    batched = ((0, 1), (0, 1))
    q = (q * head_dim**-0.5).reshape(batch, tokens, kv_heads, share, head_dim)
    q = q.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, share * tokens, head_dim)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    scores = lax.dot_general(q, k, (((3,), (3,)), batched), preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, kv_heads, share, tokens, length)
    key = jnp.arange(length)
    seen = (key <= query[:, None]) & (key >= padding[:, None, None])  # [batch, query, key]
    scores = jnp.where(seen[:, None, None], scores, _MASKED)
    # Dividing after the second product saves a pass over the scores.
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    total = jnp.sum(weights, axis=-1)[..., None]
    weights = weights.astype(v.dtype).reshape(batch, kv_heads, share * tokens, length)
    out = lax.dot_general(weights, v, (((3,), (2,)), batched), preferred_element_type=jnp.float32)
    out = out.reshape(batch, kv_heads, share, tokens, head_dim) / total
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, tokens, heads * head_dim).astype(v.dtype)
