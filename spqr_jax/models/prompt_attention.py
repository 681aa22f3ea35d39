"""Attention over a prompt: many queries, each against the keys before it, softmax in float32."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

_QUERY_CHUNK = 128  # queries whose scores are held at once; later keys are skipped, not masked
_LOOPED_CHUNK = 512  # the same on an accelerator
MASKED = -1e30
"""A finite minimum of scores: a row with no key at all gives a mean, not NaN."""


def capped(scores: jax.Array, softcap: float | None) -> jax.Array:
    """s · tanh(scores / s), or the scores where there is no cap."""
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def attend_self(
    softcap: float | None,
    window: int | jax.Array | None,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    padding: jax.Array,
) -> jax.Array:
    """Self-attention of whole sequences, or of what ends them, heads split."""
    batch, kv_heads = k.shape[:2]
    each = jax.tree.map(lambda a: a.reshape(batch * kv_heads, *a.shape[2:]), (q, k, v))
    each = (*each, jnp.repeat(padding, kv_heads))
    # A gradient works the scores out again: they are too many to keep.
    heads = jax.checkpoint(partial(attend_queries, softcap, window))
    looped = partial(attend_in_loop, softcap, window)
    # A head's scores fit a CPU's cache, all of them do not. An accelerator takes all heads at once; there, a loop over
    # long texts compiles in a fraction of the time.
    at_once = jax.vmap(jax.checkpoint(looped) if q.shape[3] > _LOOPED_CHUNK else heads)
    one_by_one = partial(lax.map, lambda one: heads(*one))
    out = lax.platform_dependent(*each, cpu=lambda *each: one_by_one(each), default=at_once)
    return out.reshape(q.shape)


def attend_queries(
    softcap: float | None,
    window: int | jax.Array | None,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    padding: jax.Array,
) -> jax.Array:
    """One sequence's last queries [share, tokens, head_dim] in chunks, each against the keys that it can see."""
    chunks, before = [], k.shape[0] - q.shape[1]  # keys before the first query
    for begin in range(0, q.shape[1], _QUERY_CHUNK):
        end = min(begin + _QUERY_CHUNK, q.shape[1])
        first = max(0, before + begin - window + 1) if isinstance(window, int) else 0
        last = before + end
        keys, queries = jnp.arange(first, last), jnp.arange(before + begin, last)
        chunk = (q[:, begin:end], k[first:last], v[first:last])
        chunks.append(_attend_head(softcap, window, *chunk, queries, keys, padding))
    return jnp.concatenate(chunks, axis=1)


def attend_in_loop(
    softcap: float | None,
    window: int | jax.Array | None,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    padding: jax.Array,
    chunk: int = _LOOPED_CHUNK,
) -> jax.Array:
    """One sequence's last queries, a chunk in each step of a loop.

    Every step reads the same number of keys and masks those that its queries do not see. This is up to twice
    the arithmetic of chunks that read only the keys they see. But a block of SmolLM2-135M on 2048 tokens compiles for
    an H100 in 3 CPU seconds; with 16 chunks written out it took 146.

    Args:
      softcap: s in s · tanh(scores / s), or None.
      window: keys that a query sees, its own included; None for all before it.
      q: [share, tokens, head_dim].
      k, v: [length, head_dim]; the last `tokens` keys are those of the queries.
      padding: int32 scalar, keys before the sequence's first.
      chunk: queries of a step.

    Returns:
      [share, tokens, head_dim].
    """
    share, tokens, head_dim = q.shape
    length = k.shape[0]
    before = length - tokens
    span = min(length, window - 1 + chunk) if isinstance(window, int) else length
    steps = -(-tokens // chunk)
    chunks = jnp.pad(q, ((0, 0), (0, steps * chunk - tokens), (0, 0))).reshape(share, steps, chunk, head_dim)

    def step(chunk_and_begin: tuple[jax.Array, jax.Array]) -> jax.Array:
        queries, begin = chunk_and_begin
        first = jnp.clip(begin + chunk - span, 0, length - span)
        seen_keys, seen_values = (lax.dynamic_slice_in_dim(a, first, span) for a in (k, v))
        key, query = first + jnp.arange(span), begin + jnp.arange(chunk)
        return _attend_head(softcap, window, queries, seen_keys, seen_values, query, key, padding)

    begins = before + chunk * jnp.arange(steps)
    out = lax.map(jax.checkpoint(step), (chunks.swapaxes(0, 1), begins))
    return out.swapaxes(0, 1).reshape(share, steps * chunk, head_dim)[:, :tokens]


def _attend_head(
    softcap: float | None,
    window: int | jax.Array | None,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query: jax.Array,
    key: jax.Array,
    padding: jax.Array,
) -> jax.Array:
    """Queries [share, tokens, head_dim] against keys and values [length, head_dim], softmax in float32.

    Queries of all heads that share keys stand as rows of one product. `query` and `key` are positions.
    """
    share, tokens, head_dim = q.shape
    length = k.shape[0]
    scores = lax.dot_general(
        q.reshape(share * tokens, head_dim), k, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    seen = (key <= query[:, None]) & (key >= padding)  # [query, key]
    if window is not None:
        seen = seen & (key > query[:, None] - window)
    scores = jnp.where(seen, capped(scores, softcap).reshape(share, tokens, length), MASKED)
    # Dividing after the second product saves a pass over the scores.
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    total = jnp.sum(weights, axis=-1)[..., None]
    weights = weights.astype(v.dtype).reshape(share * tokens, length)
    out = lax.dot_general(weights, v, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    return (out.reshape(share, tokens, head_dim) / total).astype(v.dtype)
