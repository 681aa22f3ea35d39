"""Text as token windows: cut into batches, and checked once against the model that is to read it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from spqr_jax.errors import DataError
from spqr_jax.models.config import DecoderConfig


def checked_batch(tokens: np.ndarray, config: DecoderConfig) -> np.ndarray:
    if tokens.ndim != 2 or not tokens.size or not np.issubdtype(tokens.dtype, np.integer):
        raise DataError(
            f"a calibration batch must be integer token ids [batch, seq], got {tokens.dtype} {tokens.shape}"
        )
    if tokens.shape[1] > config.max_positions:
        raise DataError(
            f"calibration sequences of {tokens.shape[1]} tokens are longer than the model's context of "
            f"{config.max_positions}; use shorter ones (--seqlen)"
        )
    if tokens.min() < 0 or tokens.max() >= config.vocab_size:
        raise DataError(
            f"calibration token ids range from {tokens.min()} to {tokens.max()}, but the model's vocabulary has "
            f"{config.vocab_size} tokens: was the text tokenized for another model?"
        )
    return tokens.astype(np.int32)


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
