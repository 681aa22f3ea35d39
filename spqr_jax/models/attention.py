"""Rotary embedding and grouped-query attention, with and without a KV cache."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import cpu_kernels
from pallas_kernels import attention as gpu_attention
from spqr_jax.models.config import DecoderConfig
from spqr_jax.models.prompt_attention import MASKED, attend_self, capped
from spqr_jax.products import why_no_kernels

_NO_WINDOW = 1 << 30  # more keys than any context has


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of one block, or of a stack of blocks.

    Attributes:
      keys, values: [batch, kv_heads, length, head_dim] each, as a step reads them; a stack has the layers in front.
      layer: int32 scalar, which layer of a stack is meant; None of a block alone.
    """

    keys: jax.Array
    values: jax.Array
    layer: jax.Array | None = None

    @property
    def stacked(self) -> tuple[jax.Array, jax.Array]:
        """Keys and values [layers, batch, kv_heads, length, head_dim], one layer of a block alone."""
        return (self.keys[None], self.values[None]) if self.layer is None else (self.keys, self.values)

    def of_layer(self) -> tuple[jax.Array, jax.Array]:
        """Keys and values of the block that is meant, [batch, kv_heads, length, head_dim]."""
        if self.layer is None:
            return self.keys, self.values
        return tuple(lax.dynamic_index_in_dim(a, self.layer, keepdims=False) for a in (self.keys, self.values))

    def extended(self, k: jax.Array, v: jax.Array, start: jax.Array) -> KVCache:
        """With keys and values [batch, kv_heads, tokens, head_dim] from position `start` on."""

        def put(cache: jax.Array, new: jax.Array) -> jax.Array:
            new = new.astype(cache.dtype)
            if self.layer is None:
                return lax.dynamic_update_slice_in_dim(cache, new, start, axis=2)
            zero = jnp.int32(0)
            return lax.dynamic_update_slice(cache, new[None], (self.layer, zero, zero, start, zero))

        return KVCache(put(self.keys, k), put(self.values, v), self.layer)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefix:
    """What was read before some texts, which several may share.

    Attributes:
      cache: of the block at hand, [prefixes, ...], full to its last position.
      which: int32 [batch], the prefix of each text.
    """

    cache: KVCache
    which: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Positions:
    """Where the tokens of a call stand.

    Attributes:
      index: int32 [batch, tokens], position of each token in its text; padding stands at 0.
      padding: int32 [batch], left-padding tokens of each sequence.
      start: int32 scalar, index of the first token in the cache.
      rotary: cosines and sines of the rotary angles, or None.
      local_rotary: the same for local blocks.
      local: bool scalar, whether the block at hand is local, where its kind does not say so.
    """

    index: jax.Array
    padding: jax.Array
    start: jax.Array
    rotary: Rotary | None
    local_rotary: Rotary | None
    local: jax.Array | None = None


Rotary = tuple[jax.Array, jax.Array]
"""Cosines and sines, f32 [batch, tokens, rotated dimensions / 2] each."""


@partial(jax.jit, static_argnums=(0, 1))
def positions(config: DecoderConfig, tokens: int, padding: jax.Array, start: jax.Array) -> Positions:
    """Where `tokens` tokens from index `start` on stand; padding does not count."""
    index = jnp.maximum(start + jnp.arange(tokens) - padding[:, None], 0)
    rotary = local = None
    if config.rope_theta is not None:
        rotary = local = _rotary(config, config.rope_theta, config.rope_factors, config.rope_scale, index)
    if config.local_rope_theta is not None:
        local = _rotary(config, config.local_rope_theta, None, 1.0, index)
    return Positions(index, padding, start, rotary, local)


def _rotary(
    config: DecoderConfig, theta: float, factors: tuple[float, ...] | None, scale: float, index: jax.Array
) -> Rotary:
    half = config.rotated // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if factors is not None:
        frequency = frequency / jnp.array(factors, jnp.float32)
    angle = index.astype(jnp.float32)[..., None] * frequency
    return scale * jnp.cos(angle), scale * jnp.sin(angle)


