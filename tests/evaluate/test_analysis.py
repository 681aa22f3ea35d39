"""Sensitivities against a small case by hand; structures planted and found."""

from __future__ import annotations

import json

import numpy as np
import pytest
from support.problems import correlated_problem

from spqr_jax import SpQRConfig
from spqr_jax.analysis import ModelAnalysis, analyze, find_structures, line_pooled, sensitivity_map
from spqr_jax.methods import quantize_weight
from spqr_jax.solver.solve import factor_hessian
from spqr_jax.stream.blocks import TreeSource


def test_a_weights_sensitivity_is_what_rounding_it_costs_at_best():
    """The least ½ (w-v) H (w-v)ᵀ over all v whose entry j is the rounded one, by solving for the others."""
    w, x = (np.asarray(a) for a in correlated_problem(3, 24, tokens=200))
    h = 2 / len(x) * x.T @ x
    config = SpQRConfig(damping=0.01, outlier_threshold=float("inf"))
    factor = factor_hessian(h, config)
    found = sensitivity_map(w, factor, config)
    perm = np.asarray(factor.perm)
    plain = quantize_weight(w[:, perm], None, SpQRConfig.rtn(3, 16, fit="search", stats_bits=3))
    rounded = np.empty(w.shape)
    rounded[:, perm] = np.asarray(plain.to_dense(), np.float64)
    damped = np.asarray(h, np.float64) + np.diag(np.asarray(factor.shift, np.float64))
    for row, column in [(0, 0), (1, 7), (2, 23)]:
        others = np.arange(24) != column
        step = rounded[row, column] - float(w[row, column])
        moved = np.zeros(24)
        moved[column] = step
        moved[others] = -np.linalg.solve(damped[np.ix_(others, others)], damped[others, column] * step)
        assert found[row, column] == pytest.approx(0.5 * moved @ damped @ moved, rel=1e-3)


def noise(rng, out=128, inner=256):
    return rng.exponential(size=(out, inner)).astype(np.float32)


def test_scattered_weights_are_no_structure():
    found = find_structures(noise(np.random.default_rng(0)), head_dim=16, head_axis="rows", rotary=True)
    assert (found.rows, found.columns, found.heads, found.rotary_pairs) == ((), (), (), ())
    assert found.shares["unstructured"] == 1
    assert 0.03 < found.top_share < 0.08  # of exponential noise: 1% of weights carry 1% (1 + ln 100)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_row_and_a_column_are_found(axis):
    costs = noise(np.random.default_rng(1))
    line = costs[37] if axis == 0 else costs[:, 37]
    line[::3] += 50  # a third of it: the paper's rows are not solid either
    found = find_structures(costs)
    assert (found.rows, found.columns) == (((37,), ()) if axis == 0 else ((), (37,)))
    assert found.shares["rows" if axis == 0 else "columns"] > 0.05


@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_a_sensitive_head_is_found(axis):
    rng = np.random.default_rng(2)
    costs = noise(rng, 256, 256)
    band = costs[64:80] if axis == "rows" else costs[:, 64:80]
    band[rng.random(band.shape) < 0.045] += 50  # scattered within the head, no row of its own
    found = find_structures(costs, head_dim=16, head_axis=axis)
    assert found.heads == (4,)
    assert (found.rows, found.columns) == ((), ())
    assert found.shares["heads"] > 0.2


def test_rotary_pairs_are_found_in_all_heads():
    rng = np.random.default_rng(3)
    costs = noise(rng, 256, 256)
    for head in range(8):
        for row in (head * 32 + 5, head * 32 + 16 + 5):  # pair 5: dimensions 5 and 21 of 32
            costs[row, rng.random(256) < 0.07] += 50
    found = find_structures(costs, head_dim=32, head_axis="rows", rotary=True)
    assert found.rotary_pairs == (5,)
    assert found.rotary_correlation > 0.9
    assert found.heads == ()
    one_half = noise(rng, 256, 256)
    for head in range(8):
        one_half[head * 32 + 5, rng.random(256) < 0.07] += 50
    assert find_structures(one_half, head_dim=32, head_axis="rows", rotary=True).rotary_pairs == ()


def test_shares_add_up():
    rng = np.random.default_rng(4)
    costs = noise(rng)
    costs[3], costs[:, 9] = costs[3] + 20, costs[:, 9] + 20
    found = find_structures(costs, head_dim=16, head_axis="rows", rotary=True)
    assert sum(found.shares.values()) == pytest.approx(1)
    assert found.shares["rows"] > 0.3


@pytest.mark.parametrize("axis", [0, 1])
def test_a_thin_line_survives_shrinking_and_a_point_does_not(axis):
    values = np.zeros((512, 768), np.float32)
    (values[301] if axis == 0 else values[:, 301])[:] = 1
    values[10, 10] = 1
    small = line_pooled(values, 64, 96)
    assert small.shape == (64, 96)
    line = small[301 * 64 // 512] if axis == 0 else small[:, 301 * 96 // 768]
    assert np.all(line == 1)
    assert small[10 * 64 // 512, 10 * 96 // 768] == pytest.approx(1 / 8)
    assert np.mean(small > 0) < 0.05


def test_a_map_smaller_than_asked_for_stays():
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    np.testing.assert_array_equal(line_pooled(values, 10, 10), values)


@pytest.fixture(scope="module")
def analysis(tiny_model, tiny_batches):
    return analyze(TreeSource(tiny_model), tiny_batches, SpQRConfig(rules=()), maps=r"layers\.1\.")


def test_every_matrix_is_looked_at(analysis, tiny_model):
    assert len(analysis.weights) == 14
    assert {weight.path for weight in analysis.weights} >= {"layers.0.q_proj", "layers.1.down_proj"}
    assert set(analysis.maps()) == {weight.path for weight in analysis.weights if weight.block == 1}
    for weight in analysis.weights:
        assert 0 < weight.cost < 1
        assert sum(weight.by_column) == pytest.approx(1)
        assert (weight.structures.rotary_correlation is None) == (weight.kind not in ("q_proj", "k_proj"))
    # Columns are visited by falling activation, and errors under large activations cost more.
    late, early = (np.mean([np.sum(w.by_column[part]) for w in analysis.weights])
                   for part in (slice(16, None), slice(16)))  # fmt: skip
    assert early > late


def test_costs_are_those_of_the_dense_models_activations(analysis, tiny_model, tiny_batches):
    from spqr_jax.models.decoder import plain_linear
    from spqr_jax.stream.activations import Activations

    activations = Activations(tiny_model.config, tiny_model.outer, tiny_batches, plain_linear)
    h = activations.hessians(0, tiny_model.layers[0])[0].matrix()
    w = tiny_model.layers[0].q_proj
    costs = sensitivity_map(w, factor_hessian(h, SpQRConfig()), SpQRConfig())
    expected = costs.sum() / (0.5 * np.sum((np.asarray(w) @ np.asarray(h)) * np.asarray(w)))
    assert analysis.weights[0].path == "layers.0.q_proj"
    assert analysis.weights[0].cost == pytest.approx(expected, rel=1e-3)


def test_it_can_be_written_and_read(analysis):
    again = ModelAnalysis.from_json(json.loads(json.dumps(analysis.to_json())), analysis.maps())
    assert again.weights[3] == analysis.weights[3]
    assert set(again.maps()) == set(analysis.maps())
