"""A result that is no number is an error that says where it began, whatever computes it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spqr_jax import NotFiniteError, SpQRConfig, perplexity, quantize
from spqr_jax.evaluate.continuations import continuation_scores
from spqr_jax.evaluate.fidelity import compare
from spqr_jax.planning.budget import plan_budget
from spqr_jax.stream.blocks import TreeSource
from spqr_jax.stream.finite import not_finite
from spqr_jax.tune.config import TuneConfig
from spqr_jax.tune.objectives import tune


@pytest.fixture(scope="module")
def overflowing(tiny_model):
    """Weights that float16 holds, whose products it does not, from the second block on."""
    block = tiny_model.layers[1]
    block = block.replace({"up_proj": 1e3 * block.up_proj, "down_proj": 1e4 * block.down_proj})
    model = dataclasses.replace(tiny_model, layers=(tiny_model.layers[0], block))
    return jax.tree.map(lambda weight: weight.astype(jnp.float16), model)


@pytest.fixture(scope="module")
def windows(tiny_batches):
    return tiny_batches[0]


def test_perplexity_says_where_numbers_end(overflowing, windows):
    with pytest.raises(NotFiniteError, match=r"loss of window 0 .* from block 1 of 2 on; float16 .* --dtype bfloat16"):
        perplexity(overflowing, windows)


def test_comparing_says_which_model_it_is(tiny_model, overflowing, windows):
    with pytest.raises(NotFiniteError, match=r"the quantized model's loss of window 0"):
        compare(tiny_model, overflowing, windows)
    with pytest.raises(NotFiniteError, match=r"the dense model's loss of window 0"):
        compare(overflowing, tiny_model, windows)


def test_scores_of_continuations(overflowing):
    with pytest.raises(NotFiniteError, match=r"log-probability of request 0 .* from block 1"):
        continuation_scores(overflowing, [([1, 2, 3], [4, 5])])


def test_quantizing_names_the_first_weight_that_reads_them(overflowing, tiny_batches):
    config = SpQRConfig(bits=3, calibration_dtype="float32", head_bits=4)
    with pytest.raises(NotFiniteError, match=r"inputs of lm_head: .*float16"):
        quantize(overflowing, tiny_batches, config)


def test_planning_a_budget_names_the_block(overflowing, tiny_batches):
    with pytest.raises(NotFiniteError, match="activations after block 1 are not finite"):
        plan_budget(TreeSource(overflowing), tiny_batches, SpQRConfig(target_bits=3.5, bit_choices=(2, 3)))


@pytest.mark.parametrize("objective", ["blocks", "logits"])
def test_tuning_that_diverges(tiny_model, tiny_batches, objective):
    quantized = quantize(tiny_model, None, SpQRConfig.rtn(bits=4, group_size=16))
    config = TuneConfig(objective=objective, learning_rate=1e30)
    with pytest.raises(NotFiniteError, match="the tuning loss is not a number"):
        tune(quantized, TreeSource(tiny_model), tiny_batches, config)


def test_other_places_are_told_apart(tiny_model):
    tokens = np.array([[1, 2, 3]])
    outer = dataclasses.replace(tiny_model.outer, lm_head=tiny_model.outer.lm_head * np.float32(np.inf))
    message = str(not_finite("x", TreeSource(dataclasses.replace(tiny_model, outer=outer)), tokens))
    assert "the logits of the output head are not" in message
    assert "weights themselves" in message
    outer = dataclasses.replace(tiny_model.outer, embed_tokens=tiny_model.outer.embed_tokens * np.float32(np.inf))
    assert "the embedding" in str(not_finite("x", TreeSource(dataclasses.replace(tiny_model, outer=outer)), tokens))