def rotate(x: jax.Array, rotary: Rotary | None) -> jax.Array:
    """Rotary embedding of [batch, tokens, heads, head_dim], halves paired as Hugging Face pairs them.

    Where cosines and sines are fewer than half a head's dimensions, those behind stay as they are.
    """
    if rotary is None:
        return x
    cos, sin = (each[:, :, None] for each in rotary)
    half = cos.shape[-1]
    a, b, rest = jnp.split(x.astype(jnp.float32), (half, 2 * half), axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class AttentionRules:
    """What attention of one kind of block does besides the formula.

    Attributes:
      local: it reads the local blocks' rotary angles; None where `Positions.local` says so.
      window: keys that a query of a local block sees, its own included; None for all before it.
      softcap: s in s · tanh(scores / s), or None.
      scale: factor on scores; None for head_dim^-1/2.
    """

    local: bool | None = False
    window: int | None = None
    softcap: float | None = None
    scale: float | None = None

    @classmethod
    def of(cls, config: DecoderConfig, local: bool | None) -> AttentionRules:
        """Those of a model's local blocks, or of the others; of both for None."""
        window = None if local is False else config.sliding_window
        return cls(local, window, config.attention_softcap, config.query_scale)

    def rotary(self, where: Positions) -> Rotary | None:
        """Cosines and sines for the block at hand."""
        if self.local is not None:
            return where.local_rotary if self.local else where.rotary
        local = where.local
        assert local is not None
        if where.rotary is None or where.local_rotary is where.rotary:
            return where.rotary
        chosen: Rotary = jax.tree.map(lambda a, b: jnp.where(local, a, b), where.local_rotary, where.rotary)
        return chosen

    def keys_seen(self, where: Positions) -> int | jax.Array | None:
        """Keys that a query sees at most, its own included: a number, or an int32 scalar; None for no limit."""
        if self.local is not None or self.window is None:
            return self.window
        assert where.local is not None
        return jnp.where(where.local, jnp.int32(self.window), jnp.int32(_NO_WINDOW))


def attend(
    rules: AttentionRules,
    q: jax.Array,  # [batch, tokens, heads, head_dim]
    k: jax.Array,  # [batch, tokens, kv_heads, head_dim]
    v: jax.Array,
    where: Positions,
    cache: KVCache | Prefix | None,
) -> tuple[jax.Array, KVCache | Prefix | None]:
    """Rotary embedding of queries and keys, then causal attention, softmax in float32.

    More than one token at a time is a prefill and starts an empty cache; one reads what is cached.
    Any number go on from a `Prefix`, whose length is `where.start`.

    Returns:
      [batch, tokens, heads * head_dim] and the cache with the new keys and values; a `Prefix` as it was.
    """
    if rules.scale is not None:  # beside the head_dim^-1/2 that comes later
        q = q * jnp.asarray(rules.scale * q.shape[-1] ** 0.5, q.dtype)
    rotary = rules.rotary(where)
    if isinstance(cache, KVCache) and q.shape[1] == 1:
        out, cache = _attend_cache(rules, q, k, v, rotary, where, cache)
        return _merge_heads(out[..., None, :]), cache
    q, k, v = _split_heads(rotate(q, rotary), rotate(k, rotary), v)
    if isinstance(cache, Prefix):
        k, v = (
            jnp.concatenate([before[cache.which].astype(now.dtype), now], axis=2)
            for before, now in ((cache.cache.keys, k), (cache.cache.values, v))
        )
    out = _merge_heads(attend_self(rules.softcap, rules.keys_seen(where), q, k, v, where.padding))
    return out, cache.extended(k, v, where.start) if isinstance(cache, KVCache) else cache


def _attend_cache(
    rules: AttentionRules,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rotary: Rotary | None,
    where: Positions,
    cache: KVCache,
) -> tuple[jax.Array, KVCache]:
    """One token against what is cached and itself: [batch, kv_heads, share, head_dim], and the cache with it."""
    first = where.padding  # the first key that is seen
    if (window := rules.keys_seen(where)) is not None:
        first = jnp.maximum(first, where.start - window + 1)
    given = (q, k, v, rotary, first, where.start, cache)
    form = _gpu_form(q, k, rotary)
    length, cache_dtype = cache.keys.shape[-2], cache.keys.dtype
    if not gpu_attention.why_unsupported(**form, length=length, dtype=q.dtype, cache_dtype=cache_dtype):
        return _attend_cache_on_gpu(rules.softcap, *given)
    native = cache.layer is None and cpu_kernels.can_attend(q, cache.keys) and rules.softcap is None
    if not native or (rotary is not None and 2 * rotary[0].shape[-1] < q.shape[-1]) or why_no_kernels("cpu"):
        return _attend_cache_by_xla(rules.softcap, *given)
    by_xla = partial(_attend_cache_by_xla, rules.softcap)
    return lax.platform_dependent(*given, cpu=_attend_cache_natively, default=by_xla)


@jax.custom_jvp
def _attend_cache_natively(
    q: jax.Array, k: jax.Array, v: jax.Array, rotary: Rotary | None, first: jax.Array, start: jax.Array, cache: KVCache
) -> tuple[jax.Array, KVCache]:
    batch, _, kv_heads, head_dim = k.shape
    q, k, v = q.reshape(batch, kv_heads, -1, head_dim), k[:, 0], v[:, 0]
    half = (batch, head_dim // 2)
    cos, sin = (jnp.ones(half), jnp.zeros(half)) if rotary is None else (each[:, 0] for each in rotary)
    out, keys, values = cpu_kernels.attend(q, k, v, cos, sin, cache.keys, cache.values, first, start)
    return out, KVCache(keys, values)


def _gpu_form(q: jax.Array, k: jax.Array, rotary: Rotary | None) -> dict[str, Any]:
    """Sizes that the GPU kernel is compiled for."""
    rotated = 0 if rotary is None else 2 * rotary[0].shape[-1]
    return {"heads": q.shape[2], "kv_heads": k.shape[2], "head_dim": q.shape[3], "rotated": rotated}


def _attend_cache_on_gpu(
    softcap: float | None,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rotary: Rotary | None,
    first: jax.Array,
    start: jax.Array,
    cache: KVCache,
) -> tuple[jax.Array, KVCache]:
    batch, head_dim = q.shape[0], q.shape[3]
    # Slices of one product that are put together again: XLA gives the kernel the product itself.
    qkv = jnp.concatenate([part.reshape(batch, -1) for part in (q, k, v)], axis=-1)
    cos, sin = (None, None) if rotary is None else (angles[:, 0] for angles in rotary)
    layer = jnp.int32(0) if cache.layer is None else cache.layer
    out, keys, values = gpu_attention.attend(
        qkv,
        cos,
        sin,
        *cache.stacked,
        layer,
        first,
        start,
        **_gpu_form(q, k, rotary),
        scale=head_dim**-0.5,
        softcap=softcap,
    )
    if cache.layer is None:
        keys, values = keys[0], values[0]
    return out.reshape(batch, k.shape[2], -1, head_dim), KVCache(keys, values, cache.layer)


def _attend_cache_by_xla(
    softcap: float | None,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rotary: Rotary | None,
    first: jax.Array,
    start: jax.Array,
    cache: KVCache,
) -> tuple[jax.Array, KVCache]:
    q, k, v = _split_heads(rotate(q, rotary), rotate(k, rotary), v)
    q = q[..., 0, :]
    keys, values = cache.of_layer()
    scores = capped(jnp.einsum("bhsd,bhld->bhsl", q, keys, preferred_element_type=jnp.float32), softcap)
    key = jnp.arange(keys.shape[2])
    seen = (key < start) & (key >= first[:, None])  # [batch, length]
    scores = jnp.where(seen[:, None, None], scores, MASKED)
    own = capped(jnp.sum(q.astype(jnp.float32) * k.astype(jnp.float32), axis=-1, keepdims=True), softcap)
    top = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), own)
    weights, own = jnp.exp(scores - top), jnp.exp(own - top)
    total = jnp.sum(weights, axis=-1, keepdims=True) + own
    out = jnp.einsum("bhsl,bhld->bhsd", weights.astype(v.dtype), values, preferred_element_type=jnp.float32)
    out = ((out + own * v.astype(jnp.float32)) / total).astype(v.dtype)
    # Nothing, but it depends on `out`: only after the old cache was read can the new one be written in its place.
    # Without it XLA copies the cache of every block in every step.
    nothing = 0.0 * out[..., :1].reshape(*k.shape[:2], -1)[..., :1, None]
    return out, cache.extended(k + nothing.astype(k.dtype), v + nothing.astype(v.dtype), start)


_attend_cache_natively.defjvp(partial(jax.jvp, partial(_attend_cache_by_xla, None)))


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
