"""The output head by pieces of text and of the vocabulary, against the formulas on all logits at once."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.problems import TINY

from spqr_jax import SpQRConfig, quantize_weight
from spqr_jax.models import dense
from spqr_jax.models.decoder import logits
from spqr_jax.models.weights import random_decoder
from spqr_jax.stream import head

CONFIG = dataclasses.replace(TINY, vocab_size=300, logit_softcap=2.0)
OUTER = random_decoder(CONFIG, seed=1).outer
PACKED = dataclasses.replace(OUTER, lm_head=quantize_weight(OUTER.lm_head, None, SpQRConfig.rtn(3)))
UNPACKED = dataclasses.replace(OUTER, lm_head=PACKED.lm_head.to_dense())
RESIDUALS = [5 * jax.random.normal(jax.random.key(n), (2, 21, CONFIG.hidden_size)) for n in range(2)]
TARGETS = [jax.random.randint(jax.random.key(n), (2, 21), 0, 300) for n in range(2)]


def log_probabilities(outer, residual):
    scores = np.asarray(logits(CONFIG, outer, residual), np.float64)
    return scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))


@pytest.fixture
def small_pieces(monkeypatch):
    """8 positions and 96 tokens of a packed head's vocabulary at a time."""
    monkeypatch.setattr(dense, "PIECE_WEIGHTS", 100 * CONFIG.hidden_size)
    for name in ("_POSITIONS", "_POSITIONS_OF_TWO", "_POSITIONS_IN_TRAINING"):
        monkeypatch.setattr(head, name, 8)
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.parametrize("outer", [OUTER, PACKED], ids=["dense", "packed"])
def test_predictions(outer, small_pieces):
    whole = UNPACKED if outer is PACKED else OUTER
    assert len(dense.row_pieces([outer.lm_head])) == (4 if outer is PACKED else 1)
    for seen, residual, targets in zip(head.see(CONFIG, outer, RESIDUALS, TARGETS), RESIDUALS, TARGETS, strict=True):
        log_p = log_probabilities(whole, residual)
        expected = -np.take_along_axis(log_p, np.asarray(targets)[..., None], axis=-1)[..., 0]
        np.testing.assert_allclose(seen.loss, expected, rtol=1e-5)
        np.testing.assert_allclose(seen.top, np.exp(log_p).max(axis=-1), rtol=1e-5)
        np.testing.assert_array_equal(seen.likeliest, log_p.argmax(axis=-1))


def test_of_tokens_that_are_equally_likely_the_first_is_kept(small_pieces):
    outer = dataclasses.replace(PACKED, final_norm=jnp.zeros_like(PACKED.final_norm))
    (seen,) = head.see(CONFIG, outer, RESIDUALS[:1], TARGETS[:1])
    assert np.all(np.asarray(seen.likeliest) == 0)
    np.testing.assert_allclose(seen.loss, np.log(300), rtol=1e-6)


def test_numbers_that_are_not_finite_stay_so(small_pieces):
    residual = RESIDUALS[0].at[0, 3].set(jnp.nan)
    (seen,) = head.see(CONFIG, PACKED, [residual], TARGETS[:1])
    assert np.array_equal(np.isnan(seen.loss), np.isnan(residual[..., 0]))


@pytest.mark.parametrize("quantized", [UNPACKED, PACKED], ids=["dense", "packed"])
def test_divergences(quantized, small_pieces):
    pairs = [(residual, residual * 1.1) for residual in RESIDUALS]
    found = head.see_two((CONFIG, CONFIG), (OUTER, quantized), pairs, TARGETS)
    for (p_seen, q_seen, kl), (p_residual, q_residual) in zip(found, pairs, strict=True):
        log_p, log_q = log_probabilities(OUTER, p_residual), log_probabilities(UNPACKED, q_residual)
        np.testing.assert_allclose(kl, np.sum(np.exp(log_p) * (log_p - log_q), axis=-1), rtol=1e-3)
        np.testing.assert_array_equal(p_seen.likeliest, log_p.argmax(axis=-1))
        np.testing.assert_array_equal(q_seen.likeliest, log_q.argmax(axis=-1))


def test_gradients(small_pieces):
    """Against JAX's through all logits."""

    def loss(residual):
        log_p = jax.nn.log_softmax(logits(CONFIG, OUTER, residual))[:, :-1]
        return -jnp.sum(jnp.take_along_axis(log_p, TARGETS[0][:, 1:, None], axis=-1))

    def divergence(residual):
        log_p = jax.nn.log_softmax(logits(CONFIG, OUTER, RESIDUALS[1]))
        log_q = jax.nn.log_softmax(logits(CONFIG, OUTER, residual))
        return jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))

    by_loss, (value, by_divergence) = jax.jit(
        lambda residual: (jax.grad(loss)(residual), jax.value_and_grad(divergence)(residual))
    )(RESIDUALS[0])
    found = head.loss_gradient(CONFIG, OUTER, RESIDUALS[0], TARGETS[0])
    np.testing.assert_allclose(found, by_loss, atol=1e-5 * np.abs(by_loss).max())
    assert np.all(np.asarray(found[:, -1]) == 0)
    later = head.loss_gradient(CONFIG, OUTER, RESIDUALS[0], TARGETS[0], first=2)
    np.testing.assert_allclose(later[:, 2:], found[:, 2:], atol=1e-6 * np.abs(found).max())
    assert np.all(np.asarray(later[:, :2]) == 0)
    mean, found = head.divergence_gradient(CONFIG, OUTER, RESIDUALS[0], RESIDUALS[1])
    assert float(mean) == pytest.approx(float(value), rel=1e-5)
    np.testing.assert_allclose(found, by_divergence, atol=1e-5 * np.abs(by_divergence).max())
