"""Spending a budget of stored bits where they save the most loss.

For every weight, candidate widths b and outlier thresholds T are tried on some
of its rows (`solver.try_choices`), and the loss each would cost the model is
predicted from the block's `BlockSensitivity`. With λ the price of a bit in loss,

    minimize  Σ_weights loss(b, T) + λ · bits(b, T)

splits into one small choice a weight: an outlier of 32 bits is worth having if it
saves more than 32 λ, which sets T for every weight at once, and b is the cheapest
of its candidates. λ is what makes the total meet the target.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from spqr_jax._compat import few_lapack_threads, give_back_memory
from spqr_jax.config import SpQRConfig
from spqr_jax.errors import SpQRError
from spqr_jax.events import Events, ignore
from spqr_jax.layout import bytes_of_outlier, predicted_bytes
from spqr_jax.methods.choose import check_shards
from spqr_jax.planning.curves import PRICES, Measured, WeightCurve, measure_curves
from spqr_jax.planning.unseen import for_unseen_text
from spqr_jax.rules import LayerRule
from spqr_jax.stream.activations import KEPT_BYTES
from spqr_jax.stream.blocks import BlockSource
from spqr_jax.stream.spill import Spill
from spqr_jax.stream.windows import beginnings, checked_batch

_LOWEST_PRICE = PRICES[0] / 1000  # that a plan may come to; below those tried, counts follow from `STEEPNESS`
_HALVINGS = 30  # of the range of prices, which leave it known to a few parts in a million
_SHARE_READ = 8  # a plan looks at one token in so many of the calibration text, but no fewer and no more than these:
_FEWEST_TOKENS, _MOST_TOKENS = 2048, 4096
_WINDOW = 256  # tokens of a window that a plan looks at, or more if there are few windows


@dataclasses.dataclass(frozen=True)
class Choice:
    """What a plan decided for one weight; `nbytes` and `loss` (nats per token) are predictions."""

    curve: WeightCurve
    bits: int
    outlier_threshold: float
    nbytes: float
    outlier_bytes: float
    loss: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """A choice for every weight.

    Attributes:
      choices: by path.
      target_bits: stored bits per weight that the choices were made for.
      price: λ, the rise in loss (nats per token) that one bit more on every weight should save.
    """

    choices: dict[str, Choice]
    target_bits: float
    price: float

    @property
    def size(self) -> int:
        """Number of weights in all."""
        return sum(choice.curve.size for choice in self.choices.values())

    @property
    def stored_bits(self) -> float:
        """Predicted stored bits per weight."""
        return 8 * sum(choice.nbytes for choice in self.choices.values()) / self.size

    @property
    def loss(self) -> float:
        """Predicted rise of the model's loss, nats per token."""
        return sum(choice.loss for choice in self.choices.values())

    def share_of_bits(self) -> dict[int, float]:
        """Share of weights that have each width."""
        sizes: dict[int, int] = {}
        for choice in self.choices.values():
            sizes[choice.bits] = sizes.get(choice.bits, 0) + choice.curve.size
        return {bits: size / self.size for bits, size in sorted(sizes.items())}

    def config(self, config: SpQRConfig) -> SpQRConfig:
        """`config` with the plan's choices as rules, so that they can be read, kept and repeated."""
        rules = tuple(
            LayerRule(f"^{re.escape(path)}$", bits=choice.bits, outlier_threshold=choice.outlier_threshold)
            for path, choice in self.choices.items()
        )
        skips = tuple(rule for rule in config.rules if rule.skip)
        return dataclasses.replace(config, target_bits=None, rules=skips + rules)


def _bytes(curve: WeightCurve, bits: int, share: float, config: SpQRConfig) -> float:
    return _bytes_without_outliers(curve.shape, bits, config) + share * curve.size * bytes_of_outlier(curve.shape[1])


@lru_cache
def _bytes_without_outliers(shape: tuple[int, int], bits: int, config: SpQRConfig) -> float:
    return predicted_bytes(
        shape,
        bits=bits,
        group_size=config.group_size,
        stats_group_size=config.stats_group_size,
        stats_bits=config.stats_bits if config.quantized_stats else None,
        nnz=0,
        permuted=config.order == "activation",
    )


