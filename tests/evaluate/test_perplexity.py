from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from spqr_jax import DataError, SpQRConfig, forward, load, perplexity, quantize, save
from spqr_jax.models.decoder import random_decoder


@pytest.fixture(scope="module")
def windows(tiny_config):
    return np.random.default_rng(3).integers(0, tiny_config.vocab_size, (5, 40)).astype(np.int32)


def by_hand(model, windows):
    logits = np.asarray(forward(model, jnp.asarray(windows)), np.float64)[:, :-1]
    logits -= logits.max(-1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.take_along_axis(log_p, windows[:, 1:, None], -1)[..., 0].mean(1)


def test_it_is_exp_of_the_mean_loss(tiny_model, windows):
    losses = by_hand(tiny_model, windows)
    result = perplexity(tiny_model, windows)
    np.testing.assert_allclose(result.window_losses, losses, rtol=1e-5)
    assert result.perplexity == pytest.approx(np.exp(losses.mean()), rel=1e-5)
    assert result.stderr == pytest.approx(result.perplexity * losses.std(ddof=1) / np.sqrt(5), rel=1e-5)
    assert (result.tokens, result.windows) == (5 * 39, 5)


def test_batches_change_nothing(tiny_model, windows):
    one, three = (perplexity(tiny_model, windows, batch_size=n) for n in (1, 3))
    np.testing.assert_allclose(one.window_losses, three.window_losses, rtol=1e-5)


def test_windows_longer_than_a_chunk_of_the_head(tiny_config):
    model = random_decoder(dataclasses.replace(tiny_config, max_positions=2048), seed=0)
    windows = np.random.default_rng(0).integers(0, 256, (1, 1100)).astype(np.int32)
    np.testing.assert_allclose(perplexity(model, windows).window_losses, by_hand(model, windows), rtol=1e-5)


def test_saving_and_loading_changes_nothing(tiny_model, tiny_batches, windows, tmp_path):
    quantized = quantize(tiny_model, tiny_batches, SpQRConfig())
    save(tmp_path / "m", quantized)
    assert perplexity(load(tmp_path / "m"), windows).perplexity == perplexity(quantized, windows).perplexity


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (np.zeros((0, 8), np.int32), "expected token ids"),
        (np.zeros((2, 1), np.int32), "length >= 2"),
        (np.zeros((1, 200), np.int32), "longer than the model's context of 128"),
        (np.full((1, 8), 300, np.int32), "vocabulary has"),
    ],
)
def test_unusable_windows_say_why(tiny_model, bad, says):
    with pytest.raises(DataError, match=says):
        perplexity(tiny_model, bad)
