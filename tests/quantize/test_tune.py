"""Training what is continuous: it must help, and must touch nothing else."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.problems import correlated_problem, divergence

from spqr_jax import (
    DataError,
    SpQRArray,
    SpQRConfig,
    SpQRError,
    accumulate_hessian,
    empty_hessian,
    quantize,
    quantize_weight,
)
from spqr_jax.stream.blocks import TreeSource
from spqr_jax.tune.config import TuneConfig
from spqr_jax.tune.form import dense_weight, fixed_parts
from spqr_jax.tune.objectives import _orders, tune


@pytest.fixture(scope="module")
def quantized(tiny_model, tiny_batches):
    return quantize(tiny_model, tiny_batches, SpQRConfig(bits=2))


dense_of = jax.jit(dense_weight)


def at_zero(form):
    return jax.tree.map(np.zeros_like, form.start)


@pytest.mark.parametrize(
    "config",
    [SpQRConfig(), SpQRConfig.gptq(3, 24), SpQRConfig.gptq(4, None), SpQRConfig(order="identity", stats_group_size=24)],
    ids=["spqr", "no second level", "per row", "odd tiles"],
)
def test_the_trained_form_is_the_array(config):
    """With θ = 0 it dequantizes to the same matrix, whatever the padding."""
    w, x = correlated_problem(50, 100)
    array = quantize_weight(w, accumulate_hessian(empty_hessian(100), x), config)
    form = fixed_parts(array, entries=2048)
    np.testing.assert_allclose(dense_of(form, at_zero(form)), array.to_dense(), atol=1e-6)


def test_its_gradient_is_that_of_the_formula():
    w, x = correlated_problem(32, 64)
    form = fixed_parts(quantize_weight(w, accumulate_hessian(empty_hessian(64), x)), entries=1024)
    probe = np.random.default_rng(0).standard_normal((32, 64)).astype(np.float32)

    @jax.jit
    @jax.value_and_grad
    def value(theta):
        return jnp.sum(probe * dense_weight(form, theta))

    gradient = jax.tree.map(np.asarray, value(at_zero(form))[1])
    rng = np.random.default_rng(1)
    step = jax.tree.map(lambda g: (1e-2 * rng.standard_normal(g.shape)).astype(np.float32), gradient)
    ahead, behind = (value(jax.tree.map(lambda s, sign=sign: sign * s, step))[0] for sign in (1, -1))
    expected = sum(np.vdot(g, s) for g, s in zip(jax.tree.leaves(gradient), jax.tree.leaves(step), strict=True))
    assert float(ahead - behind) / 2 == pytest.approx(expected, rel=2e-2)


@pytest.mark.parametrize("objective", ["logits", "blocks"])
def test_tuning_brings_the_model_closer_and_changes_no_code(tiny_model, tiny_batches, quantized, objective):
    seen, rng = [], np.random.default_rng(3)
    text = [rng.integers(0, tiny_model.config.vocab_size, (4, 32)).astype(np.int32) for _ in range(32)]
    tuned = tune(
        quantized,
        TreeSource(tiny_model),
        text,
        TuneConfig(objective, epochs=2, learning_rate=5e-3),
        lambda event: seen.append(event),
    )
    fresh = jax.random.randint(jax.random.key(11), (4, 32), 0, tiny_model.config.vocab_size)
    assert divergence(tiny_model, tuned, fresh) < 0.95 * divergence(tiny_model, quantized, fresh)
    steps = [event for event in seen if event.phase == "tuning" and event.done]
    assert [event.done for event in steps] == list(range(1, (64 if objective == "logits" else 2) + 1))
    assert all(isinstance(event.detail, float) and event.total == len(steps) for event in steps)
    for before, after in zip(quantized.layers, tuned.layers, strict=True):
        for name in before:
            old, new = before[name], after[name]
            if not isinstance(old, SpQRArray):
                assert new.dtype == old.dtype
                continue
            new.validate()
            for leaf in ("codes", "scale_codes", "zero_codes", "outlier_cols", "outlier_row_ptr", "perm"):
                np.testing.assert_array_equal(getattr(old, leaf), getattr(new, leaf))
            assert new.nbytes == old.nbytes
            assert np.any(np.asarray(old.tile_stats) != np.asarray(new.tile_stats))


def test_models_without_outliers_or_second_level_are_tuned(tiny_model, tiny_batches):
    quantized = quantize(tiny_model, tiny_batches, SpQRConfig.gptq(3, 16))
    tuned = tune(quantized, TreeSource(tiny_model), tiny_batches, TuneConfig("logits", epochs=2))
    tokens = np.concatenate(tiny_batches)[:4]
    assert divergence(tiny_model, tuned, tokens) < divergence(tiny_model, quantized, tokens)


def test_padding_is_not_trained():
    """What is trained is what is kept: outlier entries that only pad a list have no say in the weight."""
    w, x = correlated_problem(50, 100)
    array = quantize_weight(w, accumulate_hessian(empty_hessian(100), x))
    form = fixed_parts(array, entries=2048)
    theta = jax.tree.map(lambda start: np.full_like(start, 0.05), form.start)
    values = {name: np.asarray(form.start[name]) + np.asarray(form.size[name]) * theta[name] for name in theta}
    kept = dataclasses.replace(
        array, tile_stats=values["stats"], outlier_values=values["outliers"][: array.outlier_values.shape[0]]
    )
    np.testing.assert_allclose(dense_of(form, theta), kept.to_dense(), atol=1e-5)


@pytest.mark.parametrize("change", [{"objective": "magic"}, {"epochs": 0}, {"learning_rate": 0.0}])
def test_bad_settings_are_refused(change):
    with pytest.raises(SpQRError, match=next(iter(change))):
        TuneConfig(**change)


def test_no_text_is_refused(tiny_model, quantized):
    with pytest.raises(DataError, match="needs calibration batches"):
        tune(quantized, TreeSource(tiny_model), [])


def test_a_single_step_trains_at_the_full_rate():
    assert _orders(TuneConfig(epochs=1, learning_rate=0.25), batches=1) == [(0.25, 0)]
