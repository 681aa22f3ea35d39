"""MLPs of experts (Mixtral, arXiv 2401.04088; Qwen3-MoE): each token is sent to a few of many small MLPs.

An expert multiplies its own tokens only, a tile at a time (`spqr_jax.models.tiles`). There are
two code paths for the same sums. `enter` and `leave` are stages: calibration and gradients use
them, with any `linear`. `apply` is for inference: gate, up and down of a tile in one step.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from spqr_jax.models.config import DecoderConfig
from spqr_jax.models.products import Linear, activate, plain_linear, products
from spqr_jax.models.tiles import Tiles, gathered, multiply_tiles, scattered, tiles_of
from spqr_jax.models.weights import Block, expert_prefixes

_AT_ONCE = 64  # tokens that an expert multiplies at once in inference


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


@runtime_checkable
class ExpertLinear(Protocol):
    """A `linear` that takes the products of all experts of a stage at once: it records inputs, or adds to outputs."""

    def experts(self, block: Block, names: tuple[tuple[str, ...], ...], x: jax.Array, tiles: Tiles) -> list[jax.Array]:
        """Arguments and results as those of `multiply_tiles`."""
        ...


def route(config: DecoderConfig, router: jax.Array, x: jax.Array) -> Route:
    """The likeliest experts of each token: softmax of router · x, in float32."""
    scores = jnp.einsum("...h,eh->...e", x, router.astype(x.dtype), preferred_element_type=jnp.float32)
    shares, chosen = jax.lax.top_k(jax.nn.softmax(scores, axis=-1), config.experts_per_token)
    if config.normalize_experts:
        shares = shares / jnp.sum(shares, axis=-1, keepdims=True)
    return Route(chosen, shares.astype(x.dtype))


def _multiplied(
    config: DecoderConfig, block: Block, matrices: tuple[str, ...], x: jax.Array, tiles: Tiles, linear: Linear
) -> list[jax.Array]:
    """Products of each expert's `matrices` with its own pairs: [pairs, in], expert by expert -> [pairs, out] each."""
    names = tuple(tuple(prefix + matrix for matrix in matrices) for prefix in expert_prefixes(config))
    if isinstance(linear, ExpertLinear):
        return linear.experts(block, names, x, tiles)
    return multiply_tiles(linear, block, names, x, tiles)


def enter(config: DecoderConfig, block: Block, x: jax.Array, linear: Linear) -> tuple[jax.Array, Route]:
    """First half: what each token's experts make of it, [batch, tokens, experts_per_token, expert_size].

    Args:
      config: of the model.
      block: a sparse block.
      x: [batch, tokens, hidden].
      linear: an `ExpertLinear`, or a pure function. It is called with tiles of an expert's tokens.
    """
    sent = route(config, block.router, x)
    tiles = tiles_of(sent.chosen, config.num_experts)
    pairs = jnp.repeat(x.reshape(-1, x.shape[-1]), config.experts_per_token, axis=0)
    gate, up = _multiplied(config, block, ("gate_proj", "up_proj"), gathered(pairs, tiles), tiles, linear)
    inner = scattered(activate(config, gate) * up, tiles)
    return inner.reshape(*sent.chosen.shape, inner.shape[-1]), sent


def leave(config: DecoderConfig, block: Block, inner: jax.Array, sent: Route, linear: Linear) -> jax.Array:
    """Second half: what the experts give, weighted and summed, [batch, tokens, hidden]."""
    tiles = tiles_of(sent.chosen, config.num_experts)
    pairs = gathered(inner.reshape(-1, inner.shape[-1]), tiles)
    (results,) = _multiplied(config, block, ("down_proj",), pairs, tiles, linear)
    by_choice = scattered(results, tiles).reshape(*sent.chosen.shape, results.shape[-1])
    return jnp.sum(sent.shares[..., None] * by_choice, axis=-2)


def _by_halves(config: DecoderConfig, block: Block, x: jax.Array) -> jax.Array:
    return leave(config, block, *enter(config, block, x, plain_linear), plain_linear)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def apply(config: DecoderConfig, block: Block, x: jax.Array) -> jax.Array:
    """Both halves for inference: [batch, tokens, hidden] -> the same.

    Its gradient is that of the two halves; only the gradients that are asked for are computed.
    """
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


def _apply_forward(config: DecoderConfig, block: Any, x: Any) -> tuple[jax.Array, Any]:
    """Each leaf comes with a flag: whether its gradient is asked for."""
    by_weights = any(leaf.perturbed for leaf in jax.tree.leaves(block))
    block, x = jax.tree.map(lambda leaf: leaf.value, (block, x))
    if by_weights:
        return jax.vjp(partial(_by_halves, config), block, x)
    result, back = jax.vjp(partial(_by_halves, config, block), x)
    return result, (None, back)


def _apply_back(config: DecoderConfig, kept: Any, gradient: Any) -> Any:
    if isinstance(gradient, SymbolicZero):
        gradient = jnp.zeros(gradient.shape, gradient.dtype)
    if isinstance(kept, tuple):
        return (None, *kept[1](gradient))
    return kept(gradient)


apply.defvjp(_apply_forward, _apply_back, symbolic_zeros=True)
