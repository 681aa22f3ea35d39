"""The output head, a piece of text at a time: logits are made, reduced and dropped."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from spqr_jax.models.config import DecoderConfig
from spqr_jax.models.decoder import Linear, Outer, logits, plain_linear

_HEAD_CHUNK = 512  # positions whose logits are held at once


@partial(jax.jit, static_argnums=(0, 4))
def sequence_losses(
    config: DecoderConfig, outer: Outer, residual: jax.Array, tokens: jax.Array, linear: Linear = plain_linear
) -> jax.Array:
    """Mean next-token loss in nats of each sequence: [batch, tokens, hidden], int32 [batch, tokens] -> f32 [batch].

    The logits are never held whole, nor in a gradient.
    """
    length = tokens.shape[1] - 1
    chunk = min(_HEAD_CHUNK, length)
    padded = -(-length // chunk) * chunk
    hidden = jnp.pad(residual[:, :-1], ((0, 0), (0, padded - length), (0, 0)))
    targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, padded - length)))
    counted = jnp.arange(padded) < length

    @jax.checkpoint
    def body(first: jax.Array) -> jax.Array:
        scores = logits(config, outer, lax.dynamic_slice_in_dim(hidden, first, chunk, axis=1), linear)
        target = lax.dynamic_slice_in_dim(targets, first, chunk, axis=1)
        picked = jnp.take_along_axis(scores, target[..., None], axis=-1)[..., 0]
        loss = jax.nn.logsumexp(scores, axis=-1) - picked
        return jnp.sum(jnp.where(lax.dynamic_slice_in_dim(counted, first, chunk), loss, 0.0), axis=1)

    return jnp.sum(lax.map(body, jnp.arange(0, padded, chunk)), axis=0) / length


@partial(jax.jit, static_argnums=(0, 4))
def loss_gradient(
    config: DecoderConfig, outer: Outer, residual: jax.Array, tokens: jax.Array, linear: Linear = plain_linear
) -> jax.Array:
    """Gradient of the summed next-token loss by the residual stream behind the last block.

    `linear` multiplies by the head.
    """

    def total(residual: jax.Array) -> jax.Array:
        return jnp.sum(sequence_losses(config, outer, residual, tokens, linear)) * (tokens.shape[1] - 1)

    return jax.grad(total)(residual)
