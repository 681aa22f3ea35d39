"""Windows of token streams: side by side, drawn at random, mixed of several texts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from spqr_jax.errors import DataError


def evaluation_windows(
    tokens: np.ndarray, length: int, limit: int | None, source: str = "the data", first_token: int | None = None
) -> np.ndarray:
    """Windows side by side from the start of a stream; ready-made windows are cut to `length`.

    Args:
      tokens: int32 [tokens] or [windows, length].
      length: of a window, `first_token` included.
      limit: windows at most; None for all.
      source: named in errors.
      first_token: that each window cut from a stream begins with, or None.

    Returns:
      int32 [windows, length].

    Raises:
      DataError: less than one window.
    """
    if tokens.ndim == 2:
        windows = tokens[:, :length]
    else:
        taken = length - (first_token is not None)
        count = tokens.size // taken
        windows = _begun(tokens[: count * taken].reshape(count, taken), first_token)
    if not len(windows):
        raise DataError(f"{source} holds {tokens.size} tokens, less than one window of {length}; use shorter windows")
    return windows if limit is None else windows[:limit]


def _begun(windows: np.ndarray, first_token: int | None) -> np.ndarray:
    return windows if first_token is None else np.pad(windows, ((0, 0), (1, 0)), constant_values=first_token)


def calibration_windows(
    tokens: np.ndarray,
    length: int,
    count: int,
    seed: int,
    source: str = "the data",
    first_token: int | None = None,
) -> np.ndarray:
    """Windows drawn at random starts of a stream; of ready-made windows, the first `count`.

    Arguments as :func:`evaluation_windows`; `seed` is that of the draw.

    Returns:
      int32 [count, length].

    Raises:
      DataError: the stream is shorter than a window, there are too few windows, or the seed is negative.
    """
    return _drawn(tokens, length, count, seed, source, first_token)


def _drawn(
    tokens: np.ndarray,
    length: int,
    count: int,
    seed: int | tuple[int, int],
    source: str,
    first_token: int | None,
) -> np.ndarray:
    if np.min(seed) < 0:
        raise DataError(f"the seed must be 0 or more, got {np.min(seed)}")
    if tokens.ndim == 2:
        if len(tokens) < count or tokens.shape[1] < length:
            raise DataError(
                f"{source} has {tokens.shape[0]} windows of {tokens.shape[1]} tokens, but {count} windows of "
                f"{length} tokens are needed"
            )
        return tokens[:count, :length]
    taken = length - (first_token is not None)
    if tokens.size < taken:
        raise DataError(f"{source} holds {tokens.size} tokens, less than one window of {length}; use shorter windows")
    starts = np.random.default_rng(seed).integers(0, tokens.size - taken + 1, count)
    return _begun(np.stack([tokens[start : start + taken] for start in starts]), first_token)


def mixed_windows(
    texts: Sequence[np.ndarray],
    weights: Sequence[float],
    length: int,
    count: int,
    seed: int,
    sources: Sequence[str] | None = None,
    first_token: int | None = None,
) -> np.ndarray:
    """Calibration windows of several texts, in proportion to their weights (see :func:`shares`).

    Each text has a draw of its own, by the seed and its place among the texts; one
    text alone gives what :func:`calibration_windows` gives. The windows of each text
    are spread evenly over the result, so the first of them are not all of one text.

    Args:
      texts: int32 [tokens] or [windows, length] each.
      weights: of the texts, positive.
      length, count, seed, first_token: as in :func:`calibration_windows`.
      sources: names of the texts, for messages.

    Returns:
      int32 [count, length].

    Raises:
      DataError: as :func:`calibration_windows` and :func:`shares`.
    """
    sources = sources or [f"text {index}" for index in range(1, len(texts) + 1)]
    if len(texts) == 1:
        return calibration_windows(texts[0], length, count, seed, sources[0], first_token)
    counts = shares(weights, count)
    drawn = [
        _drawn(tokens, length, windows, (seed, index), source, first_token)
        for index, (tokens, windows, source) in enumerate(zip(texts, counts, sources, strict=True))
    ]
    places = np.concatenate([(np.arange(windows) + 0.5) / windows for windows in counts])
    return np.concatenate(drawn)[np.argsort(places, kind="stable")]


def shares(weights: Sequence[float], count: int) -> list[int]:
    """Windows of each of several texts: in proportion to the weights, by largest remainders, at least one each.

    Raises:
      DataError: fewer windows than texts, or a weight that is no positive number.
    """
    for weight in weights:
        if not (math.isfinite(weight) and weight > 0):
            raise DataError(f"the weight of a text must be a positive number, got {weight}")
    if count < len(weights):
        raise DataError(
            f"{count} windows are too few for {len(weights)} texts: use more windows (--nsamples) or fewer texts"
        )
    scaled = np.asarray(weights, np.float64) / max(weights)
    exact = scaled / scaled.sum() * count
    counts = np.floor(exact).astype(int)
    for index in np.argsort(counts - exact, kind="stable")[: count - counts.sum()]:  # largest remainder first
        counts[index] += 1
    while counts.min() == 0:
        counts[counts.argmax()] -= 1
        counts[counts.argmin()] += 1
    return [int(windows) for windows in counts]
