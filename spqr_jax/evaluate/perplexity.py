"""Perplexity as GPTQ and SpQR report it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from spqr_jax.evaluate.passes import final_residuals, stream_numbers, window_groups
from spqr_jax.events import Events, Steps, ignore
from spqr_jax.models.decoder import Decoder, Outer
from spqr_jax.stream.blocks import BlockSource, as_source
from spqr_jax.stream.finite import not_finite
from spqr_jax.stream.head import see
from spqr_jax.stream.outer import lean_outer
from spqr_jax.stream.windows import checked_windows


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


def perplexity(
    params: Decoder | BlockSource,
    windows: np.ndarray,
    *,
    batch_size: int = 1,
    events: Events = ignore,
) -> Perplexity:
    """Measures perplexity over independent windows, as GPTQ and SpQR report it.

    The loss of a window is the mean negative log-likelihood of its tokens 2..n, in nats. The perplexity is exp of the
    mean over windows. Losses are computed in float32 and averaged in float64.

    A quantized model stays packed: one block at a time becomes dense, reads all windows, and is dropped. An output head
    and an embedding that are packed become dense by pieces. The residual stream of the windows takes a sixteenth of
    a byte for each weight of the model, between 32 MiB and 1 GiB. More text than that is read in several groups.

    Args:
      params: the model, dense or quantized: in memory, or a `BlockSource`, whose blocks are read one at a time.
      windows: token ids, int32 [windows, length], length >= 2.
      batch_size: windows that are read at a time.
      events: told of each batch, as phase "scoring". A step is one window through one block, or through the output
        head.

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
    source = as_source(params)
    config = source.config
    windows = checked_windows(windows, config)
    begun = time.perf_counter()
    outer = lean_outer(source)
    steps = Steps("scoring", len(windows) * (config.num_layers + 1), events)
    losses: list[np.ndarray] = []
    for batches in window_groups(windows, batch_size, config.hidden_size, stream_numbers(config)):
        losses += _group_losses(source, outer, batches, steps)
        _refuse_infinite(losses, source, windows)
    each = np.concatenate(losses)
    value = float(np.exp(each.mean()))
    spread = float(each.std(ddof=1) / np.sqrt(len(each))) if len(each) > 1 else float("nan")
    count = len(each) * (windows.shape[1] - 1)
    return Perplexity(value, value * spread, each, count, len(each), time.perf_counter() - begun)


def _group_losses(source: BlockSource, outer: Outer, batches: Sequence[np.ndarray], steps: Steps) -> list[np.ndarray]:
    """The mean losses of each batch of a group, float64 [batch]."""
    residuals = final_residuals(source, outer, batches, steps)
    targets = [jnp.asarray(next_tokens(batch)) for batch in batches]
    seen = see(source.config, outer, residuals, targets)
    steps.advance(sum(map(len, batches)))
    return [np.asarray(part.loss, np.float64)[:, :-1].mean(axis=1) for part in seen]


def next_tokens(tokens: np.ndarray) -> np.ndarray:
    """The token that each position predicts, int32 [batch, tokens]; -1 for the last position, which predicts none."""
    return np.pad(tokens[:, 1:].astype(np.int32), ((0, 0), (0, 1)), constant_values=-1)


def _refuse_infinite(losses: Sequence[np.ndarray], source: BlockSource, windows: np.ndarray) -> None:
    if bad := np.flatnonzero(~np.isfinite(np.concatenate(losses))).tolist():
        raise not_finite(f"the loss of window {bad[0]}", source, windows[bad[0] : bad[0] + 1])
