"""Spending a budget of bits: the gradients, the trials, the plan and keeping to it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.problems import TINY, correlated_problem, divergence, random_tokens

from spqr_jax import LayerRule, SpQRArray, SpQRConfig, SpQRError, accumulate_hessian, empty_hessian, quantize
from spqr_jax.layout import predicted_bytes
from spqr_jax.methods import quantize_weights
from spqr_jax.models import decoder, experts
from spqr_jax.models.attention import positions
from spqr_jax.models.decoder import random_decoder
from spqr_jax.models.products import plain_linear
from spqr_jax.planning.budget import make_plan, plan_budget
from spqr_jax.planning.curves import Candidate, WeightCurve
from spqr_jax.planning.ledger import Ledger
from spqr_jax.planning.sensitivity import block_sensitivities
from spqr_jax.solver.trial import try_choices
from spqr_jax.stream.blocks import TreeSource
from spqr_jax.stream.stages import rounded_linear
from spqr_jax.stream.windows import beginnings


@pytest.fixture(scope="module")
def wide_model(tiny_config):
    """Large enough that a target between two widths can be met closely."""
    config = dataclasses.replace(tiny_config, hidden_size=128, intermediate_size=128, num_layers=3, head_dim=32)
    return random_decoder(config, seed=4)


def test_a_plan_reads_the_beginnings_of_many_windows():
    windows = np.arange(20 * 700).reshape(20, 700)
    batches = beginnings([windows[:3], windows[3:]], 4096, 512)
    np.testing.assert_array_equal(np.concatenate(batches), windows[:8, :512])
    few = beginnings([windows[:2, :50], windows[2:4]], 4096, 512)  # too few for 4096 tokens: all of them, whole
    assert [batch.shape for batch in few] == [(2, 50), (1, 700), (1, 700)]


def test_a_plan_with_rounded_products_is_nearly_the_exact_one(tiny_model, tiny_batches):
    """Rounding is noise of less than a percent in a product; nothing that a plan needs moves by more than a few."""
    measured = []
    for linear in (plain_linear, rounded_linear):
        blocks = {}
        visit = lambda block, blocks=blocks: blocks.update({block.index: block})  # noqa: E731
        block_sensitivities(TreeSource(tiny_model), tiny_batches, visit, linear=linear)
        measured.append(blocks[0])
    exact, rounded = measured
    for name, fisher in exact.fisher.items():
        np.testing.assert_allclose(rounded.fisher[name].mean(), fisher.mean(), rtol=0.05)
    for (_, ours), (_, theirs) in zip(rounded.hessians, exact.hessians, strict=True):
        assert 0 < float(jnp.linalg.norm(ours.gram - theirs.gram) / jnp.linalg.norm(theirs.gram)) < 0.01


def arrays_of(params):
    return [x for x in jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, SpQRArray)) if isinstance(x, SpQRArray)]


def stored_bits(params):
    arrays = arrays_of(params)
    return 8 * sum(a.stored_bytes for a in arrays) / sum(a.size for a in arrays)


def test_the_sensitivity_is_the_gradient_of_the_loss(tiny_model, tiny_batches):
    """Σ_t (∂L/∂y_t)² by JAX through the whole model at once, for a weight of the first block."""
    tokens = jnp.asarray(tiny_batches[0])
    blocks = {}
    told = []
    block_sensitivities(
        TreeSource(tiny_model), [tiny_batches[0]], lambda block: blocks.update({block.index: block}), told.append
    )
    assert [(event.phase, event.done, event.total, event.detail) for event in told] == [
        ("measuring", 0, 4, None),
        ("measuring", 1, 4, 0),
        ("measuring", 2, 4, 1),
        ("measuring", 3, 4, 1),
        ("measuring", 4, 4, 0),
    ]

    def loss(bias):
        # ∂L/∂y of v_proj is what adding to its output does; its output is added to by its input's bias
        config = tiny_model.config
        where = positions(config, tokens.shape[1], jnp.zeros(len(tokens), jnp.int32), jnp.int32(0))
        state = decoder.State(decoder.embed(config, tiny_model.outer, tokens, where))
        for index, block in enumerate(tiny_model.layers):

            def linear(name, w, x, index=index):
                y = decoder.plain_linear(name, w, x)
                return y + bias if (index, name) == (0, "v_proj") else y

            state = decoder.run_block(config, block, state, where, linear)
        scores = jax.nn.log_softmax(decoder.logits(config, tiny_model.outer, state.residual))
        lost = -jnp.take_along_axis(scores[:, :-1], tokens[:, 1:, None], axis=-1)
        return jnp.sum(lost[:, first:])  # early predictions do not count

    first = (tokens.shape[1] - 1) // 2
    gradient = jax.jit(jax.grad(loss))(np.zeros((*tokens.shape, 32), np.float32))
    counted = len(tokens) * (tokens.shape[1] - 1 - first)
    expected = np.sum(np.square(np.asarray(gradient, np.float64)), axis=(0, 1)) / counted
    assert [float(hessian.tokens) for _, hessian in blocks[0].hessians] == 4 * [tokens.size]
    np.testing.assert_allclose(blocks[0].fisher["v_proj"], expected, rtol=1e-3)
    assert [names for names, _ in blocks[1].hessians] == [
        ("q_proj", "k_proj", "v_proj"),
        ("o_proj",),
        ("gate_proj", "up_proj"),
        ("down_proj",),
    ]


def test_a_plan_reads_no_sequence_of_one_token(tiny_model, tiny_batches):
    single = np.ones((3, 1), np.int32)
    measured = []
    for batches in (tiny_batches[:1], [single, tiny_batches[0]]):
        blocks = []
        block_sensitivities(TreeSource(tiny_model), batches, blocks.append)
        measured.append([(block.fisher, [hessian.gram for _, hessian in block.hessians]) for block in blocks])
    jax.tree.map(np.testing.assert_array_equal, *measured)
    with pytest.raises(SpQRError, match=r"two tokens and more, got batches \[\(3, 1\)\]: join short texts"):
        quantize(tiny_model, [single], SpQRConfig(target_bits=4.3))


def test_experts_share_their_mean_sensitivity():
    """Against gradients of a loss in which every expert reads all tokens, and those sent elsewhere count nothing."""
    config = dataclasses.replace(TINY, num_layers=1, num_experts=3, experts_per_token=2, expert_size=32)
    model, tokens = random_decoder(config, seed=1), random_tokens((2, 16), seed=5)
    block, outer = model.layers[0], model.outer
    where = positions(config, 16, np.zeros(2, np.int32), np.int32(0))

    def loss(added):
        state = decoder.State(decoder.embed(config, outer, tokens, where))
        for stage in decoder.STAGES[:2]:
            state = stage(config, block, state, where, decoder.plain_linear)
        x = decoder.norm(config, block, "mlp_norm", state.residual)
        sent, total = experts.route(config, block.router, x), state.residual
        for expert in range(3):
            gate, up, down = (block[f"experts.{expert}.{name}_proj"] for name in ("gate", "up", "down"))
            share = jnp.sum(jnp.where(sent.chosen == expert, sent.shares, 0.0), axis=-1, keepdims=True)
            total += share * ((jax.nn.silu(x @ gate.T) * (x @ up.T + added[expert])) @ down.T)
        scores = jax.nn.log_softmax(decoder.logits(config, outer, total))
        lost = -jnp.take_along_axis(scores[:, :-1], tokens[:, 1:, None], axis=-1)
        return jnp.sum(lost[:, 7:])

    gradient = jax.jit(jax.grad(loss))(np.zeros((3, 2, 16, 32), np.float32))
    blocks = []
    block_sensitivities(TreeSource(model), [tokens], blocks.append)
    (sensitivity,) = blocks
    for expert in range(3):
        np.testing.assert_allclose(
            sensitivity.fisher[f"experts.{expert}.up_proj"],
            np.sum(np.square(gradient)) / (gradient.size / 16 * 8),  # 8 of 16 positions count
            rtol=1e-3,
        )
    reading = {names[0]: hessian for names, hessian in sensitivity.hessians}
    assert len(reading) == 2 + 2 * 3
    assert reading["experts.0.down_proj"] is reading["experts.2.down_proj"]
    assert float(reading["experts.1.gate_proj"].tokens) == 2 * tokens.size


def test_a_trial_of_all_rows_is_what_solving_gives():
    w, x = correlated_problem(16, 64)
    hessian = accumulate_hessian(empty_hessian(64), x)
    config = SpQRConfig(damping=0.1)
    (probe,) = try_choices([w], hessian, [np.ones(16)], [[(3, np.inf)]], config)
    (trial,) = try_choices([w], hessian, [np.ones(16)], [[(3, 0.2 * probe.threshold_scale), (4, np.inf)]], config)
    for index, own in enumerate((config, dataclasses.replace(config, bits=4, outlier_threshold=np.inf))):
        solved = quantize_weights([w], hessian, [own])[0]
        miss = np.asarray(w, np.float64) - np.asarray(solved.dense, np.float64)
        loss = np.sum(miss @ np.asarray(hessian.matrix(), np.float64) * miss)
        np.testing.assert_allclose(trial.loss[index], loss, rtol=1e-3)
        assert trial.outliers[index] == pytest.approx(solved.array.nnz / w.size, abs=1e-6)


@pytest.mark.parametrize(
    "config", [SpQRConfig(), SpQRConfig.gptq(4, 64), SpQRConfig(bits=2, group_size=32, order="identity")]
)
def test_predicted_bytes_are_the_bytes(config):
    w, x = correlated_problem(50, 100)
    array = quantize_weights([w], accumulate_hessian(empty_hessian(100), x), [config])[0].array
    predicted = predicted_bytes(
        array.shape,
        bits=config.bits,
        group_size=config.group_size,
        stats_group_size=config.stats_group_size,
        stats_bits=config.stats_bits if config.quantized_stats else None,
        nnz=max(array.nnz, 1),
        permuted=config.order == "activation",
    )
    assert predicted == array.stored_bytes


@pytest.mark.parametrize("target", [3.9, 4.6, 5.2])
def test_the_target_is_met(wide_model, tiny_batches, target):
    quantized = quantize(wide_model, tiny_batches, SpQRConfig(target_bits=target))
    assert abs(stored_bits(quantized) - target) <= 0.02
    for array in arrays_of(quantized):
        array.validate()


def test_one_width_under_a_target(wide_model, tiny_batches):
    quantized = quantize(wide_model, tiny_batches, SpQRConfig(target_bits=4.4, bit_choices=(3,)))
    assert {array.bits for array in arrays_of(quantized)} == {3}
    assert abs(stored_bits(quantized) - 4.4) <= 0.02


def test_rules_hold_under_a_target(wide_model, tiny_batches):
    rules = (LayerRule("k_proj", skip=True), LayerRule("v_proj", bits=4))
    quantized = quantize(wide_model, tiny_batches, SpQRConfig(target_bits=3.9, rules=rules))
    assert all(not isinstance(block.k_proj, SpQRArray) for block in quantized.layers)
    assert all(block.v_proj.bits == 4 for block in quantized.layers)
    assert abs(stored_bits(quantized) - 3.9) <= 0.02


def test_a_plan_can_be_kept_and_repeated(wide_model, tiny_batches):
    """Its rules alone, without measuring again, come to nearly the same model."""
    config = SpQRConfig(target_bits=4.2)
    plan = plan_budget(TreeSource(wide_model), tiny_batches, config)
    again = SpQRConfig.from_json(plan.config(config).to_json())
    assert again == plan.config(config)
    assert abs(plan.stored_bits - 4.2) < 0.02
    quantized = quantize(wide_model, tiny_batches, again)
    widths = {path: choice.bits for path, choice in plan.choices.items()}
    assert {f"layers.{i}.up_proj": b.up_proj.bits for i, b in enumerate(quantized.layers)}.items() <= widths.items()


def test_a_measured_plan_beats_one_width_at_equal_bits(wide_model, tiny_batches):
    """One layer's output hardly matters: a plan notices, equal widths do not."""
    layers = list(wide_model.layers)
    layers[1] = layers[1].replace({name: layers[1][name] * 0.01 for name in ("o_proj", "down_proj")})
    model = dataclasses.replace(wide_model, layers=tuple(layers))

    def run(config):
        return divergence(model, quantize(model, tiny_batches, config), random_tokens((4, 32), 1))

    assert run(SpQRConfig(target_bits=4.2)) < run(SpQRConfig(target_bits=4.2, bit_choices=(3,)))


