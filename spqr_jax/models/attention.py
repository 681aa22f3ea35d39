"""Rotary embedding and grouped-query attention, with and without a KV cache."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

import cpu_kernels
from spqr_jax.linear import why_no_kernels
from spqr_jax.models.config import DecoderConfig

_QUERY_CHUNK = 128  # queries whose scores are held at once; later keys are skipped, not masked
_MASKED = -1e30  # a finite minimum: a row with no key at all gives a mean, not NaN


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of one block, [batch, kv_heads, length, head_dim] each: a step reads them as they lie."""

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
    """Rotary embedding of queries and keys, then causal attention, softmax in float32.

    More than one token at a time is a prefill and starts an empty cache; one reads what is cached.

    Returns:
      [batch, tokens, heads * head_dim] and the cache with the new keys and values.
    """
    if cache is not None and q.shape[1] == 1:
        out, cache = _attend_cache(q, k, v, where, cache)
        return _merge_heads(out[..., None, :]), cache
    q, k, v = _split_heads(rotate(q, where), rotate(k, where), v)
    return _attend_self(q, k, v, where.padding), None if cache is None else _extended(cache, k, v, where.start)


def _extended(cache: KVCache, k: jax.Array, v: jax.Array, start: jax.Array) -> KVCache:
    """With keys and values from position `start` on."""
    return KVCache(
        lax.dynamic_update_slice_in_dim(cache.keys, k.astype(cache.keys.dtype), start, axis=2),
        lax.dynamic_update_slice_in_dim(cache.values, v.astype(cache.values.dtype), start, axis=2),
    )


def _attend_cache(
    q: jax.Array, k: jax.Array, v: jax.Array, where: Positions, cache: KVCache
) -> tuple[jax.Array, KVCache]:
    """One token against what is cached and itself: [batch, kv_heads, share, head_dim], and the cache with it."""
    if not cpu_kernels.can_attend(q, cache.keys) or why_no_kernels():
        return _attend_cache_by_xla(q, k, v, where, cache)
    return lax.platform_dependent(q, k, v, where, cache, cpu=_attend_cache_natively, default=_attend_cache_by_xla)


@jax.custom_jvp
def _attend_cache_natively(
    q: jax.Array, k: jax.Array, v: jax.Array, where: Positions, cache: KVCache
) -> tuple[jax.Array, KVCache]:
    batch, _, kv_heads, head_dim = k.shape
    q, k, v = q.reshape(batch, kv_heads, -1, head_dim), k[:, 0], v[:, 0]
    out, keys, values = cpu_kernels.attend(
        q, k, v, where.cos[:, 0], where.sin[:, 0], cache.keys, cache.values, where.padding, where.start
    )
    return out, KVCache(keys, values)


def _attend_cache_by_xla(
    q: jax.Array, k: jax.Array, v: jax.Array, where: Positions, cache: KVCache
) -> tuple[jax.Array, KVCache]:
    q, k, v = _split_heads(rotate(q, where), rotate(k, where), v)
    q = q[..., 0, :]
    scores = jnp.einsum("bhsd,bhld->bhsl", q, cache.keys, preferred_element_type=jnp.float32)
    key = jnp.arange(cache.keys.shape[2])
    seen = (key < where.start) & (key >= where.padding[:, None])  # [batch, length]
    scores = jnp.where(seen[:, None, None], scores, _MASKED)
    own = jnp.sum(q.astype(jnp.float32) * k.astype(jnp.float32), axis=-1, keepdims=True)
    top = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), own)
    weights, own = jnp.exp(scores - top), jnp.exp(own - top)
    total = jnp.sum(weights, axis=-1, keepdims=True) + own
    out = jnp.einsum("bhsl,bhld->bhsd", weights.astype(v.dtype), cache.values, preferred_element_type=jnp.float32)
    out = ((out + own * v.astype(jnp.float32)) / total).astype(v.dtype)
    # Nothing, but it depends on `out`: only after the old cache was read can the new one be written in its place.
    # Without it XLA copies the cache of every block in every step.
    nothing = 0.0 * out[..., :1].reshape(*k.shape[:2], -1)[..., :1, None]
    return out, _extended(cache, k + nothing.astype(k.dtype), v + nothing.astype(v.dtype), where.start)


_attend_cache_natively.defjvp(partial(jax.jvp, _attend_cache_by_xla))


def _attend_self(q: jax.Array, k: jax.Array, v: jax.Array, padding: jax.Array) -> jax.Array:
    """Self-attention of whole sequences, heads split."""
    batch, kv_heads = k.shape[:2]
    each = jax.tree.map(lambda a: a.reshape(batch * kv_heads, *a.shape[2:]), (q, k, v))
    each = (*each, jnp.repeat(padding, kv_heads))
    heads = jax.checkpoint(_attend_queries)  # a gradient works the scores out again: they are too many to keep
    # A head's scores fit a CPU's cache, all of them do not; an accelerator wants them all at once.
    one_by_one, at_once = partial(lax.map, lambda one: heads(*one)), jax.vmap(heads)
    out = lax.platform_dependent(*each, cpu=lambda *each: one_by_one(each), default=at_once)
    return _merge_heads(out.reshape(q.shape))


def _split_heads(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, scaled, [batch, kv_heads, share, tokens, head_dim]; keys and values [batch, kv_heads, length, head_dim].

    `share` query heads read one head of keys and values.
    """
    batch, tokens, heads, head_dim = q.shape
    q = (q * head_dim**-0.5).reshape(batch, tokens, k.shape[2], heads // k.shape[2], head_dim)
    return q.transpose(0, 2, 3, 1, 4), k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)


def _merge_heads(out: jax.Array) -> jax.Array:
    """[batch, kv_heads, share, tokens, head_dim] -> [batch, tokens, heads * head_dim]."""
    batch, kv_heads, share, tokens, head_dim = out.shape
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, tokens, kv_heads * share * head_dim)


def _attend_queries(q: jax.Array, k: jax.Array, v: jax.Array, padding: jax.Array) -> jax.Array:
    """One sequence's queries [share, tokens, head_dim] in chunks, each against the keys that it can see."""
    chunks = []
    for first in range(0, q.shape[1], _QUERY_CHUNK):
        last = min(first + _QUERY_CHUNK, q.shape[1])
        chunks.append(_attend_head(q[:, first:last], k[:last], v[:last], jnp.arange(first, last), padding))
    return jnp.concatenate(chunks, axis=1)


def _attend_head(q: jax.Array, k: jax.Array, v: jax.Array, query: jax.Array, padding: jax.Array) -> jax.Array:
    """Queries [share, tokens, head_dim] against keys and values [length, head_dim], softmax in float32.

    Queries of all heads that share keys stand as rows of one product.
    """
    share, tokens, head_dim = q.shape
    length = k.shape[0]
    scores = lax.dot_general(
        q.reshape(share * tokens, head_dim), k, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    key = jnp.arange(length)
    seen = (key <= query[:, None]) & (key >= padding)  # [query, key]
    scores = jnp.where(seen, scores.reshape(share, tokens, length), _MASKED)
    # Dividing after the second product saves a pass over the scores.
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    total = jnp.sum(weights, axis=-1)[..., None]
    weights = weights.astype(v.dtype).reshape(share * tokens, length)
    out = lax.dot_general(weights, v, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    return (out.reshape(share, tokens, head_dim) / total).astype(v.dtype)
