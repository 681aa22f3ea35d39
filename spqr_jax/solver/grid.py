"""Fitting the grid of a group: first-level scales and zeros, and their second level.

Letters: w [g, rows], the weights of one group of g columns, one lane a row;
s, z [rows], its scales and zero points; q [g, rows], its codes; a weight is
dequantized as s * (q - z). `maxq` = 2^b - 1, a number or one a row: matrices of
different code bits are fitted side by side.

With a second level, the s of G consecutive rows are s = ss * (c - sz) with 3-bit
codes c, and z likewise; ss, sz, zs and zz are float16. The fit always returns s
and z as they will be dequantized, so that the error compensation that follows
sees the error really made.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
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
      stats_bits: bits of scale and zero codes; 16 for 16-bit floats, no second level.
      stats_group_size: rows G of a second-level tile.
      fit: ``search``, ``minmax`` or ``reference`` (see `SpQRConfig.fit`).
      at_once: whether all candidates are tried at once, and a few columns in a row without a loop. An accelerator needs
        few launches then, where each turn of a loop is several; a CPU is faster with the loops.
    """

    stats_bits: int
    stats_group_size: int
    fit: str
    at_once: bool = False

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


def over_columns(term: Callable[..., jax.Array], *arrays: jax.Array, at_once: bool = False) -> jax.Array:
    """term(row 0 of each array) + term(row 1 of each array) + ...

    The terms of up to 16 columns are written out: XLA makes one vector loop over
    the rows of them on a CPU, where it would reduce a leading axis one number at a time.

    Args:
      term: elementwise in its arguments, each one column's [...].
      arrays: [g, ...] each, g a multiple of 8.
      at_once: as `GridSpec` has it; then up to 128 columns are a sum like any other.
    """
    columns = arrays[0].shape[0]
    if at_once and columns <= 128:  # more might fill the memory with terms
        return jnp.sum(jax.vmap(term)(*arrays), axis=0)
    run = 16 if columns % 16 == 0 else 8

    def written_out(parts: Sequence[jax.Array]) -> jax.Array:
        return functools.reduce(jnp.add, (term(*(part[j] for part in parts)) for j in range(run)))

    if columns == run:
        return written_out(arrays)
    runs = [array.reshape(columns // run, run, *array.shape[1:]) for array in arrays]
    first = written_out([array[0] for array in runs])
    rest = [array[1:] for array in runs]
    return jax.lax.scan(lambda total, parts: (total + written_out(parts), None), first, rest)[0]


def _smaller(a: jax.Array, b: jax.Array | float) -> jax.Array:
    """min(a, b) as compare and select: half the instructions of a minimum that minds NaN."""
    return jnp.where(a < b, a, b)


def _larger(a: jax.Array, b: jax.Array | float) -> jax.Array:
    return jnp.where(a > b, a, b)


def _inverse(scale: jax.Array) -> jax.Array:
    return jnp.where(scale == 0, 0.0, 1.0 / jnp.where(scale == 0, 1.0, scale))


def round_to_grid(w: jax.Array, scale: jax.Array, zero: jax.Array, maxq: jax.Array | float) -> jax.Array:
    """Nearest code of each weight, as float; a scale of 0 gives the zero point's own code."""
    return _smaller(_larger(jnp.round(w * _inverse(scale) + zero), 0.0), maxq)


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
    maxq: jax.Array  # f32 [rows], largest code

    def errors(self, w: jax.Array, scale: jax.Array, zero: jax.Array, at_once: bool = False) -> jax.Array:
        """The sum over a group w [g, rows] for several candidate grids: [candidates, rows] each.

        Counted in units of the scale, s² Σ_j min(importance_j (y_j - q_j)², T/s²)
        with y = w/s + z, which saves operations; a scale of 0 is counted apart.
        """
        inverse, square = _inverse(scale), jnp.square(scale)
        limit = self.threshold / jnp.where(scale == 0, 1.0, square)

        def term(w: jax.Array, importance: jax.Array) -> jax.Array:
            y = w * inverse + zero
            miss = y - _smaller(_larger(jnp.round(y), 0.0), self.maxq)
            return _smaller(importance * (miss * miss), limit)

        def dropped(w: jax.Array, importance: jax.Array) -> jax.Array:
            return _smaller(importance * (w * w), self.threshold)

        total = square * over_columns(term, w, self.importance, at_once=at_once)
        at_zero = over_columns(dropped, w, self.importance, at_once=at_once)
        return jnp.where(scale == 0, at_zero, total)


def value_range(w: jax.Array, keep: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Smallest and largest kept weight of each row; of all weights where less than half are kept.

    The range of a few might be so narrow that its zero point is beyond float16.
    """
    keep = keep | (2 * jnp.sum(keep, axis=0) < keep.shape[0])
    return jnp.min(jnp.where(keep, w, jnp.inf), axis=0), jnp.max(jnp.where(keep, w, -jnp.inf), axis=0)


def range_to_grid(low: jax.Array, high: jax.Array, maxq: jax.Array | float) -> tuple[jax.Array, jax.Array]:
    """Scale and zero point whose first code is `low` and whose last is `high`.

    A constant range c becomes scale |c| with c one step from the zero point, so
    that constants, zero among them, come back exactly.
    """
    flat = high - low <= 0
    scale = jnp.where(flat, jnp.abs(high), (high - low) / maxq)
    zero = jnp.where(flat, jnp.where(high < 0, 1.0, 0.0), -low / jnp.where(flat, 1.0, scale))
    return scale, zero


def reference_grid(w: jax.Array, keep: jax.Array, maxq: jax.Array | float) -> tuple[jax.Array, jax.Array]:
    """The original's fit: left-out weights take the mean of the others, constants the range (-1, 1)."""
    mean = jnp.sum(jnp.where(keep, w, 0.0), axis=0) / jnp.maximum(jnp.sum(keep, axis=0, dtype=w.dtype), 1.0)
    filled = jnp.where(keep, w, mean)
    low, high = jnp.min(filled, axis=0), jnp.max(filled, axis=0)
    flat = low == high
    low, high = jnp.where(flat, -1.0, low), jnp.where(flat, 1.0, high)
    scale = (high - low) / maxq
    return scale, -low / scale


_Best = tuple[jax.Array, jax.Array, jax.Array]


def _best_of(
    errors: Callable[[jax.Array, jax.Array], jax.Array], values: Sequence[float], like: jax.Array, at_once: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The pair of `values` with the least error in each row; the first of equals.

    Args:
      errors: of some candidates, (first [c, 1], second [c, 1]) -> [c, rows].
      values: what first and second are drawn from; all pairs are tried, those with
        one first at a time: written out together they would take long to compile.
      like: [rows], for its shape and type.
      at_once: whether all pairs are tried in one launch.

    Returns:
      The least error and the pair that gives it, [rows] each.
    """
    if at_once:
        return _best_at_once(errors, values, like)
    numbers = jnp.array(values, like.dtype)
    second = numbers[:, None]
    # A loop of its own makes XLA keep the errors; left to itself it would work
    # them out again inside everything that follows.
    tried = jax.lax.map(lambda first: errors(jnp.broadcast_to(first, second.shape), second), numbers)

    def step(best: _Best, first: tuple[jax.Array, jax.Array]) -> tuple[_Best, None]:
        (least, at_first, at_second), (at, tried) = best, first
        for index, value in enumerate(values):
            better = tried[index] < least
            least = jnp.where(better, tried[index], least)
            at_first = jnp.where(better, at, at_first)
            at_second = jnp.where(better, value, at_second)
        return (least, at_first, at_second), None

    start = (jnp.full_like(like, jnp.inf), jnp.zeros_like(like), jnp.zeros_like(like))
    return jax.lax.scan(step, start, (numbers, tried))[0]


def _best_at_once(
    errors: Callable[[jax.Array, jax.Array], jax.Array], values: Sequence[float], like: jax.Array
) -> _Best:
    """`_best_of` without a loop: errors of all pairs, then the least of them."""
    pairs = list(itertools.product(values, values))
    numbers = jnp.array(pairs, like.dtype)
    # The barrier keeps the errors in memory: the comparisons would work them out anew otherwise.
    tried = jax.lax.optimization_barrier(errors(numbers[:, :1], numbers[:, 1:]))
    least, at_first, at_second = jnp.full_like(like, jnp.inf), jnp.zeros_like(like), jnp.zeros_like(like)
    for error, (first, second) in zip(tried, pairs, strict=True):
        better = error < least
        least = jnp.where(better, error, least)
        at_first, at_second = jnp.where(better, first, at_first), jnp.where(better, second, at_second)
    return least, at_first, at_second


def search_range(
    w: jax.Array, low: jax.Array, high: jax.Array, objective: Objective, at_once: bool = False
) -> tuple[jax.Array, jax.Array]:
    """The shrunk range with the least error, over all pairs of factors in `_SHRINK`.

    Args:
      w: [g, rows].
      low, high: [rows], the full range.
      objective: what is minimized.
      at_once: as `GridSpec` has it.

    Returns:
      low, high of the best range, [rows] each.
    """
    middle = 0.5 * (low + high)

    def shrunk(at_low: jax.Array, at_high: jax.Array) -> tuple[jax.Array, jax.Array]:
        return middle + at_low * (low - middle), middle + at_high * (high - middle)

    def errors(at_low: jax.Array, at_high: jax.Array) -> jax.Array:
        return objective.errors(w, *range_to_grid(*shrunk(at_low, at_high), objective.maxq), at_once)

    return shrunk(*_best_of(errors, _SHRINK, low, at_once)[1:])


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


def zero_under(rounded: jax.Array, scale: jax.Array, zero: jax.Array, maxq: jax.Array | float) -> jax.Array:
    """The zero point for a rounded scale: the middle of the grid s * (maxq/2 - z) stays in place.

    A constant row, one step from its zero point, keeps it if its scale was
    rounded to float16 only; so constants that float16 holds stay exact.
    """
    middle = scale * (0.5 * maxq - zero)
    constant = (rounded == _half(scale)) & ((zero == 0) | (zero == 1))
    return jnp.where(constant, zero, 0.5 * maxq - middle / jnp.where(rounded == 0, 1.0, rounded))


def search_codes(
    w: jax.Array,
    objective: Objective,
    zero_for: Callable[[jax.Array], jax.Array],
    scales: SecondLevel,
    zeros: SecondLevel,
    spec: GridSpec,
) -> tuple[SecondLevel, SecondLevel]:
    """Each row's best pair of scale and zero codes near the rounded ones, under its tile's statistics.

    The zero codes tried lie around the zero point `zero_for` the scale that is
    tried with them.
    """
    group, top = spec.stats_group_size, spec.max_stat
    step, origin = jnp.repeat(zeros.step, group), jnp.repeat(zeros.origin, group)
    safe_step = jnp.where(step == 0, 1.0, step)
    repeated = SecondLevel(scales.codes, jnp.repeat(scales.step, group), jnp.repeat(scales.origin, group))

    def moved(scale_offset: jax.Array, zero_offset: jax.Array) -> tuple[jax.Array, jax.Array]:
        scale_codes = jnp.clip(scales.codes + scale_offset, 0.0, top)
        scale = repeated.step * (scale_codes - repeated.origin)
        return scale_codes, jnp.clip(jnp.round(zero_for(scale) / safe_step + origin) + zero_offset, 0.0, top)

    def errors(scale_codes: jax.Array, zero_codes: jax.Array) -> jax.Array:
        scale, zero = repeated.step * (scale_codes - repeated.origin), step * (zero_codes - origin)
        return objective.errors(w, scale, zero, spec.at_once)

    best = _best_of(lambda *offsets: errors(*moved(*offsets)), _CODE_OFFSETS, scales.codes, spec.at_once)
    scale_codes, zero_codes = moved(*best[1:])
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
        scale, zero = reference_grid(w, keep, objective.maxq)
    else:
        low, high = value_range(w, keep)
        if spec.fit == "search":
            low, high = search_range(w, low, high, objective, spec.at_once)
        scale, zero = range_to_grid(low, high, objective.maxq)

    def zero_for(rounded: jax.Array) -> jax.Array:
        return zero if spec.fit == "reference" else zero_under(rounded, scale, zero, objective.maxq)

    if not spec.quantized_stats:
        rounded, no_codes = _half(scale), jnp.zeros(scale.shape, jnp.uint8)
        stored = jnp.stack([rounded, zero_for(rounded)], axis=-1).astype(jnp.float16)
        return GroupFit(rounded, _half(zero_for(rounded)), no_codes, no_codes, stored)
    scales = second_level(scale, spec)
    zeros = second_level(zero_for(scales.values(spec.stats_group_size)), spec)
    if spec.fit == "search":
        scales, zeros = search_codes(w, objective, zero_for, scales, zeros, spec)
    return GroupFit(
        scales.values(spec.stats_group_size),
        zeros.values(spec.stats_group_size),
        scales.codes.astype(jnp.uint8),
        zeros.codes.astype(jnp.uint8),
        jnp.stack([scales.step, scales.origin, zeros.step, zeros.origin], axis=-1).astype(jnp.float16),
    )
