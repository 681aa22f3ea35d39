"""The decoder: parameters as registered dataclasses, the forward pass as pure functions.

A block runs as a sequence of *stages*. A stage reads its matrices' inputs from
the state, applies the matrices through ``linear(name, w, x)`` and returns the
next state. Evaluation, generation and calibration all run these same functions;
calibration passes a `linear` that records what each matrix is given.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from spqr_jax.linear import linear as apply_linear
from spqr_jax.linear import linear_all, take_rows
from spqr_jax.models.attention import KVCache, Positions, attend, positions
from spqr_jax.models.config import DecoderConfig

Weight = Any
"""A jax.Array [out, in], an SpQRArray or a ShapeDtypeStruct."""


class Linear(Protocol):
    """Applies the weight called `name` of the block at hand."""

    def __call__(self, name: str, w: Weight, x: jax.Array) -> jax.Array: ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Block:
    """One decoder block. Matrices are [out, in], norm gains [hidden]."""

    attention_norm: Weight
    q_proj: Weight
    k_proj: Weight
    v_proj: Weight
    o_proj: Weight
    mlp_norm: Weight
    gate_proj: Weight
    up_proj: Weight
    down_proj: Weight


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Outer:
    """What is not in a block: embedding [vocab, hidden], final norm, head (None if tied)."""

    embed_tokens: Weight
    final_norm: Weight
    lm_head: Weight | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoder:
    """A whole model: a pytree with its static configuration."""

    outer: Outer
    layers: tuple[Block, ...]
    config: DecoderConfig = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What flows from stage to stage.

    Attributes:
      residual: [batch, tokens, hidden], the residual stream.
      inner: what the next stage's matrix reads, once the stage before made it.
      cache: of the block at hand, or None.
    """

    residual: jax.Array
    inner: jax.Array | None = None
    cache: KVCache | None = None


Stage = Callable[[DecoderConfig, Block, State, Positions, Linear], State]


def rms_norm(x: jax.Array, gain: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x²) + eps) · gain, in float32."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * gain.astype(jnp.float32)).astype(x.dtype)


def _products(linear: Linear, block: Block, names: Sequence[str], x: jax.Array) -> list[jax.Array]:
    """Products of weights that read one input; inference makes them in one go."""
    if linear is plain_linear:
        return linear_all([getattr(block, name) for name in names], x)
    return [linear(name, getattr(block, name), x) for name in names]


def _attention(config: DecoderConfig, block: Block, state: State, where: Positions, linear: Linear) -> State:
    x = rms_norm(state.residual, block.attention_norm, config.norm_eps)
    batch, tokens, _ = x.shape
    q, k, v = _products(linear, block, ("q_proj", "k_proj", "v_proj"), x)
    q = q.reshape(batch, tokens, config.num_heads, config.head_dim)
    k, v = (each.reshape(batch, tokens, config.num_kv_heads, config.head_dim) for each in (k, v))
    inner, cache = attend(q, k, v, where, state.cache)
    return State(state.residual, inner, cache)


def _attention_output(config: DecoderConfig, block: Block, state: State, where: Positions, linear: Linear) -> State:
    assert state.inner is not None
    return State(state.residual + linear("o_proj", block.o_proj, state.inner), None, state.cache)


def _mlp(config: DecoderConfig, block: Block, state: State, where: Positions, linear: Linear) -> State:
    x = rms_norm(state.residual, block.mlp_norm, config.norm_eps)
    gate, up = _products(linear, block, ("gate_proj", "up_proj"), x)
    return State(state.residual, jax.nn.silu(gate) * up, state.cache)


def _mlp_output(config: DecoderConfig, block: Block, state: State, where: Positions, linear: Linear) -> State:
    assert state.inner is not None
    return State(state.residual + linear("down_proj", block.down_proj, state.inner), None, state.cache)


