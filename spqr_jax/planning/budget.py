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
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from spqr_jax._compat import few_lapack_threads, give_back_memory
from spqr_jax.config import SpQRConfig
from spqr_jax.errors import SpQRError
from spqr_jax.events import Events, ignore
from spqr_jax.layout import bytes_of_outlier, predicted_bytes
from spqr_jax.methods.choose import check_shards
from spqr_jax.models.decoder import plain_linear
from spqr_jax.models.weights import abstract_block, matrix_names
from spqr_jax.planning.sensitivity import BlockSensitivity, MeasuringPlace, block_sensitivities
from spqr_jax.rules import LayerRule
from spqr_jax.solver.hessian import Hessian
from spqr_jax.solver.solve import weight_layout
from spqr_jax.solver.trial import try_choices
from spqr_jax.stream.activations import KEPT_BYTES
from spqr_jax.stream.blocks import BlockSource
from spqr_jax.stream.spill import Spill
from spqr_jax.stream.stages import rounded_linear
from spqr_jax.stream.windows import beginnings, checked_batch

_OUTLIER_BITS = 32
_MOST_OUTLIERS = 0.2  # share beyond which a width is not worth having, and its loss is not trusted
# Prices tried, in nats per token for one bit more on every weight of the model.
_PRICES = np.geomspace(0.01, 2.0, 5)
_LOWEST_PRICE = _PRICES[0] / 1000  # that a plan may come to; below those tried, counts follow from `STEEPNESS`
STEEPNESS = 1.2  # outlier counts fall about as this power of the threshold
_HALVINGS = 30  # of the range of prices, which leave it known to a few parts in a million
_SHARE_READ = 8  # a plan looks at one token in so many of the calibration text, but no fewer and no more than these:
_FEWEST_TOKENS, _MOST_TOKENS = 2048, 4096
_WINDOW = 256  # tokens of a window that a plan looks at, or more if there are few windows


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One width of one weight, at each of `_PRICES`: what it costs and what it takes.

    Attributes:
      bits: code bits.
      loss: f64 [prices], predicted loss in nats per token.
      outliers: f64 [prices], share kept apart.
    """

    bits: int
    loss: np.ndarray
    outliers: np.ndarray

    @cached_property
    def _usable(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Logarithms of prices and outlier shares, and losses, where there are not too many outliers."""
        usable = (self.outliers <= _MOST_OUTLIERS) & np.isfinite(self.loss)
        return np.log(_PRICES[usable]), np.log(np.maximum(self.outliers[usable], 1e-9)), self.loss[usable]

    def at(self, price: float) -> tuple[float, float, float]:
        """Loss, outlier share and the price they belong to, between the prices tried.

        Below them the share goes on growing, up to `_MOST_OUTLIERS`, and the loss is
        that at the lowest price tried, which is no less than it will be.
        """
        known, shares, losses = self._usable
        if not len(known):
            return math.inf, 1.0, price
        # As low as the price may go until there are too many outliers.
        x = max(math.log(price), known[0] - (math.log(_MOST_OUTLIERS) - shares[0]) / STEEPNESS)
        more = STEEPNESS * max(known[0] - x, 0.0)
        loss = float(np.interp(x, known, losses))
        return loss, math.exp(np.interp(x, known, shares) + more), math.exp(x)


@dataclasses.dataclass(frozen=True)
class WeightCurve:
    """What is known of one weight.

    Attributes:
      path: of the weight.
      shape: (out, in).
      tau_per_price: outlier threshold τ at a price of 1.
      candidates: one for each width it may have.
    """

    path: str
    shape: tuple[int, int]
    tau_per_price: float
    candidates: tuple[Candidate, ...]

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


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


@dataclasses.dataclass(frozen=True)
class Measured:
    """What an unfinished measuring pass has come to: curves of the blocks that it has seen, and where it goes on."""

    curves: tuple[WeightCurve, ...]
    place: MeasuringPlace


