"""Perplexity as GPTQ and SpQR report it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from spqr_jax.evaluate.passes import Steps, final_residuals, window_groups
from spqr_jax.models.decoder import Decoder
from spqr_jax.models.dense import head_part
from spqr_jax.stream.blocks import TreeSource
from spqr_jax.stream.finite import not_finite
from spqr_jax.stream.head import sequence_losses
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
    params: Decoder,
    windows: np.ndarray,
    *,
    batch_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Measures perplexity over independent windows, as GPTQ and SpQR report it.

    The loss of a window is the mean negative log-likelihood of its tokens 2..n, in nats. The perplexity is exp of the
    mean over windows. Losses are computed in float32 and averaged in float64.

    A quantized model stays packed: one block at a time becomes dense, reads all windows, and is dropped. The residual
    stream of the windows takes up to 1 GiB; more text than that is read in several groups.

    Args:
      params: the model, dense or quantized.
      windows: token ids, int32 [windows, length], length >= 2.
      batch_size: windows that are read at a time.
      progress: called with (steps done, steps in all). A step is one window through one block, or through the output
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
    windows = checked_windows(windows, params.config)
    begun = time.perf_counter()
    config = params.config
    steps = Steps(len(windows) * (config.num_layers + 1), progress)
    losses: list[np.ndarray] = []
    for batches in window_groups(windows, batch_size, config.hidden_size):
        losses += _group_losses(params, batches, steps)
        _refuse_infinite(losses, params, windows)
    each = np.concatenate(losses)
    value = float(np.exp(each.mean()))
    spread = float(each.std(ddof=1) / np.sqrt(len(each))) if len(each) > 1 else float("nan")
    count = len(each) * (windows.shape[1] - 1)
    return Perplexity(value, value * spread, each, count, len(each), time.perf_counter() - begun)


def _group_losses(params: Decoder, batches: Sequence[np.ndarray], steps: Steps) -> list[np.ndarray]:
    """The losses of each batch of a group, float64 [batch]."""
    config = params.config
    residuals = final_residuals(params, batches, steps)
    head = head_part(config, params.outer, residuals[0].dtype)
    losses: list[np.ndarray] = []
    for batch, residual in zip(batches, residuals, strict=True):
        losses.append(np.asarray(sequence_losses(config, head, residual, jnp.asarray(batch)), np.float64))
        steps.advance(len(batch))
    return losses


def _refuse_infinite(losses: Sequence[np.ndarray], params: Decoder, windows: np.ndarray) -> None:
    if bad := np.flatnonzero(~np.isfinite(np.concatenate(losses))).tolist():
        raise not_finite(f"the loss of window {bad[0]}", TreeSource(params), windows[bad[0] : bad[0] + 1])
