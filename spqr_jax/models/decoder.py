"""The decoder: parameters as pytrees, the forward pass as pure functions.

A block runs as a sequence of *stages*. A stage reads its matrices' inputs from
the state, applies the matrices through ``linear(name, w, x)`` and returns the
next state. Evaluation, generation and calibration all run these same functions;
calibration passes a `linear` that records what each matrix is given.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from spqr_jax.models import experts
from spqr_jax.models.attention import AttentionRules, KVCache, Positions, Prefix, attend, positions
from spqr_jax.models.config import DecoderConfig
from spqr_jax.models.products import Linear, activate, plain_linear, products
from spqr_jax.models.weights import Block, Decoder, Outer, Weight, abstract_decoder, matrix_names, random_decoder
from spqr_jax.products import take_rows

__all__ = [
    "STAGES",
    "Block",
    "Decoder",
    "Linear",
    "Outer",
    "State",
    "Weight",
    "abstract_decoder",
    "embed",
    "forward",
    "logits",
    "matrix_names",
    "pass_block",
    "plain_linear",
    "random_decoder",
    "run_block",
]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What flows from stage to stage.

    Attributes:
      residual: [batch, tokens, hidden], the residual stream.
      inner: what the next stage's matrices read, once the stage before made it.
      cache: of the block at hand, or what was read before, or None.
      entry: of a block whose MLP stands beside its attention: what both read.
      route: which experts `inner` is for.
      squares: float32 [batch, tokens, 1], the sum of squares of the residual stream, where it is known already: the
        loop over layers computes it in the same pass over memory as the stream itself.
    """

    residual: jax.Array
    inner: jax.Array | None = None
    cache: KVCache | Prefix | None = None
    entry: jax.Array | None = None
    route: experts.Route | None = None
    squares: jax.Array | None = None


Stage = Callable[[DecoderConfig, Block, State, Positions, Linear], State]


def sum_of_squares(x: jax.Array) -> jax.Array:
    """Σ x² over the last axis, float32 [..., 1]."""
    y = x.astype(jnp.float32)
    return jnp.sum(y * y, axis=-1, keepdims=True)


def rms_norm(
    x: jax.Array, gain: jax.Array, eps: float, offset: float = 0.0, squares: jax.Array | None = None
) -> jax.Array:
    """x / sqrt(mean(x²) + eps) · (gain + offset), in float32; `squares` is Σ x² if it is known already."""
    squares = sum_of_squares(x) if squares is None else squares
    y = x.astype(jnp.float32) * jax.lax.rsqrt(squares / x.shape[-1] + eps)
    return (y * (gain.astype(jnp.float32) + offset)).astype(x.dtype)


