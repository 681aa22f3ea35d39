"""Weights that make up for what quantizing the layers before them did to their inputs."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from support.problems import divergence, random_tokens

from spqr_jax import SpQRConfig, SpQRError, accumulate_hessian, empty_hessian, quantize
from spqr_jax.solver import correct_drift, cross_gram
from spqr_jax.stream.activations import Activations

gram = jax.jit(cross_gram)


@pytest.fixture(scope="module")
def drifted():
    """Inputs of a dense model and what became of them: x = A x₀ + noise, [tokens, 24] each."""
    rng = np.random.default_rng(0)
    mix = np.eye(24) + 0.2 * rng.standard_normal((24, 24)) / 24**0.5

    def draw(tokens):
        aim = rng.standard_normal((tokens, 24)) * np.linspace(0.5, 2, 24)
        return aim, aim @ mix.T + 0.05 * rng.standard_normal((tokens, 24))

    return [tuple(a.astype(np.float32) for a in draw(tokens)) for tokens in (400, 100)]


def test_the_move_solves_the_damped_normal_equations(drifted):
    aim, x = (np.asarray(a, np.float64) for a in drifted[0])
    w = np.random.default_rng(1).standard_normal((8, 24))
    h, d = 2 / len(x) * x.T @ x, 2 / len(x) * (aim - x).T @ x
    np.testing.assert_allclose(2 / len(x) * np.asarray(gram(*drifted[0])), d, atol=1e-5)
    (moved,) = correct_drift([w.astype(np.float32)], h.astype(np.float32), d.astype(np.float32), 0.5)
    # share 0.5 of the solution of  (W'-W) (H + mean(diag H) I) = W D
    left = 2 * (np.asarray(moved, np.float64) - w) @ (h + np.mean(np.diag(h)) * np.eye(24))
    np.testing.assert_allclose(left, w @ d, atol=1e-4)


def test_outputs_on_fresh_inputs_come_closer(drifted):
    (aim, x), (fresh_aim, fresh) = drifted
    w = jax.device_put(np.random.default_rng(2).standard_normal((8, 24)).astype(np.float32))
    hessian = accumulate_hessian(empty_hessian(24), x)
    errors = []
    for share in (0.0, 0.5, 1.0):
        (moved,) = correct_drift([w], hessian.matrix(), 2 / len(x) * gram(aim, x), share)
        errors.append(np.linalg.norm(fresh_aim @ np.asarray(w).T - fresh @ np.asarray(moved).T))
    assert errors[2] < errors[1] < 0.85 * errors[0]


def test_activations_know_their_drift(tiny_model, tiny_batches):
    """Against the block before with its weights changed; without a change there is none."""
    config, (first, second) = tiny_model.config, tiny_model.layers
    changed = jax.tree.map(lambda leaf: leaf * 0.9, first)
    ours, dense = (Activations(config, tiny_model.outer, tiny_batches) for _ in range(2))
    hessians = ours.hessians(0, first)
    # two copies of one computation in one program: equal to rounding
    np.testing.assert_allclose(ours.drifts(0, first, dense, first, hessians)[0], 0.0, atol=1e-6)
    inputs = []
    for activations, block in ((ours, changed), (dense, first)):
        for stage in range(4):
            activations.advance(stage, block)
        residual = np.concatenate([np.asarray(state.residual).reshape(-1, 64) for state, _ in activations.chunks()])
        gain = np.asarray(second.attention_norm)
        inputs.append(residual / np.sqrt(np.mean(residual**2, axis=1, keepdims=True) + config.norm_eps) * gain)
    x, aim = inputs
    (drift,) = ours.drifts(0, second, dense, second, ours.hessians(0, second))
    np.testing.assert_allclose(drift, 2 / len(x) * (aim - x).T @ x, atol=1e-4)


def test_correcting_drift_brings_the_model_closer(tiny_model, tiny_batches):
    text = [random_tokens((8, 32), seed) for seed in range(8)]

    def run(share):
        quantized = quantize(tiny_model, text, SpQRConfig(bits=2, drift_correction=share))
        return divergence(tiny_model, quantized, random_tokens((8, 32), 70))

    assert run(0.5) < run(0.0)


def test_a_share_outside_0_to_1_is_refused():
    with pytest.raises(SpQRError, match="drift_correction must lie in"):
        SpQRConfig(drift_correction=1.5)
