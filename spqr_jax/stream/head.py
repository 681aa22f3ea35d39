"""The output head a piece at a time: logits are computed, reduced and dropped.

A piece is so many positions of text. Where the head is packed, it is also so many tokens of the vocabulary: only that
piece of the head is dense, and what is known of a position is joined over the pieces (a running log-sum-exp).

Letters: p, q the distributions of the next token by two models, or by a teacher and a student.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spqr_jax.models.config import DecoderConfig
from spqr_jax.models.decoder import Outer, logits
from spqr_jax.models.products import Linear, plain_linear
from spqr_jax.stream.outer import head_piece, pieces_of

_POSITIONS = 128  # whose logits are held at once: in a CPU's cache they are reduced in half the time
_POSITIONS_OF_TWO = 128  # whose logits of two models are, with their probabilities; or those of one, with gradients
_POSITIONS_IN_TRAINING = 64


def over_positions(step: Callable[..., Any], count: int, *streams: jax.Array) -> Any:
    """Applies `step` to `count` positions of text at a time.

    Args:
      step: takes a piece of each stream, [count, ...], and returns a pytree of [count, ...].
      count: positions of a piece.
      streams: [batch, tokens, ...] each.

    Returns:
      What `step` returns, for all positions: a pytree of [batch, tokens, ...].
    """
    shape = streams[0].shape[:2]
    total = shape[0] * shape[1]
    count = min(count, total)

    def cut(stream: jax.Array) -> jax.Array:
        flat = stream.reshape(total, *stream.shape[2:])
        padding = [(0, -total % count)] + [(0, 0)] * (flat.ndim - 1)
        return jnp.pad(flat, padding).reshape(-1, count, *flat.shape[1:])

    def join(pieces: jax.Array) -> jax.Array:
        return pieces.reshape(-1, *pieces.shape[2:])[:total].reshape(*shape, *pieces.shape[2:])

    pieces = lax.map(lambda parts: step(*parts), tuple(cut(stream) for stream in streams))
    return jax.tree.map(join, pieces)


# ---- one model --------------------------------------------------------------------------


class Seen(NamedTuple):
    """What is known of each position, [...] each, once some tokens of the vocabulary are seen."""

    largest: jax.Array  # f32, logit
    total: jax.Array  # f32, Σ exp(logit - largest)
    target: jax.Array  # f32, the true token's logit; 0 until it is seen. Where there are several, [..., n]
    likeliest: jax.Array  # int32, the token with the largest logit

    @property
    def loss(self) -> jax.Array:
        """-ln of the true token's probability."""
        normalizer = jnp.log(self.total) + self.largest
        return (normalizer if self.target.ndim == normalizer.ndim else normalizer[..., None]) - self.target

    @property
    def top(self) -> jax.Array:
        """The likeliest token's probability."""
        return 1 / self.total


def _see(scores: jax.Array, targets: jax.Array, first: jax.Array | int) -> Seen:
    """Logits f32 [..., tokens] of the tokens from `first` on; true tokens int32 [...], or several each [..., n]."""
    largest = jnp.max(scores, axis=-1)
    total = jnp.sum(jnp.exp(scores - largest[..., None]), axis=-1)
    place = targets - jnp.int32(first)
    here = (place >= 0) & (place < scores.shape[-1])
    index = jnp.where(here, place, 0)
    if targets.ndim == scores.ndim:
        picked = jnp.take_along_axis(scores, index, axis=-1)
    else:
        picked = jnp.take_along_axis(scores, index[..., None], axis=-1)[..., 0]
    # The first token with the largest logit. On a CPU this takes a fifth of the time of jnp.argmax.
    token = jnp.arange(scores.shape[-1], dtype=jnp.int32)
    likeliest = jnp.min(jnp.where(scores == largest[..., None], token, scores.shape[-1]), axis=-1) + jnp.int32(first)
    return Seen(largest, total, jnp.where(here, picked, 0.0), likeliest)


@jax.jit
def _joined(before: Seen, piece: Seen) -> Seen:
    """What both pieces of the vocabulary know; of tokens that are equally likely, the first one is kept."""
    largest = jnp.maximum(before.largest, piece.largest)
    total = before.total * jnp.exp(before.largest - largest) + piece.total * jnp.exp(piece.largest - largest)
    likeliest = jnp.where(piece.largest > before.largest, piece.likeliest, before.likeliest)
    return Seen(largest, total, before.target + piece.target, likeliest)


