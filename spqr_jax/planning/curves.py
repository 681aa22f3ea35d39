"""What each weight of a model costs at each width and outlier threshold: trials on some rows of the dense weights."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np

from spqr_jax.config import SpQRConfig
from spqr_jax.events import Events, ignore
from spqr_jax.models.decoder import plain_linear
from spqr_jax.models.weights import abstract_block, matrix_names
from spqr_jax.planning.sensitivity import BlockSensitivity, Halves, MeasuringPlace, block_sensitivities
from spqr_jax.solver.hessian import Hessian
from spqr_jax.solver.solve import weight_layout
from spqr_jax.solver.trial import Trial, try_choices
from spqr_jax.stream.blocks import BlockSource
from spqr_jax.stream.spill import Spill
from spqr_jax.stream.stages import rounded_linear

_OUTLIER_BITS = 32
_MOST_OUTLIERS = 0.2  # share beyond which a width is not worth having, and its loss is not trusted
# Prices tried, in nats per token for one bit more on every weight of the model.
PRICES = np.geomspace(0.01, 2.0, 5)
STEEPNESS = 1.2  # outlier counts fall about as this power of the threshold
_BLOCKS_IN_HALVES = 3


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One width of one weight, at each of `PRICES`: what it costs and what it takes.

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
        return np.log(PRICES[usable]), np.log(np.maximum(self.outliers[usable], 1e-9)), self.loss[usable]

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
      candidates: one for each width it may have. Their losses are those on the text that they were made for.
      gap: logarithm of the loss on another half of the text over that on the half that it was made for; None where it
        was not measured.
      factor: what losses on unseen text are of the candidates' (`unseen.py`).
    """

    path: str
    shape: tuple[int, int]
    tau_per_price: float
    candidates: tuple[Candidate, ...]
    gap: float | None = None
    factor: float = 1.0

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


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
        rows = [sum(weight_layout(block.block[name], config).padded_out for name in names) for names, _, _ in alike]
        for names, hessian, halves in alike:
            same = [count for count, (_, other, _) in zip(rows, alike, strict=True) if other.width == hessian.width]
            curves.extend(_block_curves(block, names, hessian, halves, config, total, same))

    linear = rounded_linear if config.calibration_dtype == "bfloat16" else plain_linear
    block_sensitivities(
        source, batches, measure, events, linear=linear, in_halves=_blocks_in_halves(source.config.num_layers),
        begin=None if begin is None else begin.place,
        keep=None if keep is None else lambda place: keep(Measured(tuple(curves), place)),
        spill=spill,
    )  # fmt: skip
    return curves


def _blocks_in_halves(layers: int) -> frozenset[int]:
    """Blocks, spread over a model, whose weights are also tried with half of the text and measured on the other."""
    count = min(_BLOCKS_IN_HALVES, layers)
    return frozenset(int((place + 0.5) * layers / count) for place in range(count))


def _solved_together(block: BlockSensitivity, config: SpQRConfig) -> Iterator[tuple[list[str], Hessian, Halves | None]]:
    """Names of weights that are to be quantized and read one input, its Hessian, and those of half of the text."""
    for (names, hessian), halves in zip(block.hessians, block.halves, strict=True):
        wanted = [name for name in names if config.for_path(f"layers.{block.index}.{name}") is not None]
        if wanted:
            yield wanted, hessian, halves


def _block_curves(
    block: BlockSensitivity,
    names: Sequence[str],
    hessian: Hessian,
    halves: Halves | None,
    config: SpQRConfig,
    total: int,
    solved_rows: Sequence[int],
) -> list[WeightCurve]:
    weights = [getattr(block.block, name) for name in names]
    fisher = [np.asarray(block.fisher[name], np.float64) / 4 for name in names]
    # An outlier is worth 32 bits at price λ: λ·32/total nats; T counts (w-ŵ)H(w-ŵ)ᵀ of a mean row.
    per_price = [_OUTLIER_BITS / total / max(of_rows.mean(), 1e-300) for of_rows in fisher]
    widths = {name: widths_for(config, f"layers.{block.index}.{name}") for name in names}
    most = max(map(len, widths.values()))
    choices = []
    for name, unit in zip(names, per_price, strict=True):
        padded = (*widths[name], *(widths[name][-1:] * (most - len(widths[name]))))  # equally many for all
        choices.append([(bits, unit * price) for bits in padded for price in PRICES])
    tried = partial(try_choices, weights, row_weights=fisher, choices=choices, config=config.for_inputs(names[0]))
    trials = tried(hessian, solved_rows=solved_rows)
    gaps: list[float | None] = [None] * len(names)
    if halves is not None:
        gaps = [_gap(trial) for trial in tried(halves[0], solved_rows=solved_rows, held_out=halves[1])]
    curves = []
    for name, w, unit, trial, gap in zip(names, weights, per_price, trials, gaps, strict=True):
        loss, outliers = (part.reshape(-1, len(PRICES)) for part in (trial.loss, trial.outliers))
        candidates = tuple(Candidate(bits, loss[i], outliers[i]) for i, bits in enumerate(widths[name]))
        path = f"layers.{block.index}.{name}"
        tau_per_price = unit / max(trial.threshold_scale, 1e-300)
        curves.append(WeightCurve(path, tuple(w.shape), tau_per_price, candidates, gap))
    return curves


def widths_for(config: SpQRConfig, path: str) -> tuple[int, ...]:
    """Bits that a weight may have: what a rule asks for, else all that the plan may choose from."""
    for rule in config.rules:
        if rule.bits is not None and re.search(rule.pattern, path):
            return (rule.bits,)
    return config.bit_choices


def _gap(trial: Trial) -> float | None:
    """The mean logarithm of losses on held-out text over those on a trial's own text; None where no choice tells."""
    assert trial.held_out is not None
    usable = np.isfinite(trial.loss) & np.isfinite(trial.held_out) & (trial.loss > 0) & (trial.held_out > 0)
    if not usable.any():
        return None
    return max(float(np.mean(np.log(trial.held_out[usable] / trial.loss[usable]))), 0.0)
