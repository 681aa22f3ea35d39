"""Perplexity as GPTQ and SpQR report it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spqr_jax.errors import DataError
from spqr_jax.models.attention import positions
from spqr_jax.models.config import DecoderConfig
from spqr_jax.models.decoder import Decoder, Outer, embed, logits, pass_block
from spqr_jax.models.finite import not_finite
from spqr_jax.products import prepare

_HEAD_CHUNK = 512  # positions whose logits are held at once


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """The result of `perplexity`.

    Attributes:
      perplexity: exp of the mean loss.
      stderr: standard error of the perplexity, from the spread between windows (nan with one window).
      window_losses: mean loss of each window in nats, float64 [windows].
      tokens: number of predicted tokens.
      windows: number of windows.
      seconds: wall-clock time, compilation included.
    """

    perplexity: float
    stderr: float
    window_losses: np.ndarray
    tokens: int
    windows: int
    seconds: float


@partial(jax.jit, static_argnums=0)
def sequence_losses(config: DecoderConfig, outer: Outer, residual: jax.Array, tokens: jax.Array) -> jax.Array:
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
        scores = logits(config, outer, lax.dynamic_slice_in_dim(hidden, first, chunk, axis=1))
        target = lax.dynamic_slice_in_dim(targets, first, chunk, axis=1)
        picked = jnp.take_along_axis(scores, target[..., None], axis=-1)[..., 0]
        loss = jax.nn.logsumexp(scores, axis=-1) - picked
        return jnp.sum(jnp.where(lax.dynamic_slice_in_dim(counted, first, chunk), loss, 0.0), axis=1)

    return jnp.sum(lax.map(body, jnp.arange(0, padded, chunk)), axis=0) / length


def perplexity(
    params: Decoder,
    windows: np.ndarray,
    *,
    batch_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Measures perplexity over independent windows, as GPTQ and SpQR report it.

    The loss of a window is the mean negative log-likelihood of its tokens 2..n, in nats. The perplexity is exp of the
    mean over windows. Losses are computed in float32 and averaged in float64.

    Args:
      params: the model, dense or quantized.
      windows: token ids, int32 [windows, length], length >= 2.
      batch_size: windows that are read at a time.
      progress: called with (windows done, number of windows).

    Returns:
      The perplexity, its standard error, and the loss of each window.

    Raises:
      DataError: no windows, windows longer than the model's context, or token ids outside its vocabulary.
      NotFiniteError: a loss is not finite. The message says where in the model this begins.

    Example:
      >>> windows = np.arange(256, dtype=np.int32).reshape(4, 64)  # your text, as token ids
      >>> result = spqr_jax.perplexity(model, windows)
      >>> result.windows, result.tokens
      (4, 252)
      >>> bool(result.perplexity > 1)
      True
    """
    windows = checked_windows(windows, params.config)
    begun = time.perf_counter()
    config = params.config
    params = prepare(params, implementation="xla")  # blocks differ in layout: packed, each would be compiled
    losses: list[np.ndarray] = []
    for first in range(0, len(windows), batch_size):
        tokens = jnp.asarray(windows[first : first + batch_size])
        residual = final_residual(params, tokens)
        losses.append(np.asarray(sequence_losses(config, params.outer, residual, tokens), np.float64))
        if bad := np.flatnonzero(~np.isfinite(losses[-1])).tolist():
            raise not_finite(f"the loss of window {first + bad[0]}", params, tokens[bad[0] : bad[0] + 1])
        if progress is not None:
            progress(min(first + batch_size, len(windows)), len(windows))
    each = np.concatenate(losses)
    value = float(np.exp(each.mean()))
    spread = float(each.std(ddof=1) / np.sqrt(len(each))) if len(each) > 1 else float("nan")
    count = len(each) * (windows.shape[1] - 1)
    return Perplexity(value, value * spread, each, count, len(each), time.perf_counter() - begun)


def final_residual(params: Decoder, tokens: jax.Array) -> jax.Array:
    """The residual stream after all blocks, which share programs: int32 [batch, tokens] -> [batch, tokens, hidden]."""
    where = positions(params.config, tokens.shape[1], jnp.zeros(len(tokens), jnp.int32), jnp.int32(0))
    residual = embed(params.config, params.outer, tokens, where)
    for block in params.layers:
        residual = pass_block(params.config, block, residual, where)
    return residual


def checked_windows(windows: np.ndarray, config: DecoderConfig) -> np.ndarray:
    """Windows that the model can take, or a DataError that says why not."""
    if windows.ndim != 2 or not windows.size or windows.shape[1] < 2:
        raise DataError(f"expected token ids [windows, length >= 2], got shape {windows.shape}")
    if windows.shape[1] > config.max_positions:
        raise DataError(
            f"windows of {windows.shape[1]} tokens are longer than the model's context of {config.max_positions}; "
            "use shorter ones (--seqlen)"
        )
    if windows.min() < 0 or windows.max() >= config.vocab_size:
        raise DataError(
            f"token ids range from {windows.min()} to {windows.max()}, but the model's vocabulary has "
            f"{config.vocab_size} tokens: was the text tokenized for another model?"
        )
    return windows