def measure_curves(
    source: BlockSource,
    batches: Iterable[Any],
    config: SpQRConfig,
    events: Events = ignore,
    *,
    begin: Measured | None = None,
    keep: Callable[[Measured], None] | None = None,
    spill: Spill | None = None,
) -> list[WeightCurve]:
    """Tries every width and price on every weight of a dense model, from its last block to its first."""
    total = 0
    for kind in source.config.kinds:
        shapes = abstract_block(source.config, kind)
        total += sum(math.prod(shapes[name].shape) for name in matrix_names(source.config, kind))
    curves: list[WeightCurve] = [] if begin is None else list(begin.curves)

    def measure(block: BlockSensitivity) -> None:
        alike = list(_solved_together(block, config))
        rows = [sum(weight_layout(block.block[name], config).padded_out for name in names) for names, _ in alike]
        for names, hessian in alike:
            same = [count for count, (_, other) in zip(rows, alike, strict=True) if other.width == hessian.width]
            curves.extend(_block_curves(block, names, hessian, config, total, same))

    linear = rounded_linear if config.calibration_dtype == "bfloat16" else plain_linear
    block_sensitivities(
        source, batches, measure, events, linear=linear,
        begin=None if begin is None else begin.place,
        keep=None if keep is None else lambda place: keep(Measured(tuple(curves), place)),
        spill=spill,
    )  # fmt: skip
    return curves


def _solved_together(block: BlockSensitivity, config: SpQRConfig) -> Iterator[tuple[list[str], Hessian]]:
    """Names of weights that are to be quantized and read one input, and its Hessian."""
    for names, hessian in block.hessians:
        wanted = [name for name in names if config.for_path(f"layers.{block.index}.{name}") is not None]
        if wanted:
            yield wanted, hessian


def _block_curves(
    block: BlockSensitivity,
    names: Sequence[str],
    hessian: Hessian,
    config: SpQRConfig,
    total: int,
    solved_rows: Sequence[int],
) -> list[WeightCurve]:
    weights = [getattr(block.block, name) for name in names]
    fisher = [np.asarray(block.fisher[name], np.float64) / 4 for name in names]
    # An outlier is worth 32 bits at price λ: λ·32/total nats; T counts (w-ŵ)H(w-ŵ)ᵀ of a mean row.
    per_price = [_OUTLIER_BITS / total / max(own.mean(), 1e-300) for own in fisher]
    widths = {name: _widths(config, f"layers.{block.index}.{name}") for name in names}
    most = max(len(own) for own in widths.values())
    choices = []
    for name, unit in zip(names, per_price, strict=True):
        padded = (*widths[name], *(widths[name][-1:] * (most - len(widths[name]))))  # equally many for all
        choices.append([(bits, unit * price) for bits in padded for price in _PRICES])
    trials = try_choices(weights, hessian, fisher, choices, config.for_inputs(names[0]), solved_rows)
    curves = []
    for name, w, unit, trial in zip(names, weights, per_price, trials, strict=True):
        loss, outliers = (part.reshape(-1, len(_PRICES)) for part in (trial.loss, trial.outliers))
        own = tuple(Candidate(bits, loss[i], outliers[i]) for i, bits in enumerate(widths[name]))
        path = f"layers.{block.index}.{name}"
        curves.append(WeightCurve(path, tuple(w.shape), unit / max(trial.threshold_scale, 1e-300), own))
    return curves


def _widths(config: SpQRConfig, path: str) -> tuple[int, ...]:
    """What a rule asks for, else all that the plan may choose from."""
    for rule in config.rules:
        if rule.bits is not None and re.search(rule.pattern, path):
            return (rule.bits,)
    return config.bit_choices


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
            loss, share, own_price = candidate.at(price)
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

    low, high = float(_LOWEST_PRICE), float(_PRICES[-1])  # the higher the price, the fewer bits
    most, least = at(low).stored_bits, at(high).stored_bits
    if not least <= target_bits <= most:
        raise SpQRError(
            f"a target of {target_bits:g} stored bits per weight is out of reach: with these settings this model takes "
            f"{least:.2f} to {most:.2f}. Change --bits, --group-size or the target"
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
    give_back_memory(KEPT_BYTES)
    return make_plan(curves, config.target_bits, config)
