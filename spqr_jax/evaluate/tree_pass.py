"""Trees of tokens through a model's blocks.

All tokens of a forest are rows of the same matrix products, without padding between them. Only attention sees trees: it
gathers each tree's tokens into a slot, and puts its results back beside each other.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spqr_jax.evaluate.trees import Forest
from spqr_jax.models.attention import AttentionRules, Positions, positions, rotate
from spqr_jax.models.config import DecoderConfig
from spqr_jax.models.decoder import STAGES, Block, State, norm
from spqr_jax.models.products import Linear, plain_linear, products
from spqr_jax.models.prompt_attention import MASKED, capped

_QUERIES = 64  # of a tree, that are multiplied at once: no key behind them is


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """Where attention finds the tokens of each tree; see `Forest`.

    Attributes:
      places, ends, depths: int32 [slots, size].
      back: int32 [tokens].
    """

    places: jax.Array
    ends: jax.Array
    depths: jax.Array
    back: jax.Array

    @classmethod
    def of(cls, forest: Forest) -> Slots:
        arrays = (forest.places, forest.ends, forest.depths[forest.places], forest.back)
        return cls(*map(jnp.asarray, arrays))


def positions_in_trees(config: DecoderConfig, forest: Forest) -> Positions:
    """A token stands at its depth in its tree: [1, tokens]."""
    column = positions(config, 1, -forest.depths, np.int32(0))
    return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1) if leaf.ndim > 1 else leaf, column)


@partial(jax.jit, static_argnums=(0, 5))
def pass_trees(
    config: DecoderConfig,
    block: Block,
    residual: jax.Array,
    where: Positions,
    slots: Slots,
    linear: Linear = plain_linear,
) -> jax.Array:
    """The residual stream [1, tokens, hidden] after a block, compiled once for all blocks of a kind.

    Args:
      config, block: of a dense model.
      residual: of a forest's tokens.
      where: from `positions_in_trees`.
      slots: the forest's.
      linear: what multiplies by the block's matrices.
    """
    state = _attention(config, block, residual, where, slots, linear)
    for stage in STAGES[1:]:
        state = stage(config, block, state, where, linear)
    return state.residual


def _attention(
    config: DecoderConfig, block: Block, residual: jax.Array, where: Positions, slots: Slots, linear: Linear
) -> State:
    """As the decoder's own first stage, over trees."""
    x = norm(config, block, "attention_norm", residual)
    q, k, v = products(linear, block, ("q_proj", "k_proj", "v_proj"), x)
    q = q.reshape(*x.shape[:2], config.num_heads, config.head_dim)
    k, v = (part.reshape(*x.shape[:2], config.num_kv_heads, config.head_dim) for part in (k, v))
    if config.qk_norm:
        q, k = norm(config, block, "q_norm", q), norm(config, block, "k_norm", k)
    rules = AttentionRules.of(config, block.kind.local)
    rotary = rules.rotary(where)
    scale = config.head_dim**-0.5 if rules.scale is None else rules.scale
    inner = _attend(rules, rotate(q, rotary)[0] * jnp.asarray(scale, q.dtype), rotate(k, rotary)[0], v[0], where, slots)
    return State(residual, inner[None], None, residual if config.parallel else None)


def _attend(
    rules: AttentionRules, q: jax.Array, k: jax.Array, v: jax.Array, where: Positions, slots: Slots
) -> jax.Array:
    """[tokens, heads, head_dim] and twice [tokens, kv_heads, head_dim] -> [tokens, heads * head_dim]."""
    tokens, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    count, size = slots.places.shape

    def split(x: jax.Array) -> jax.Array:
        """[tokens, n * kv_heads, head_dim] -> [slots * kv_heads, size, n, head_dim]."""
        trees = x.reshape(tokens, kv_heads, -1, head_dim)[slots.places]
        return trees.transpose(0, 2, 1, 3, 4).reshape(count * kv_heads, size, -1, head_dim)

    ends, depths = (jnp.repeat(part, kv_heads, axis=0) for part in (slots.ends, slots.depths))
    parts = (split(q), split(k)[:, :, 0], split(v)[:, :, 0], ends, depths)
    attend = partial(_attend_tree, rules.softcap, rules.keys_seen(where))
    # A head's scores of one tree fit a CPU's cache; an accelerator takes all trees at once.
    out = lax.platform_dependent(
        *parts, cpu=lambda *parts: lax.map(lambda tree: attend(*tree), parts), default=jax.vmap(attend)
    )
    out = out.reshape(count, kv_heads, size, heads // kv_heads, head_dim).transpose(0, 2, 1, 3, 4)
    return out.reshape(count * size, heads * head_dim)[slots.back]


def _attend_tree(
    softcap: float | None,
    window: int | jax.Array | None,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    ends: jax.Array,
    depths: jax.Array,
) -> jax.Array:
    """Queries [size, share, head_dim] that share keys and values [size, head_dim], softmax in float32."""
    size, share, head_dim = q.shape
    chunks = []
    for first in range(0, size, _QUERIES):
        last = min(first + _QUERIES, size)
        rows = q[first:last].reshape(-1, head_dim)
        scores = lax.dot_general(rows, k[:last], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        query, key = jnp.arange(first, last)[:, None], jnp.arange(last)
        seen = (key <= query) & (query < ends[:last])
        if window is not None:
            seen = seen & (depths[:last] > depths[first:last, None] - window)
        scores = jnp.where(seen[:, None], capped(scores, softcap).reshape(last - first, share, last), MASKED)
        weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
        total = jnp.sum(weights, axis=-1)[..., None]
        weights = weights.astype(v.dtype).reshape(-1, last)
        out = lax.dot_general(weights, v[:last], (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        chunks.append((out.reshape(last - first, share, head_dim) / total).astype(v.dtype))
    return jnp.concatenate(chunks)
