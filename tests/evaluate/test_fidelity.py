"""KL divergence and the other token statistics, against float64 NumPy."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spqr_jax import DataError, ModelError, SpQRConfig, forward, perplexity, quantize
from spqr_jax.evaluate import fidelity
from spqr_jax.evaluate.fidelity import DenseStreams, TokenStatistics, compare, summarize
from spqr_jax.models.decoder import random_decoder


@pytest.fixture(scope="module")
def windows(tiny_config):
    return np.random.default_rng(3).integers(0, tiny_config.vocab_size, (5, 40)).astype(np.int32)


@pytest.fixture(scope="module")
def confident_model(tiny_config):
    """Its logits spread: a random model's are all alike, and nothing could be told from their order."""
    model = random_decoder(dataclasses.replace(tiny_config, tied_head=True), seed=2)
    return jax.tree.map(lambda leaf: leaf * 3, model)


@pytest.fixture(scope="module")
def small(confident_model):
    return quantize(confident_model, None, SpQRConfig.rtn(2))


def by_hand(dense, quantized, windows):
    """(statistics, perplexities) in float64 from the whole logits of both."""

    def log_probabilities(model):
        scores = np.asarray(forward(model, jnp.asarray(windows)), np.float64)[:, :-1]
        scores -= scores.max(-1, keepdims=True)
        return scores - np.log(np.exp(scores).sum(-1, keepdims=True))

    log_p, log_q = log_probabilities(dense), log_probabilities(quantized)
    targets = windows[:, 1:, None]
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    p, q = (np.take_along_axis(log, targets, -1)[..., 0] for log in (log_p, log_q))
    top_p, top_q = log_p.argmax(-1), log_q.argmax(-1)
    return kl, p, q, top_p, top_q, targets[..., 0], np.exp(log_p.max(-1))


def test_every_figure_is_that_of_float64(confident_model, small, windows):
    kl, log_p, log_q, top_p, top_q, targets, highest = by_hand(confident_model, small, windows)
    found = compare(confident_model, small, windows)
    assert 0.05 < kl.mean() < 20  # it is a comparison of models that differ
    assert 0.02 < (top_p == top_q).mean() < 0.98
    assert found.kl_mean == pytest.approx(kl.mean(), rel=1e-4)
    assert found.kl_stderr == pytest.approx(kl.mean(1).std(ddof=1) / 5**0.5, rel=1e-3)
    assert found.kl_max == pytest.approx(kl.max(), rel=1e-4)
    assert list(found.kl_percentiles.values()) == pytest.approx(
        np.percentile(kl, [50, 90, 95, 99, 99.9]).tolist(), rel=1e-3
    )
    assert found.same_top == (top_p == top_q).mean()
    sure = highest >= 0.5
    assert 0 < found.sure == sure.mean() < 1
    assert found.same_top_sure == pytest.approx((top_p == top_q)[sure].mean())
    delta = np.exp(log_q) - np.exp(log_p)
    assert found.delta_p_mean == pytest.approx(delta.mean(), rel=1e-3)
    assert found.delta_p_rms == pytest.approx(np.sqrt((delta**2).mean()), rel=1e-4)
    assert found.delta_p_percentiles[99.0] == pytest.approx(np.percentile(delta, 99), rel=1e-3)
    right, wrong = top_p == targets, top_p != targets
    assert found.lost == (right & (top_q != targets)).mean()
    assert found.gained == (wrong & (top_q == targets)).mean()
    assert found.flips == found.lost + found.gained
    increase = log_p.mean(1) - log_q.mean(1)
    assert found.loss_increase == pytest.approx(increase.mean(), rel=1e-4)
    assert found.loss_increase_stderr == pytest.approx(increase.std(ddof=1) / 5**0.5, rel=1e-3)
    assert found.perplexity_ratio == pytest.approx(np.exp(increase.mean()), rel=1e-4)
    assert (found.tokens, found.windows) == (5 * 39, 5)


def test_perplexities_are_those_of_perplexity(confident_model, small, windows):
    found = compare(confident_model, small, windows, batch_size=2)
    assert found.dense_perplexity == pytest.approx(perplexity(confident_model, windows).perplexity, rel=1e-5)
    assert found.perplexity == pytest.approx(perplexity(small, windows).perplexity, rel=1e-5)


def test_a_model_is_no_distance_from_itself(confident_model, windows):
    found = compare(confident_model, confident_model, windows)
    assert (found.same_top, found.flips, found.delta_p_rms, found.loss_increase) == (1, 0, 0, 0)
    assert found.kl_max < 1e-7  # an exponential's rounding


def test_a_small_divergence_is_not_lost_in_rounding(confident_model, windows):
    """Weights off by 1e-4: the divergence, some 1e-7, is below what float32 sums of p ln(p/q) can resolve."""
    near = jax.tree.map(lambda leaf: leaf * jnp.asarray(1 + 1e-4, leaf.dtype), confident_model)
    found = compare(confident_model, near, windows)
    kl = by_hand(confident_model, near, windows)[0]
    assert 0 < kl.mean() < 1e-5
    assert found.kl_mean == pytest.approx(kl.mean(), rel=0.2)


def test_more_positions_than_the_head_takes_at_once(tiny_config, windows):
    long = dataclasses.replace(tiny_config, max_positions=512)
    a, b = random_decoder(long, seed=0), random_decoder(long, seed=1)
    text = np.random.default_rng(0).integers(0, 256, (2, 300)).astype(np.int32)
    kl = by_hand(a, b, text)[0]
    assert compare(a, b, text).kl_mean == pytest.approx(kl.mean(), rel=1e-3)


@pytest.mark.parametrize("most", [0, 2**20])
def test_kept_streams_change_no_figure(confident_model, small, windows, most, monkeypatch):
    passes = []
    original = fidelity.final_residuals
    monkeypatch.setattr(fidelity, "final_residuals", lambda *given: passes.append(given[0]) or original(*given))
    expected = dataclasses.replace(compare(confident_model, small, windows), seconds=0.0).to_json()
    streams, shorter = DenseStreams(most), windows.reshape(10, 20)
    compare(confident_model, small, shorter, streams=streams)  # the same tokens, but other windows
    passes.clear()
    for _ in range(2):
        found = compare(confident_model, small, windows, streams=streams)
        assert dataclasses.replace(found, seconds=0.0).to_json() == expected
    assert len(passes) == (3 if most else 4)


def test_it_can_be_written_as_json(confident_model, small, windows):
    values = json.loads(json.dumps(compare(confident_model, small, windows).to_json()))
    assert values["kl_percentiles"]["99.9"] > values["kl_percentiles"]["50"]
    assert len(values["window_kl"]) == 5
    assert values["flips"] == values["lost"] + values["gained"]


def test_other_vocabularies_and_broken_models_are_refused(confident_model, tiny_config, windows):
    other = random_decoder(dataclasses.replace(tiny_config, vocab_size=300), seed=0)
    with pytest.raises(ModelError, match="256 and 300 tokens"):
        compare(confident_model, other, windows)
    with pytest.raises(DataError, match="longer than the model's context"):
        compare(confident_model, confident_model, np.zeros((1, 200), np.int32))
    broken = TokenStatistics(*(np.full((1, 2), np.nan),) * 4, *(np.zeros((1, 2), bool),) * 3)
    with pytest.raises(DataError, match="not finite"):
        summarize(broken)
