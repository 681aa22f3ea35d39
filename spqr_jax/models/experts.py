"""MLPs of experts (Mixtral, arXiv 2401.04088; Qwen3-MoE): each token is sent to a few of many small MLPs.

Two ways to the same sums. For calibration and gradients every expert is given all
tokens, those not sent to it as zeros: zeros come out of it again, and add nothing
to a Hessian. For inference an expert multiplies its own tokens only, some at a
time, and none if none was sent to it.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from spqr_jax.models.config import DecoderConfig
from spqr_jax.models.products import Linear, activate, plain_linear, products
from spqr_jax.models.weights import Block, expert_prefixes

_AT_ONCE = 64  # tokens that an expert multiplies at once


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Route:
    """Where tokens are sent.

    Attributes:
      chosen: int32 [batch, tokens, experts_per_token], different experts for each token.
      shares: [batch, tokens, experts_per_token], weights of what they give.
    """

    chosen: jax.Array
    shares: jax.Array


def route(config: DecoderConfig, router: jax.Array, x: jax.Array) -> Route:
    """The likeliest experts of each token: softmax of router · x, in float32."""
    scores = jnp.einsum("...h,eh->...e", x, router.astype(x.dtype), preferred_element_type=jnp.float32)
    shares, chosen = jax.lax.top_k(jax.nn.softmax(scores, axis=-1), config.experts_per_token)
    if config.normalize_experts:
        shares = shares / jnp.sum(shares, axis=-1, keepdims=True)
    return Route(chosen, shares.astype(x.dtype))


def enter(config: DecoderConfig, block: Block, x: jax.Array, linear: Linear) -> tuple[jax.Array, Route]:
    """First half: what each token's experts make of it, [batch, tokens, experts_per_token, expert_size]."""
    sent = route(config, block.router, x)
    inner = jnp.zeros((*sent.chosen.shape, config.expert_size), x.dtype)
    for index, prefix in enumerate(expert_prefixes(config)):
        here = sent.chosen == index
        own = jnp.where(jnp.any(here, axis=-1, keepdims=True), x, jnp.zeros((), x.dtype))
        gate, up = products(linear, block, (prefix + "gate_proj", prefix + "up_proj"), own)
        inner = jnp.where(here[..., None], (activate(config, gate) * up)[..., None, :], inner)
    return inner, sent


def leave(config: DecoderConfig, block: Block, inner: jax.Array, sent: Route, linear: Linear) -> jax.Array:
    """Second half: what the experts give, weighted and summed, [batch, tokens, hidden]."""
    none = jnp.zeros((), inner.dtype)
    total = jnp.zeros((*inner.shape[:2], config.hidden_size), inner.dtype)
    for index, prefix in enumerate(expert_prefixes(config)):
        here = sent.chosen == index
        own = jnp.sum(jnp.where(here[..., None], inner, none), axis=2)  # a token is sent to an expert once at most
        (made,) = products(linear, block, (prefix + "down_proj",), own)
        total = total + jnp.sum(jnp.where(here, sent.shares, none), axis=-1)[..., None] * made
    return total


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def apply(config: DecoderConfig, block: Block, x: jax.Array) -> jax.Array:
    """Both halves for inference: [batch, tokens, hidden] -> the same."""
    tokens = x.reshape(-1, x.shape[-1])
    sent = route(config, block.router, tokens)
    expert = sent.chosen.reshape(-1)
    rows = min(len(tokens), _AT_ONCE)
    order = jnp.argsort(expert, stable=True)  # of (token, choice) pairs, expert by expert
    counts = jnp.sum(expert[:, None] == jnp.arange(config.num_experts), axis=0, dtype=jnp.int32)
    first = jnp.cumsum(counts) - counts
    order, shares = jnp.pad(order, (0, rows)), sent.shares.reshape(-1)
    total = jnp.zeros_like(tokens)
    for index, prefix in enumerate(expert_prefixes(config)):

        def some(step: jax.Array, total: jax.Array, index: int = index, prefix: str = prefix) -> jax.Array:
            pairs = jax.lax.dynamic_slice_in_dim(order, first[index] + step * rows, rows)
            own = step * rows + jnp.arange(rows) < counts[index]
            token = pairs // config.experts_per_token
            gate, up = products(plain_linear, block, (prefix + "gate_proj", prefix + "up_proj"), tokens[token])
            (made,) = products(plain_linear, block, (prefix + "down_proj",), activate(config, gate) * up)
            return total.at[token].add(jnp.where(own, shares[pairs], jnp.zeros((), x.dtype))[:, None] * made)

        total = jax.lax.fori_loop(0, -(-counts[index] // rows), some, total)
    return total.reshape(x.shape)


def _apply_by_zeros(config: DecoderConfig, block: Block, x: jax.Array) -> jax.Array:
    return leave(config, block, *enter(config, block, x, plain_linear), plain_linear)


@apply.defjvp
def _apply_jvp(config: DecoderConfig, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """Loops whose length is not known have no gradient; the other way does."""
    made: tuple[jax.Array, jax.Array] = jax.jvp(partial(_apply_by_zeros, config), primals, tangents)
    return made
