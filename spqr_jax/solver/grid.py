"""Fitting the grid of a group: first-level scales and zeros, and their second level.

Letters: w [g, rows], the weights of one group of g columns, one lane a row;
s, z [rows], its scales and zero points; q [g, rows], its codes; a weight is
dequantized as s * (q - z). `maxq` = 2^b - 1.

With a second level, the s of G consecutive rows are s = ss * (c - sz) with 3-bit
codes c, and z likewise; ss, sz, zs and zz are float16. The fit always returns s
and z as they will be dequantized, so that the error compensation that follows
sees the error really made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

_SHRINK = (1.0, 0.9, 0.8, 0.7)
"""Factors tried on a range's lower and upper end; seven of them gained nothing measurable."""
_CODE_OFFSETS = (-2.0, -1.0, 0.0, 1.0, 2.0)
"""Steps from the rounded scale and zero codes that are tried."""
_FLAT = 2.0**-11  # a spread below this share of the largest value is below float16's resolution


@dataclasses.dataclass(frozen=True)
class GridSpec:
    """Static choices of a fit.

    Attributes:
      bits: code bits b.
      stats_bits: bits of scale and zero codes; 16 for 16-bit floats, no second level.
      stats_group_size: rows G of a second-level tile.
      fit: ``search``, ``minmax`` or ``reference`` (see `SpQRConfig.fit`).
    """

    bits: int
    stats_bits: int
    stats_group_size: int
    fit: str

    @property
    def maxq(self) -> float:
        """Largest code."""
        return float(2**self.bits - 1)

    @property
    def quantized_stats(self) -> bool:
        """Whether there is a second level."""
        return self.stats_bits < 16

    @property
    def max_stat(self) -> float:
        """Largest scale or zero code."""
        return float(2**self.stats_bits - 1)


class GroupFit(NamedTuple):
    """One group's statistics: `scale`, `zero` as dequantized, and what is stored."""

    scale: jax.Array  # f32 [rows]
    zero: jax.Array  # f32 [rows]
    scale_codes: jax.Array  # u8 [rows], zeros without a second level
    zero_codes: jax.Array  # u8 [rows]
    stats: jax.Array  # f16 [rows/G, 4], or [rows, 2] without a second level


def round_to_grid(w: jax.Array, scale: jax.Array, zero: jax.Array, maxq: float) -> jax.Array:
    """Nearest code of each weight, as float; a scale of 0 gives the zero point's own code."""
    inverse = jnp.where(scale == 0, 0.0, 1.0 / jnp.where(scale == 0, 1.0, scale))
    return jnp.clip(jnp.round(w * inverse + zero), 0.0, maxq)


def dequantize(q: jax.Array, scale: jax.Array, zero: jax.Array) -> jax.Array:
    """s * (q - z)."""
    return scale * (q - zero)


class Objective(NamedTuple):
    """What a search minimizes: Σ_j min(importance_j (w_j - ŵ_j)², T).

    A weight whose error exceeds the threshold T will be kept apart, and T is by
    definition what keeping it apart is worth: so that is what it costs, not more.
    """

    importance: jax.Array  # f32 [g, 1], 1/U_jj²; 0 for padding
    threshold: jax.Array  # f32 [rows], T; infinite without outliers

    def error(self, w: jax.Array, scale: jax.Array, zero: jax.Array, maxq: float) -> jax.Array:
        """The sum over a group: w [g, rows] -> [rows]."""
        miss = w - dequantize(round_to_grid(w, scale, zero, maxq), scale, zero)
        return jnp.sum(jnp.minimum(self.importance * jnp.square(miss), self.threshold), axis=0)


