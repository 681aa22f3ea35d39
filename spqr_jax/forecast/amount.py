"""How much calibration text a model needs, and how much of it a given time allows."""

from __future__ import annotations

import math
from collections.abc import Callable

from spqr_jax.forecast.passes import Text, input_groups
from spqr_jax.models.config import DecoderConfig

TOKENS_AN_INPUT = 32
"""Tokens that calibration should read for each input of a matrix.

A Hessian of n tokens for m inputs makes the loss on other text too large by about exp(G/4 · (m/2n)^0.8), with G the gap
that `planning/unseen.py` explains: 5% of the loss with ten tokens for each input, 2% with 32."""
MOST_TOKENS = 2**20


def widest_input(model: DecoderConfig) -> tuple[str, int, float]:
    """The matrix that needs most tokens: its name, its inputs, and the share of tokens that reads it.

    An expert reads only the tokens that are sent to it.
    """

    def share(name: str) -> float:
        return model.experts_per_token / model.num_experts if name.startswith("experts.") else 1.0

    groups = [group for kind in dict.fromkeys(model.kinds) for group in input_groups(model, kind)]
    names, width = max(groups, key=lambda group: group[1] / share(group[0][0]))
    return names[0], width, share(names[0])


def enough_windows(model: DecoderConfig, seqlen: int) -> int:
    """Windows of `seqlen` tokens with `TOKENS_AN_INPUT` for each input of every matrix, up to `MOST_TOKENS` in all."""
    _, width, share = widest_input(model)
    tokens = min(TOKENS_AN_INPUT * width / share, MOST_TOKENS)
    return max(1, math.ceil(tokens / seqlen))


def windows_within(most: int, seqlen: int, limit: float, seconds_of: Callable[[Text], float]) -> int | None:
    """The most windows, up to `most`, whose run is forecast to end within `limit` seconds; None if one is too long.

    Args:
      most: windows.
      seqlen: tokens of each.
      limit: seconds.
      seconds_of: forecasts a run with a text; more text takes longer.
    """
    if seconds_of(Text(1, seqlen)) > limit:
        return None
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if seconds_of(Text(middle, seqlen)) <= limit else (low, middle - 1)
    return low
