"""Choosing the next token from logits."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from spqr_jax.errors import SpQRError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
      temperature: divides the logits; 0 takes the likeliest token (greedy).
      top_k: keep only the k likeliest tokens; 0 keeps all.
      top_p: keep the fewest likeliest tokens whose probabilities add up to at least this value; 1 keeps all. Applied
        after ``top_k``.

    Raises:
      SpQRError: a value outside its range: ``temperature`` >= 0, ``top_k`` >= 0, 0 < ``top_p`` <= 1.
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

    def draw(self, vocab_size: int) -> Draw:
        """These values as a compiled program reads them."""
        ranked: int | None = 0
        if self.temperature == 0:
            ranked = None
        elif self.top_k:  # few different programs: the next power of two
            ranked = min(1 << (self.top_k - 1).bit_length(), vocab_size)
        elif self.top_p < 1:
            ranked = vocab_size
        top_k = min(self.top_k or vocab_size, vocab_size)
        values = (jnp.float32(self.temperature), jnp.int32(top_k), jnp.float32(self.top_p))
        return Draw(*values, ranked)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draw:
    """A `Sampling` as an argument of a compiled program: other values are no other program.

    Attributes:
      temperature, top_p: float32 scalars.
      top_k: int32 scalar, at most `ranked`.
      ranked: how many of the likeliest tokens are ranked to draw from; 0 draws from all of
        them without ranking, None takes the likeliest.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    ranked: int | None = dataclasses.field(metadata={"static": True})


def sample(logits: jax.Array, key: jax.Array, draw: Draw) -> jax.Array:
    """Draws one token a row: float32 [batch, vocab] -> int32 [batch].

    Top-k is applied before top-p. The token that crosses `top_p` is kept, so at
    least one always is.
    """
    if draw.ranked is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    scores = logits / draw.temperature
    if not draw.ranked:
        return jax.random.categorical(key, scores, axis=-1).astype(jnp.int32)
    ranked, tokens = jax.lax.top_k(scores, draw.ranked)
    ranked = jnp.where(jnp.arange(draw.ranked) < draw.top_k, ranked, -jnp.inf)
    shares = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(shares, axis=-1) - shares
    ranked = jnp.where(before < draw.top_p, ranked, -jnp.inf)
    choice = jax.random.categorical(key, ranked, axis=-1)
    return jnp.take_along_axis(tokens, choice[:, None], axis=-1)[:, 0].astype(jnp.int32)