@pytest.mark.parametrize("target", [2.05, 15.0])
def test_a_target_out_of_reach_says_what_is_within(wide_model, tiny_batches, target):
    with pytest.raises(SpQRError, match="out of reach: with these settings this model takes"):
        quantize(wide_model, tiny_batches, SpQRConfig(target_bits=target))


def curve(path, slope, size=(64, 64)):
    losses = [np.full(5, slope * 4.0**-bits) for bits in (2, 3, 4)]
    shares = np.geomspace(0.05, 1e-4, 5)
    return WeightCurve(
        path, size, 1.0, tuple(Candidate(b, loss, shares) for b, loss in zip((2, 3, 4), losses, strict=True))
    )


def test_bits_go_where_they_save_most():
    plan = make_plan([curve("dear", 100.0), curve("cheap", 0.01)], 4.8, SpQRConfig())
    assert plan.choices["dear"].bits > plan.choices["cheap"].bits


def test_the_ledger_makes_up_for_what_was_overspent():
    plan = make_plan([curve(f"layers.{i}.a", 1.0) for i in range(4)], 4.6, SpQRConfig())
    ledger = Ledger(plan)
    assert ledger.factor() == pytest.approx(1.0, rel=0.2)
    w, x = correlated_problem(64, 64)
    hessian = accumulate_hessian(empty_hessian(64), x)
    heavy = quantize_weights([w], hessian, [SpQRConfig(bits=plan.choices["layers.0.a"].bits, outlier_threshold=1e-3)])[
        0
    ]
    ledger.spend("layers.0.a", heavy.array)
    assert ledger.factor() > 2
