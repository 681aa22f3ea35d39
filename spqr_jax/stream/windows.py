"""Text as token windows: cut into batches, and checked once against the model that is to read it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from spqr_jax.errors import DataError
from spqr_jax.models.config import DecoderConfig


def checked_batch(tokens: np.ndarray, config: DecoderConfig) -> np.ndarray:
    """Calibration text that the model can take, as int32 [batch, seq], or a DataError that says why not."""
    if tokens.ndim != 2 or not tokens.size or not np.issubdtype(tokens.dtype, np.integer):
        raise DataError(
            f"a calibration batch must be integer token ids [batch, seq], got {tokens.dtype} {tokens.shape}"
        )
    _refuse_other_models(tokens, config, "calibration sequences", "calibration token ids")
    return tokens.astype(np.int32)


def checked_windows(windows: np.ndarray, config: DecoderConfig) -> np.ndarray:
    """Text to evaluate on that the model can take, or a DataError that says why not."""
    if windows.ndim != 2 or not windows.size or windows.shape[1] < 2:
        raise DataError(f"expected token ids [windows, length >= 2], got shape {windows.shape}")
    _refuse_other_models(windows, config, "windows", "token ids")
    return windows


def _refuse_other_models(tokens: np.ndarray, config: DecoderConfig, sequences: str, ids: str) -> None:
    """Refuses text that is too long for the model, or that was tokenized for another one."""
    if tokens.shape[1] > config.max_positions:
        raise DataError(
            f"{sequences} of {tokens.shape[1]} tokens are longer than the model's context of {config.max_positions}; "
            "use shorter ones (--seqlen)"
        )
    if tokens.min() < 0 or tokens.max() >= config.vocab_size:
        raise DataError(
            f"{ids} range from {tokens.min()} to {tokens.max()}, but the model's vocabulary has "
            f"{config.vocab_size} tokens: was the text tokenized for another model?"
        )


def batched(windows: np.ndarray, tokens_per_batch: int = 1024) -> Sequence[np.ndarray]:
    """Cuts windows of text into batches of about ``tokens_per_batch`` tokens.

    Args:
      windows: token ids, int32 [count, length].
      tokens_per_batch: about how many tokens a batch has; a batch has at least one window.

    Returns:
      Batches, int32 [batch, length]. The last may be smaller.

    Example:
      >>> windows = np.zeros((5, 512), np.int32)
      >>> [batch.shape for batch in spqr_jax.batched(windows)]
      [(2, 512), (2, 512), (1, 512)]
    """
    size = max(1, tokens_per_batch // windows.shape[1])
    return [windows[first : first + size] for first in range(0, len(windows), size)]


def beginnings(batches: Sequence[np.ndarray], tokens: int, length: int) -> list[np.ndarray]:
    """The beginnings of the first windows: about so many tokens of a text, int32 [batch, seq] each, in and out.

    Attention to short windows takes fewer operations, and many windows are more different from each other. Each begins
    as its window does, so a model that needs a BOS token finds it.

    Args:
      batches: the text.
      tokens: how many to take.
      length: of a beginning; more if there are few windows.
    """
    length = max(length, -(-tokens // max(1, sum(len(batch) for batch in batches))))
    by_length: dict[int, list[np.ndarray]] = {}
    for window in itertools.chain.from_iterable(batches):
        if tokens <= 0:
            break
        by_length.setdefault(len(window[:length]), []).append(window[:length])
        tokens -= len(window[:length])
    return [batch for windows in by_length.values() for batch in batched(np.stack(windows))]
