from __future__ import annotations

from functools import partial

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.reference_spqr import loo_gain

from spqr_jax.solver.grid import GridSpec, Objective, dequantize, fit_group, range_to_grid, round_to_grid, second_level
from spqr_jax.solver.outliers import leave_one_out_gain

HALF = 2.0**-11  # rounding of a float16


def spec(fit="minmax", stats_bits=3):
    return GridSpec(stats_bits=stats_bits, stats_group_size=16, fit=fit)


fit_jit = partial(jax.jit, static_argnames="spec")(fit_group)
loo_jit = partial(jax.jit, static_argnums=2)(leave_one_out_gain)


@partial(jax.jit, static_argnums=1)
def second_level_jit(v, grid):
    level = second_level(v, grid)
    return level, level.values(grid.stats_group_size)


@jax.jit
def dequantize_jit(w, scale, zero, maxq):
    return dequantize(round_to_grid(w, scale, zero, maxq), scale, zero)


def fit(w, grid, keep=None, threshold=np.inf, maxq=7.0):
    w = np.asarray(w, np.float32)
    keep = np.ones(w.shape, bool) if keep is None else keep
    rows = (np.full(w.shape[1], value, np.float32) for value in (threshold, maxq))
    return fit_jit(w, keep, Objective(np.ones((w.shape[0], 1), np.float32), *rows), spec=grid)


def dequantized(w, found, maxq):
    return np.asarray(dequantize_jit(np.asarray(w, np.float32), found.scale, found.zero, np.float32(maxq)))


@given(seed=st.integers(0, 10**6), bits=st.integers(2, 8), log_size=st.integers(-3, 3))
def test_one_level_error_is_at_most_half_a_step(seed, bits, log_size):
    w = np.random.default_rng(seed).standard_normal((16, 32)) * 10.0**log_size
    maxq = 2.0**bits - 1
    found = fit(w, spec(stats_bits=16), maxq=maxq)
    spread = w.max(0) - w.min(0)
    # half a step, and what rounding scale and zero to float16 moves the ends by
    zero = np.abs(np.asarray(found.zero))
    bound = spread / maxq * (0.5 + HALF * (maxq + 2 * zero + 1)) + 1e-6 * np.abs(w).max()
    assert np.all(np.abs(dequantized(w, found, maxq) - w) <= bound)


def search_and_minmax(seed, stats_bits):
    """Sums of squared errors of one tile with heavy tails."""
    w = np.random.default_rng(seed).standard_t(4, (16, 32))
    grids = (spec(name, stats_bits=stats_bits) for name in ("search", "minmax"))
    return [np.sum((dequantized(w, fit(w, grid), 7.0) - w) ** 2) for grid in grids]


@given(seed=st.integers(0, 10**6))
def test_search_is_never_worse_than_minmax_on_what_it_minimizes(seed):
    search, minmax = search_and_minmax(seed, 16)
    assert search <= minmax


def test_search_under_a_second_level_is_better_by_far_if_not_always():
    """Its steps are greedy there, so a tile may lose: 1 in some hundreds does, by a few percent (seed 17357: 4%)."""
    errors = np.array([search_and_minmax(seed, 3) for seed in [17357, *range(100)]])
    ratio = errors[:, 0] / errors[:, 1]
    assert np.sum(errors[:, 0]) < 0.88 * np.sum(errors[:, 1])
    assert np.mean(ratio > 1) < 0.03
    assert np.max(ratio) < 1.1


@pytest.mark.parametrize("value", [0.0, 0.5, -0.75, 3.0])
@pytest.mark.parametrize("name", ["search", "minmax"])
@pytest.mark.parametrize("stats_bits", [3, 16])
def test_constants_that_float16_holds_are_exact(value, name, stats_bits):
    grid = spec(name, stats_bits=stats_bits)
    w = np.full((16, 32), value)
    np.testing.assert_array_equal(dequantized(w, fit(w, grid), 7.0), w)