def layer_norm(x: jax.Array, gain: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """(x - mean(x)) / sqrt(var(x) + eps) · gain + bias, in float32."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * gain.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


def norm(
    config: DecoderConfig, part: Block | Outer, name: str, x: jax.Array, squares: jax.Array | None = None
) -> jax.Array:
    """The norm called `name` of a block, or of what is outside of blocks; `squares` as in `rms_norm`."""
    if config.norm == "layer":
        return layer_norm(x, getattr(part, name), getattr(part, name + "_bias"), config.norm_eps)
    return rms_norm(x, getattr(part, name), config.norm_eps, config.norm_offset, squares)


def _attention(config: DecoderConfig, block: Block, state: State, where: Positions, linear: Linear) -> State:
    x = norm(config, block, "attention_norm", state.residual, state.squares)
    batch, tokens, _ = x.shape
    q, k, v = products(linear, block, ("q_proj", "k_proj", "v_proj"), x)
    q = q.reshape(batch, tokens, config.num_heads, config.head_dim)
    k, v = (each.reshape(batch, tokens, config.num_kv_heads, config.head_dim) for each in (k, v))
    if config.qk_norm:
        q, k = norm(config, block, "q_norm", q), norm(config, block, "k_norm", k)
    inner, cache = attend(AttentionRules.of(config, block.kind.local), q, k, v, where, state.cache)
    return State(state.residual, inner, cache, state.residual if config.parallel else None)


def _add(config: DecoderConfig, block: Block, residual: jax.Array, made: jax.Array, post_norm: str) -> jax.Array:
    return residual + (norm(config, block, post_norm, made) if config.post_norms else made)


def _attention_output(config: DecoderConfig, block: Block, state: State, where: Positions, linear: Linear) -> State:
    assert state.inner is not None
    (made,) = products(linear, block, ("o_proj",), state.inner)
    residual = _add(config, block, state.residual, made, "attention_post_norm")
    return State(residual, None, state.cache, state.entry)


def _mlp(config: DecoderConfig, block: Block, state: State, where: Positions, linear: Linear) -> State:
    entry = state.residual if state.entry is None else state.entry
    x = norm(config, block, "attention_norm" if config.shared_norm else "mlp_norm", entry)
    if block.kind.sparse:
        inner, route = experts.enter(config, block, x, linear)
        return State(state.residual, inner, state.cache, None, route)
    if config.gated:
        gate, up = products(linear, block, ("gate_proj", "up_proj"), x)
        inner = activate(config, gate) * up
    else:
        (up,) = products(linear, block, ("up_proj",), x)
        inner = activate(config, up)
    return State(state.residual, inner, state.cache)


def _mlp_output(config: DecoderConfig, block: Block, state: State, where: Positions, linear: Linear) -> State:
    assert state.inner is not None
    if state.route is not None:
        made = experts.leave(config, block, state.inner, state.route, linear)
    else:
        (made,) = products(linear, block, ("down_proj",), state.inner)
    return State(_add(config, block, state.residual, made, "mlp_post_norm"), None, state.cache)


STAGES: tuple[Stage, ...] = (_attention, _attention_output, _mlp, _mlp_output)
"""A block's stages in order."""


def embed(config: DecoderConfig, outer: Outer, tokens: jax.Array, where: Positions) -> jax.Array:
    """Token embeddings, and those of positions: int32 [batch, tokens] -> [batch, tokens, hidden]."""
    x = take_rows(outer.embed_tokens, tokens)
    if config.embedding_scale is not None:
        x = x * jnp.asarray(config.embedding_scale, x.dtype)
    if outer.embed_positions is not None:
        x = x + take_rows(outer.embed_positions, where.index + config.position_offset).astype(x.dtype)
    return x


def run_block(
    config: DecoderConfig, block: Block, state: State, where: Positions, linear: Linear = plain_linear
) -> State:
    """One block, all stages."""
    if block.kind.sparse and linear is plain_linear:
        return _run_sparse_block(config, block, state, where)
    for stage in STAGES:
        state = stage(config, block, state, where, linear)
    return state


def _run_sparse_block(config: DecoderConfig, block: Block, state: State, where: Positions) -> State:
    """As the stages, but an expert multiplies only the tokens that are sent to it."""
    for stage in STAGES[:2]:
        state = stage(config, block, state, where, plain_linear)
    made = experts.apply(config, block, norm(config, block, "mlp_norm", state.residual))
    return State(_add(config, block, state.residual, made, "mlp_post_norm"), None, state.cache)


@partial(jax.jit, static_argnums=0)
def pass_block(config: DecoderConfig, block: Block, residual: jax.Array, where: Positions) -> jax.Array:
    """The residual stream [batch, tokens, hidden] after a block, compiled once for all blocks of a kind."""
    return run_block(config, block, State(residual), where).residual


def logits(config: DecoderConfig, outer: Outer, residual: jax.Array, linear: Linear = plain_linear) -> jax.Array:
    """Final norm and head: [..., hidden] -> float32 [..., vocab]."""
    x = norm(config, outer, "final_norm", residual)
    path = config.head_path
    scores = linear(path, getattr(outer, path), x).astype(jnp.float32)
    if config.logit_softcap is None:
        return scores
    return config.logit_softcap * jnp.tanh(scores / config.logit_softcap)


def forward(params: Decoder, tokens: jax.Array, padding: jax.Array | None = None) -> jax.Array:
    """Computes the logits of every position.

    Args:
      params: the model, dense or quantized.
      tokens: token ids, int32 [batch, tokens].
      padding: number of left-padding tokens of each sequence, int32 [batch]; None for none.

    Returns:
      Logits, float32 [batch, tokens, vocab].

    Example:
      >>> tokens = jnp.array([[1, 5, 9]], jnp.int32)
      >>> logits = spqr_jax.forward(model, tokens)
      >>> logits.shape == (1, 3, model.config.vocab_size)
      True
    """
    if padding is None:
        padding = jnp.zeros(tokens.shape[0], jnp.int32)
    config = params.config
    where = positions(config, tokens.shape[1], padding, jnp.int32(0))
    residual = embed(config, params.outer, tokens, where)
    for block in params.layers:
        residual = run_block(config, block, State(residual), where).residual
    return logits(config, params.outer, residual)
