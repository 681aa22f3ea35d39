"""Choosing the next token from logits."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from spqr_jax.errors import SpQRError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
      temperature: divides the logits; 0 takes the likeliest token (greedy).
      top_k: only the k likeliest tokens; 0 for all.
      top_p: only the likeliest tokens that together reach this probability; 1 for all.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise SpQRError(f"temperature must be a number >= 0, got {self.temperature}")
        if self.top_k < 0:
            raise SpQRError(f"top_k must be >= 0, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise SpQRError(f"top_p must lie in (0, 1], got {self.top_p}")


def sample(logits: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    """Draws one token a row: float32 [batch, vocab] -> int32 [batch].

    Top-k is applied before top-p. The token that crosses `top_p` is kept, so at
    least one always is.
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    scores = logits / sampling.temperature
    if sampling.top_k or sampling.top_p < 1:
        kept = min(sampling.top_k or scores.shape[-1], scores.shape[-1])
        ranked, tokens = jax.lax.top_k(scores, kept)
        before = jnp.cumsum(jax.nn.softmax(ranked, axis=-1), axis=-1) - jax.nn.softmax(ranked, axis=-1)
        ranked = jnp.where(before < sampling.top_p, ranked, -jnp.inf)
        choice = jax.random.categorical(key, ranked, axis=-1)
        return jnp.take_along_axis(tokens, choice[:, None], axis=-1)[:, 0].astype(jnp.int32)
    return jax.random.categorical(key, scores, axis=-1).astype(jnp.int32)