def value_range(w: jax.Array, keep: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Smallest and largest kept weight of each row; of all weights where none is kept."""
    keep = keep | ~jnp.any(keep, axis=0)
    return jnp.min(jnp.where(keep, w, jnp.inf), axis=0), jnp.max(jnp.where(keep, w, -jnp.inf), axis=0)


def range_to_grid(low: jax.Array, high: jax.Array, maxq: float) -> tuple[jax.Array, jax.Array]:
    """Scale and zero point whose first code is `low` and whose last is `high`.

    A constant range c becomes scale |c| with c one step from the zero point, so
    that constants, zero among them, come back exactly.
    """
    flat = high - low <= 0
    scale = jnp.where(flat, jnp.abs(high), (high - low) / maxq)
    zero = jnp.where(flat, jnp.where(high < 0, 1.0, 0.0), -low / jnp.where(flat, 1.0, scale))
    return scale, zero


def reference_grid(w: jax.Array, keep: jax.Array, maxq: float) -> tuple[jax.Array, jax.Array]:
    """The original's fit: left-out weights take the mean of the others, constants the range (-1, 1)."""
    mean = jnp.sum(jnp.where(keep, w, 0.0), axis=0) / jnp.maximum(jnp.sum(keep, axis=0, dtype=w.dtype), 1.0)
    filled = jnp.where(keep, w, mean)
    low, high = jnp.min(filled, axis=0), jnp.max(filled, axis=0)
    flat = low == high
    low, high = jnp.where(flat, -1.0, low), jnp.where(flat, 1.0, high)
    scale = (high - low) / maxq
    return scale, -low / scale


def _best_of(
    evaluate: Callable[[jax.Array], tuple[jax.Array, ...]], candidates: jax.Array, start: tuple[jax.Array, ...]
) -> tuple[jax.Array, ...]:
    """Each row's candidate of the least error; `evaluate` gives (error, what made it ...), each [rows]."""

    def step(best: tuple[jax.Array, ...], candidate: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
        tried = evaluate(candidate)
        better = tried[0] < best[0]
        return tuple(jnp.where(better, new, old) for new, old in zip(tried, best, strict=True)), None

    return jax.lax.scan(step, start, candidates)[0]


def search_range(
    w: jax.Array, low: jax.Array, high: jax.Array, objective: Objective, maxq: float
) -> tuple[jax.Array, jax.Array]:
    """The shrunk range with the least error, over all pairs of factors in `_SHRINK`.

    Args:
      w: [g, rows].
      low, high: [rows], the full range.
      objective: what is minimized.

    Returns:
      low, high of the best range, [rows] each.
    """
    shrink = jnp.array(_SHRINK, w.dtype)
    middle = 0.5 * (low + high)

    def try_pair(pair: jax.Array) -> tuple[jax.Array, ...]:
        new_low = middle + shrink[pair // len(_SHRINK)] * (low - middle)
        new_high = middle + shrink[pair % len(_SHRINK)] * (high - middle)
        return objective.error(w, *range_to_grid(new_low, new_high, maxq), maxq), new_low, new_high

    start = (jnp.full_like(low, jnp.inf), low, high)
    _, low, high = _best_of(try_pair, jnp.arange(len(_SHRINK) ** 2), start)
    return low, high


class SecondLevel(NamedTuple):
    """Statistics v of G rows as v = step * (code - origin)."""

    codes: jax.Array  # f32 [rows]
    step: jax.Array  # f32 [rows/G], a float16 value
    origin: jax.Array  # f32 [rows/G], a float16 value

    def values(self, group: int) -> jax.Array:
        """The statistics as they will be dequantized, [rows]."""
        return jnp.repeat(self.step, group) * (self.codes - jnp.repeat(self.origin, group))


def _half(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float16).astype(jnp.float32)


def second_level(v: jax.Array, spec: GridSpec) -> SecondLevel:
    """Quantizes statistics [rows] over tiles of G rows by a min-max fit.

    A tile of equal values keeps them (to float16).
    """
    tiles = v.reshape(-1, spec.stats_group_size)
    low, high = tiles.min(axis=1), tiles.max(axis=1)
    if spec.fit == "reference":
        flat = low == high
        low, high = jnp.where(flat, -1.0, low), jnp.where(flat, 1.0, high)
        step = _half((high - low) / spec.max_stat)
        origin = _half(-low / step)
    else:
        step = (high - low) / spec.max_stat
        flat = high - low <= _FLAT * jnp.maximum(jnp.abs(low), jnp.abs(high))
        step = _half(jnp.where(flat, high, step))
        flat = flat | (step == 0)  # the step of a tile may be below float16
        origin = _half(jnp.where(flat, -1.0, -low / jnp.where(step == 0, 1.0, step)))
    safe = jnp.where(step == 0, 1.0, step)
    codes = jnp.clip(jnp.round(tiles / safe[:, None] + origin[:, None]), 0.0, spec.max_stat)
    if spec.fit != "reference":
        codes = jnp.where(flat[:, None], 0.0, codes)
    return SecondLevel(codes.reshape(-1), step, origin)


def search_codes(
    w: jax.Array, objective: Objective, middle: jax.Array, scales: SecondLevel, zeros: SecondLevel, spec: GridSpec
) -> tuple[SecondLevel, SecondLevel]:
    """Each row's best pair of scale and zero codes near the rounded ones, under its tile's statistics.

    The zero codes tried lie around the zero point that keeps `middle` in place
    under the scale that is tried with them.
    """
    group, top = spec.stats_group_size, spec.max_stat
    step, origin = jnp.repeat(zeros.step, group), jnp.repeat(zeros.origin, group)
    safe_step = jnp.where(step == 0, 1.0, step)

    def tried(scale_codes: jax.Array, zero_codes: jax.Array) -> tuple[jax.Array, ...]:
        scale = scales._replace(codes=scale_codes).values(group)
        zero = zeros._replace(codes=zero_codes).values(group)
        return objective.error(w, scale, zero, spec.maxq), scale_codes, zero_codes

    def try_pair(offset: jax.Array) -> tuple[jax.Array, ...]:
        scale_codes = jnp.clip(scales.codes + offset[0], 0.0, top)
        scale = scales._replace(codes=scale_codes).values(group)
        centred = 0.5 * spec.maxq - middle / jnp.where(scale == 0, 1.0, scale)
        return tried(scale_codes, jnp.clip(jnp.round(centred / safe_step + origin) + offset[1], 0.0, top))

    offsets = jnp.array([(s, z) for s in _CODE_OFFSETS for z in _CODE_OFFSETS], w.dtype)
    _, scale_codes, zero_codes = _best_of(try_pair, offsets, tried(scales.codes, zeros.codes))
    return scales._replace(codes=scale_codes), zeros._replace(codes=zero_codes)


def fit_group(w: jax.Array, keep: jax.Array, objective: Objective, spec: GridSpec) -> GroupFit:
    """Fits the statistics of one group.

    Args:
      w: f32 [g, rows].
      keep: bool [g, rows], weights that the fit should serve (not the outlier
        candidates, not padding).
      objective: what a search minimizes.
      spec: static choices; rows is a multiple of `spec.stats_group_size` when
        there is a second level.
    """
    if spec.fit == "reference":
        scale, zero = reference_grid(w, keep, spec.maxq)
        middle = None
    else:
        low, high = value_range(w, keep)
        if spec.fit == "search":
            low, high = search_range(w, low, high, objective, spec.maxq)
        scale, zero = range_to_grid(low, high, spec.maxq)
        middle = 0.5 * (low + high)
    if not spec.quantized_stats:
        return _plain_fit(scale, zero, middle, spec)
    group = spec.stats_group_size
    scales = second_level(scale, spec)
    scale = scales.values(group)
    if middle is not None:
        zero = _zero_for_scale(scale, zero, middle, spec)
    zeros = second_level(zero, spec)
    if spec.fit == "search":
        assert middle is not None
        scales, zeros = search_codes(w, objective, middle, scales, zeros, spec)
    return GroupFit(
        scales.values(group),
        zeros.values(group),
        scales.codes.astype(jnp.uint8),
        zeros.codes.astype(jnp.uint8),
        jnp.stack([scales.step, scales.origin, zeros.step, zeros.origin], axis=-1).astype(jnp.float16),
    )


def _plain_fit(scale: jax.Array, zero: jax.Array, middle: jax.Array | None, spec: GridSpec) -> GroupFit:
    """Statistics kept as float16."""
    scale = _half(scale)
    if middle is not None:
        zero = _zero_for_scale(scale, zero, middle, spec)
    zero = _half(zero)
    no_codes = jnp.zeros(scale.shape, jnp.uint8)
    return GroupFit(scale, zero, no_codes, no_codes, jnp.stack([scale, zero], axis=-1).astype(jnp.float16))


def _zero_for_scale(scale: jax.Array, zero: jax.Array, middle: jax.Array, spec: GridSpec) -> jax.Array:
    """The zero point that keeps the middle of the range in place under the rounded scale.

    Constant ranges keep their own zero point, which makes them exact.
    """
    safe = jnp.where(scale == 0, 1.0, scale)
    centred = 0.5 * spec.maxq - middle / safe
    exact = (scale == 0) | (scale == _half(jnp.abs(middle))) & ((zero == 0) | (zero == 1))
    return jnp.where(exact, zero, centred)