def make_plan(curves: Sequence[WeightCurve], target_bits: float, config: SpQRConfig) -> Plan:
    """The choices of least predicted loss whose stored bits meet the target.

    Raises:
      SpQRError: the target is out of reach.
    """
    total = sum(curve.size for curve in curves)

    def choose(curve: WeightCurve, price: float, bits: int | None = None) -> Choice:
        best: tuple[float, Choice] | None = None
        for candidate in curve.candidates:
            if bits is not None and candidate.bits != bits:
                continue
            # A threshold at which one more outlier pays off on unseen text is a lower one on the trial's own text.
            loss, share, own_price = candidate.at(price / curve.factor)
            loss *= curve.factor
            nbytes = _bytes(curve, candidate.bits, share, config)
            cost = loss + price * 8 * nbytes / total
            fixed = _bytes(curve, candidate.bits, 0.0, config)
            if best is None or cost < best[0]:
                tau = curve.tau_per_price * own_price
                best = (cost, Choice(curve, candidate.bits, tau, nbytes, nbytes - fixed, loss))
        assert best is not None
        return best[1]

    def at(price: float, widths: dict[str, int] | None = None) -> Plan:
        return Plan({c.path: choose(c, price, widths[c.path] if widths else None) for c in curves}, target_bits, price)

    # The higher the price, the fewer bits.
    low, high = float(_LOWEST_PRICE), float(PRICES[-1]) * max(curve.factor for curve in curves)
    most, least = at(low).stored_bits, at(high).stored_bits
    if not least <= target_bits <= most:
        reached = f"{math.ceil(100 * least) / 100:.2f} to {math.floor(100 * most) / 100:.2f}"
        raise SpQRError(
            f"a target of {target_bits:g} stored bits per weight is out of reach: with these settings this model takes "
            f"{reached}. Change --bits, --group-size or the target"
        )
    price = _bisect(lambda price: at(price).stored_bits, target_bits, low, high)
    # Widths come in whole matrices; what they leave of the budget goes to outliers.
    widths = {path: choice.bits for path, choice in at(price).choices.items()}
    price = _bisect(lambda price: at(price, widths).stored_bits, target_bits, low, high)
    return at(price, widths)


def _bisect(falling: Callable[[float], float], target: float, low: float, high: float) -> float:
    """Where a falling function meets a target, on a logarithmic scale; an end if it does not."""
    for _ in range(_HALVINGS):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if falling(middle) > target else (low, middle)
    return high


def text_of_plan(windows: int, length: int) -> tuple[int, int]:
    """Windows and tokens of each that a plan looks at, of a text of so many windows of this length."""
    tokens = min(max(windows * length // _SHARE_READ, _FEWEST_TOKENS), _MOST_TOKENS)
    length = min(length, max(_WINDOW, -(-tokens // windows)))
    return min(windows, -(-tokens // length)), length


def plan_budget(
    source: BlockSource,
    batches: Sequence[Any],
    config: SpQRConfig,
    events: Events = ignore,
    *,
    begin: Measured | None = None,
    keep: Callable[[Measured], None] | None = None,
    spill: Spill | None = None,
) -> Plan:
    """Plans how to meet `config.target_bits`; looks at the beginnings of some windows: an eighth of the text,
    from 2048 to 4096 tokens.

    Args:
      source, batches: the dense model; int32 [batch, seq] of token ids.
      config: with `target_bits`.
      events: told of each block, once forward and once backward, as phase "measuring".
      begin: what an earlier pass over the same text came to; None to begin anew.
      keep: is given what was measured so far, after each block, forward and back.
      spill: where the text's activations are kept on disk; None to keep them in memory.

    Raises:
      SpQRError: the target is out of reach.
    """
    check_shards(config, source.config)
    config = config.resolved()
    assert config.target_bits is not None
    few_lapack_threads(max(source.config.hidden_size, source.config.intermediate_size))
    checked = [checked_batch(np.asarray(batch), source.config) for batch in batches]
    windows = sum(len(batch) for batch in checked)
    read, length = text_of_plan(windows, sum(batch.size for batch in checked) // windows)
    text = beginnings(checked, read * length, length)
    curves = measure_curves(source, text, config, events, begin=begin, keep=keep, spill=spill)
    planned, calibrated = (sum(batch.size for batch in batches) for batches in (text, checked))
    curves = for_unseen_text(curves, source.config, planned, calibrated)
    give_back_memory(KEPT_BYTES)
    return make_plan(curves, config.target_bits, config)