@partial(jax.jit, static_argnums=0)
def _see_piece(config: DecoderConfig, head: Outer, first: jax.Array, residual: jax.Array, targets: jax.Array) -> Seen:
    return over_positions(lambda x, t: _see(logits(config, head, x), t, first), _POSITIONS, residual, targets)


def see(
    config: DecoderConfig, outer: Outer, residuals: Sequence[jax.Array], targets: Sequence[jax.Array]
) -> list[Seen]:
    """What a model predicts at each position.

    Args:
      config: the model's.
      outer: its weights outside of the blocks, dense or quantized. A packed head becomes dense by pieces.
      residuals: the stream after the last block, [batch, tokens, hidden] each.
      targets: the true next tokens, int32 [batch, tokens] each, or n for each position [batch, tokens, n]; below 0 for
        none.

    Returns:
      Of each batch, arrays [batch, tokens]; `loss` and `top` compute more.
    """
    seen: list[Seen] = []
    for first, count in pieces_of([getattr(outer, config.head_path)]):
        head = head_piece(config, outer, first, count, residuals[0].dtype)
        for batch, (residual, true) in enumerate(zip(residuals, targets, strict=True)):
            piece = _see_piece(config, head, np.int32(first), residual, true)
            if first:
                seen[batch] = _joined(seen[batch], piece)
            else:
                seen.append(piece)
        jax.block_until_ready(seen)  # otherwise the next pieces would become dense while this one is in use
    return seen


@partial(jax.jit, static_argnums=(0, 4, 5))
def loss_gradient(
    config: DecoderConfig,
    outer: Outer,
    residual: jax.Array,
    tokens: jax.Array,
    linear: Linear = plain_linear,
    first: int = 0,
) -> jax.Array:
    """Gradient of the summed next-token loss by the residual stream behind the last block.

    Args:
      config, outer: of a dense model.
      residual: [batch, tokens, hidden].
      tokens: int32 [batch, tokens], the text; each position predicts the next one.
      linear: what multiplies by the head.
      first: position of a sequence from which on predictions count.

    Returns:
      Like `residual`; 0 at the tokens before `first` and at the last token of each sequence.
    """

    def gradient(x: jax.Array, target: jax.Array) -> jax.Array:
        def loss(x: jax.Array) -> jax.Array:
            scores = logits(config, outer, x, linear)
            picked = jnp.take_along_axis(scores, target[..., None], axis=-1)[..., 0]
            return jnp.sum(jax.nn.logsumexp(scores, axis=-1) - picked)

        return jax.grad(loss)(x)

    pieces = over_positions(gradient, _POSITIONS_OF_TWO, residual[:, first:-1], tokens[:, first + 1 :])
    return jnp.pad(pieces, ((0, 0), (first, 1), (0, 0)))


# ---- two models -------------------------------------------------------------------------


def _divergence_part(p_scores: jax.Array, q_scores: jax.Array, p_seen: Seen, q_seen: Seen) -> jax.Array:
    """Σ p ln(p/q) - p + q over a piece of the vocabulary, none of whose terms is negative: f32 [...].

    So no cancellation makes a small divergence negative.
    """

    def log_probabilities(scores: jax.Array, seen: Seen) -> jax.Array:
        return scores - seen.largest[..., None] - jnp.log(seen.total)[..., None]

    log_p, log_q = log_probabilities(p_scores, p_seen), log_probabilities(q_scores, q_seen)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    return jnp.sum(p * (log_p - log_q) - p + q, axis=-1)


Pair = tuple[Any, Any]
"""Of the dense and of the quantized model."""


@partial(jax.jit, static_argnums=(0, 1))
def _see_two(
    p_config: DecoderConfig, q_config: DecoderConfig, heads: Pair, residuals: Pair, targets: jax.Array
) -> tuple[Seen, Seen, jax.Array]:
    """What two models with dense heads predict, and KL(p ‖ q)."""

    def step(p_hidden: jax.Array, q_hidden: jax.Array, target: jax.Array) -> tuple[Seen, Seen, jax.Array]:
        p_scores, q_scores = logits(p_config, heads[0], p_hidden), logits(q_config, heads[1], q_hidden)
        p_seen, q_seen = _see(p_scores, target, 0), _see(q_scores, target, 0)
        return p_seen, q_seen, _divergence_part(p_scores, q_scores, p_seen, q_seen)

    result: tuple[Seen, Seen, jax.Array] = over_positions(step, _POSITIONS_OF_TWO, *residuals, targets)
    return result