@pytest.mark.parametrize("name", ["search", "minmax"])
@pytest.mark.parametrize("stats_bits", [3, 16])
def test_an_all_zero_group_is_exact_beside_others(name, stats_bits):
    grid = spec(name, stats_bits=stats_bits)
    w = np.random.default_rng(0).standard_normal((16, 32))
    w[:, 3] = 0.0
    np.testing.assert_array_equal(dequantized(w, fit(w, grid), 7.0)[:, 3], 0.0)


def test_the_reference_fit_keeps_the_originals_flaw():
    grid = spec("reference", stats_bits=16)
    zeros = np.zeros((16, 32))
    assert np.all(np.abs(dequantized(zeros, fit(zeros, grid), 7.0)) > 0.1)


def test_a_group_of_only_candidates_falls_back_to_all_weights():
    grid = spec(stats_bits=16)
    w = np.random.default_rng(1).standard_normal((16, 32))
    nothing_kept = fit(w, grid, keep=np.zeros(w.shape, bool))
    all_kept = fit(w, grid)
    np.testing.assert_array_equal(nothing_kept.scale, all_kept.scale)
    np.testing.assert_array_equal(nothing_kept.zero, all_kept.zero)


def test_left_out_weights_do_not_widen_the_range():
    w = np.random.default_rng(2).uniform(-1, 1, (16, 32))
    keep = np.ones(w.shape, bool)
    w[5], keep[5] = 100.0, False
    assert np.all(np.asarray(fit(w, spec(stats_bits=16), keep).scale) <= 2 / 7 * (1 + HALF))


@given(seed=st.integers(0, 10**6), offset=st.floats(-10, 10), spread=st.floats(0.01, 10))
def test_second_level_error_is_at_most_half_a_step(seed, offset, spread):
    v = offset + spread * np.random.default_rng(seed).uniform(0, 1, 32)
    level, values = second_level_jit(v.astype(np.float32), spec())
    values = np.asarray(values)
    step = np.repeat(np.asarray(level.step), 16)
    assert np.all(np.abs(values - v) <= 0.5 * step + 2 * HALF * np.abs(v).max() + HALF * 8 * step)
    assert np.all((np.asarray(level.codes) >= 0) & (np.asarray(level.codes) <= 7))


def test_tiny_and_huge_statistics_stay_finite():
    for size in (1e-7, 1e-5, 1e3):
        w = np.random.default_rng(3).standard_normal((16, 32)) * size
        found = fit(w, spec("search"))
        assert np.all(np.isfinite(np.asarray(found.stats, np.float32)))
        error = np.abs(dequantized(w, found, 7.0) - w).max()
        assert error <= max(size * 2, 7 * 2.0**-24)  # a float16 is a multiple of 2^-24


@given(seed=st.integers(0, 10**6), ties=st.booleans())
def test_leave_one_out_in_three_fits_is_exact(seed, ties):
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((16, 4))
    if ties:
        w = np.round(w)  # several minima and maxima
    weight = rng.uniform(0.5, 2, 16)
    gains = loo_jit(w.astype(np.float32), weight.astype(np.float32)[:, None], 7.0)
    for row in range(4):
        expected = loo_gain(w[:, row].astype(np.float32).astype(np.float64), weight, 7.0)
        # a weight halfway between two codes may round either way in float32
        np.testing.assert_allclose(gains[:, row], expected, atol=1e-4 * max(1.0, np.abs(expected).max()))


def test_range_ends_are_grid_points():
    low, high = np.array([-1.0, 0.5], np.float32), np.array([2.0, 0.75], np.float32)
    scale, zero = (np.asarray(a) for a in jax.jit(range_to_grid)(low, high, 7.0))
    np.testing.assert_allclose(dequantize(np.float32(0), scale, zero), low, rtol=1e-6)
    np.testing.assert_allclose(dequantize(np.float32(7), scale, zero), high, rtol=1e-6)