STAGES: tuple[tuple[Stage, tuple[str, ...]], ...] = (
    (_attention, ("q_proj", "k_proj", "v_proj")),
    (_attention_output, ("o_proj",)),
    (_mlp, ("gate_proj", "up_proj")),
    (_mlp_output, ("down_proj",)),
)
"""A block's stages in order, each with the matrices that it applies."""

WEIGHT_NAMES = tuple(name for _, names in STAGES for name in names)
"""A block's matrices, in the order in which they are quantized."""


def plain_linear(name: str, w: Weight, x: jax.Array) -> jax.Array:
    """The `linear` of inference: names play no part."""
    return apply_linear(w, x)


def embed(outer: Outer, tokens: jax.Array) -> jax.Array:
    """Token embeddings: int32 [batch, tokens] -> [batch, tokens, hidden]."""
    return take_rows(outer.embed_tokens, tokens)


def run_block(
    config: DecoderConfig, block: Block, state: State, where: Positions, linear: Linear = plain_linear
) -> State:
    """One block, all stages."""
    for stage, _ in STAGES:
        state = stage(config, block, state, where, linear)
    return state


@partial(jax.jit, static_argnums=0)
def pass_block(config: DecoderConfig, block: Block, residual: jax.Array, where: Positions) -> jax.Array:
    """The residual stream [batch, tokens, hidden] after a block, compiled once for all blocks."""
    return run_block(config, block, State(residual), where).residual


def logits(config: DecoderConfig, outer: Outer, residual: jax.Array, linear: Linear = plain_linear) -> jax.Array:
    """Final norm and head: [..., hidden] -> float32 [..., vocab]."""
    x = rms_norm(residual, outer.final_norm, config.norm_eps)
    path = config.head_path
    return linear(path, getattr(outer, path), x).astype(jnp.float32)


def forward(params: Decoder, tokens: jax.Array, padding: jax.Array | None = None) -> jax.Array:
    """Logits of every position.

    Args:
      params: the model, dense or quantized.
      tokens: int32 [batch, tokens].
      padding: int32 [batch], left-padding tokens of each sequence; None for none.

    Returns:
      float32 [batch, tokens, vocab].
    """
    if padding is None:
        padding = jnp.zeros(tokens.shape[0], jnp.int32)
    where = positions(params.config, tokens.shape[1], padding, jnp.int32(0))
    state = State(embed(params.outer, tokens))
    for block in params.layers:
        state = run_block(params.config, block, state, where)
    return logits(params.config, params.outer, state.residual)


def abstract_decoder(config: DecoderConfig, dtype: Any = jnp.float32) -> Decoder:
    """The model's tree with a ShapeDtypeStruct for each weight."""
    spec = partial(jax.ShapeDtypeStruct, dtype=dtype)
    hidden, heads, kv_heads = config.hidden_size, config.num_heads, config.num_kv_heads
    block = Block(
        attention_norm=spec((hidden,)),
        q_proj=spec((heads * config.head_dim, hidden)),
        k_proj=spec((kv_heads * config.head_dim, hidden)),
        v_proj=spec((kv_heads * config.head_dim, hidden)),
        o_proj=spec((hidden, heads * config.head_dim)),
        mlp_norm=spec((hidden,)),
        gate_proj=spec((config.intermediate_size, hidden)),
        up_proj=spec((config.intermediate_size, hidden)),
        down_proj=spec((hidden, config.intermediate_size)),
    )
    vocab = spec((config.vocab_size, hidden))
    outer = Outer(vocab, spec((hidden,)), None if config.tied_head else vocab)
    return Decoder(outer, (block,) * config.num_layers, config)


def random_decoder(config: DecoderConfig, seed: int, dtype: Any = jnp.float32) -> Decoder:
    """A model with random weights of a sensible size, for tests and benchmarks."""
    abstract = abstract_decoder(config, dtype)
    leaves, tree = jax.tree.flatten(abstract)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [
        1.0 + 0.1 * jax.random.normal(key, leaf.shape, leaf.dtype)
        if leaf.ndim == 1
        else jax.random.normal(key, leaf.shape, leaf.dtype) * leaf.shape[-1] ** -0.5
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, drawn)