@partial(jax.jit, static_argnums=(0, 1))
def _divergence_piece(
    p_config: DecoderConfig, q_config: DecoderConfig, heads: Pair, residuals: Pair, seen: Pair
) -> jax.Array:
    def step(p_hidden: jax.Array, q_hidden: jax.Array, *known: jax.Array) -> jax.Array:
        p_scores, q_scores = logits(p_config, heads[0], p_hidden), logits(q_config, heads[1], q_hidden)
        return _divergence_part(p_scores, q_scores, Seen(*known[:4]), Seen(*known[4:]))

    result: jax.Array = over_positions(step, _POSITIONS_OF_TWO, *residuals, *seen[0], *seen[1])
    return result


def see_two(
    configs: Pair, outers: Pair, residuals: Sequence[Pair], targets: Sequence[jax.Array]
) -> list[tuple[Seen, Seen, jax.Array]]:
    """What two models predict at each position, and how far apart they are.

    Where a head is packed, its pieces are gone through twice: the divergence needs the log-sum-exp over all of them.

    Args:
      configs, outers: the models'; see `see`.
      residuals: of each batch, both models' streams after their last blocks, [batch, tokens, hidden].
      targets: the true next tokens, int32 [batch, tokens] each.

    Returns:
      Of each batch: as `see` for both models, and KL(p ‖ q) in nats, f32 [batch, tokens].
    """
    heads = [getattr(outer, config.head_path) for config, outer in zip(configs, outers, strict=True)]
    pieces = pieces_of(heads)

    def piece_of_heads(first: int, count: int) -> Pair:
        dtypes = (stream.dtype for stream in residuals[0])
        parts = (
            head_piece(config, outer, first, count, dtype)
            for config, outer, dtype in zip(configs, outers, dtypes, strict=True)
        )
        p_head, q_head = parts
        return p_head, q_head

    if len(pieces) == 1:
        whole = piece_of_heads(*pieces[0])
        return [_see_two(*configs, whole, pair, true) for pair, true in zip(residuals, targets, strict=True)]
    p_seen, q_seen = (
        see(config, outer, [pair[model] for pair in residuals], targets)
        for model, (config, outer) in enumerate(zip(configs, outers, strict=True))
    )
    divergences = [jnp.zeros(true.shape) for true in targets]
    for first, count in pieces:
        heads_now = piece_of_heads(first, count)
        for batch, pair in enumerate(residuals):
            part = _divergence_piece(*configs, heads_now, pair, (p_seen[batch], q_seen[batch]))
            divergences[batch] = divergences[batch] + part
        jax.block_until_ready(divergences)
    return list(zip(p_seen, q_seen, divergences, strict=True))


@partial(jax.jit, static_argnums=(0, 4))
def divergence_gradient(
    config: DecoderConfig, outer: Outer, student: jax.Array, teacher: jax.Array, linear: Linear = plain_linear
) -> tuple[jax.Array, jax.Array]:
    """Mean KL(p ‖ q) in nats per token, p the teacher's and q the student's, and its gradient by the student.

    By the student's logits the gradient is q - p; the norm and head before them are differentiated.

    Args:
      config, outer: of a dense model, whose norm and head both have.
      student, teacher: residual streams [batch, tokens, hidden].
      linear: what multiplies by the head.
    """
    tokens = student.size // student.shape[-1]

    def step(student: jax.Array, teacher: jax.Array) -> tuple[jax.Array, jax.Array]:
        scores, back = jax.vjp(lambda x: logits(config, outer, x, linear), student)
        log_q, log_p = (jax.nn.log_softmax(each) for each in (scores, logits(config, outer, teacher, linear)))
        p = jnp.exp(log_p)
        return jnp.sum(p * (log_p - log_q), axis=-1), back((jnp.exp(log_q) - p) / tokens)[0]

    values, gradient = over_positions(step, _POSITIONS_IN_TRAINING, student, teacher)
    return jnp.mean(values), gradient
