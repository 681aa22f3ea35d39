"""What a plan allows for text that it has not seen."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest
from support.problems import TINY, correlated_problem

from spqr_jax import SpQRConfig, accumulate_hessian, empty_hessian
from spqr_jax.planning.budget import make_plan
from spqr_jax.planning.curves import Candidate, WeightCurve, measure_curves
from spqr_jax.planning.record import curve_from_json, curve_to_json
from spqr_jax.planning.unseen import for_unseen_text
from spqr_jax.solver import quantize_weights
from spqr_jax.solver.trial import try_choices
from spqr_jax.stream.blocks import TreeSource

PRICES = 5


def curve(path, gap=None, loss=0.1):
    candidates = tuple(
        Candidate(bits, np.full(PRICES, loss / 4**bits), np.linspace(0.05, 0.0, PRICES)) for bits in (2, 3, 4)
    )
    return WeightCurve(path, (64, 64), 1.0, candidates, gap)


def test_the_loss_on_other_text_is_that_of_the_solved_weights():
    w, x = correlated_problem(16, 64)
    _, other = correlated_problem(16, 64, seed=7)
    seen, unseen = (accumulate_hessian(empty_hessian(64), inputs) for inputs in (x, other))
    config = SpQRConfig(damping=0.1)
    (trial,) = try_choices([w], seen, [np.ones(16)], [[(3, np.inf)]], config, held_out=unseen)
    solved = quantize_weights([w], seen, [dataclasses.replace(config, outlier_threshold=np.inf)])[0]
    miss = np.asarray(w, np.float64) - np.asarray(solved.dense, np.float64)
    expected = np.sum(miss @ np.asarray(unseen.matrix(), np.float64) * miss)
    np.testing.assert_allclose(trial.held_out, [expected], rtol=1e-3)
    assert trial.held_out[0] > 1.5 * trial.loss[0]  # these inputs have another correlation


def test_a_gap_falls_with_the_text_and_is_shared_by_a_role():
    curves = [curve("layers.0.down_proj", gap=0.6), curve("layers.0.up_proj"), curve("layers.1.down_proj", gap=1.0)]
    corrected = for_unseen_text([*curves, curve("layers.2.down_proj")], TINY, 2000, 16000)
    expected = math.exp(0.8 * (0.75 * 0.5**0.8 + 0.25 * 0.0625**0.8))
    assert [weight.factor for weight in corrected] == pytest.approx([expected, 1.0, expected, expected])
    little, much = (for_unseen_text(curves, TINY, 2000, tokens)[0].factor for tokens in (2000, 200_000))
    assert much < expected < little


def test_an_expert_is_calibrated_on_its_share_of_the_text():
    config = dataclasses.replace(TINY, num_experts=8, experts_per_token=2, expert_size=32)
    curves = [curve("layers.0.experts.3.up_proj", gap=1.0)]
    (corrected,) = for_unseen_text(curves, config, 2000, 16000)
    assert corrected.factor == pytest.approx(math.exp(0.75 * 0.5**0.8 + 0.25 * 0.25**0.8))


def test_what_costs_more_on_unseen_text_gets_more_bits():
    curves = [curve(f"layers.{i}.{name}") for i in range(4) for name in ("up_proj", "down_proj")]
    config = SpQRConfig(target_bits=3.5).resolved()
    corrected = [dataclasses.replace(c, factor=2.0 if "down" in c.path else 1.0) for c in curves]
    plan = make_plan(corrected, 3.5, config)
    bytes_of = {name: sum(c.nbytes for path, c in plan.choices.items() if name in path) for name in ("up", "down")}
    assert bytes_of["down"] > bytes_of["up"]
    assert plan.stored_bits == pytest.approx(3.5, abs=1e-3)
    even = make_plan(curves, 3.5, config)
    assert plan.loss > even.loss  # and the plan promises less


def test_curves_of_some_blocks_have_gaps_that_survive_the_journal(tiny_model, tiny_batches):
    curves = measure_curves(TreeSource(tiny_model), tiny_batches, SpQRConfig(target_bits=4.5).resolved())
    assert all(weight.gap is not None and weight.gap > 0 for weight in curves)  # both of two blocks are tried in halves
    assert curve_from_json(curve_to_json(curves[0])).gap == curves[0].gap
    (whole,) = [jnp.concatenate([jnp.asarray(batch) for batch in tiny_batches])]
    alone = measure_curves(TreeSource(tiny_model), [np.asarray(whole)], SpQRConfig(target_bits=4.5).resolved())
    assert all(weight.gap is None for weight in alone)  # one batch has no halves
