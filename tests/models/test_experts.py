"""MLPs of experts: routing, both ways to run them, and their Hessians."""

from __future__ import annotations

import dataclasses
import importlib
import json
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.command import spqr
from support.events import LayerReports
from support.problems import TINY, divergence

from spqr_jax import SpQRArray, SpQRConfig, quantize, save
from spqr_jax.methods import quantize_weights
from spqr_jax.models import experts
from spqr_jax.models.config import BlockKind
from spqr_jax.models.decoder import norm
from spqr_jax.models.products import plain_linear
from spqr_jax.models.weights import random_decoder
from spqr_jax.stream import stages
from spqr_jax.stream.activations import Activations
from spqr_jax.stream.blocks import TreeSource
from spqr_jax.stream.stages import stage_groups
from spqr_jax.tune.config import TuneConfig
from spqr_jax.tune.objectives import tune

SPARSE = dataclasses.replace(TINY, num_experts=5, experts_per_token=2, expert_size=32)
KIND = BlockKind(sparse=True)


@pytest.fixture(scope="module")
def model():
    return random_decoder(SPARSE, seed=4)


@jax.jit
def by_halves(block, x):
    """As calibration runs experts: stage by stage."""
    return experts.leave(SPARSE, block, *experts.enter(SPARSE, block, x, plain_linear), plain_linear)


def by_zeros(block, x):
    """The formula, every expert over all tokens."""
    sent = experts.route(SPARSE, block.router, x)
    total = jnp.zeros_like(x)
    for expert in range(5):
        gate, up, down = (block[f"experts.{expert}.{name}_proj"] for name in ("gate", "up", "down"))
        share = jnp.sum(jnp.where(sent.chosen == expert, sent.shares, 0.0), axis=-1, keepdims=True)
        total += share * ((jax.nn.silu(x @ gate.T) * (x @ up.T)) @ down.T)
    return total


apply = jax.jit(experts.apply, static_argnums=0)
route = jax.jit(experts.route, static_argnums=0)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def by_hand(block, x):
    x = np.asarray(x, np.float64)
    out = np.zeros_like(x)
    for place in np.ndindex(x.shape[:-1]):
        scores = np.asarray(block.router, np.float64) @ x[place]
        shares = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
        chosen = np.argsort(-shares)[:2]
        for expert in chosen:
            gate, up, down = (
                np.asarray(block[f"experts.{expert}.{name}_proj"], np.float64) for name in ("gate", "up", "down")
            )
            inner = gate @ x[place]
            inner = inner / (1 + np.exp(-inner)) * (up @ x[place])
            out[place] += shares[expert] / shares[chosen].sum() * (down @ inner)
    return out


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (2, 100)])
def test_both_ways_give_the_formula(model, shape):
    block, x = model.layers[0], normal(1, *shape, 64)
    want = by_hand(block, x)
    np.testing.assert_allclose(apply(SPARSE, block, x), want, atol=1e-5)
    np.testing.assert_allclose(by_halves(block, x), want, atol=1e-5)


def test_shares_may_be_left_as_they_are(model):
    config, x = dataclasses.replace(SPARSE, normalize_experts=False), np.ones((1, 3, 64), np.float32)
    sent = route(config, model.layers[0].router, x)
    assert np.all(np.sum(np.asarray(sent.shares), axis=-1) < 0.999)


@pytest.mark.parametrize("run", [partial(experts.apply, SPARSE), by_halves])
def test_gradients_are_those_of_the_formula(model, run):
    """By the input, and by every weight, the router's included."""
    block, x, probe = model.layers[0], normal(2, 1, 40, 64), normal(3, 1, 40, 64)
    got, want = (
        jax.jit(jax.grad(lambda block, x, way=way: jnp.vdot(probe, way(block, x)), argnums=(0, 1)))(block, x)
        for way in (run, by_zeros)
    )
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), got, want)
    assert np.abs(got[1]).max() > 0.1
    assert np.abs(got[0]["experts.2.down_proj"]).max() > 0.01


def test_a_gradient_by_the_input_alone_computes_none_by_weights(model):
    """One loop for each of two products, forwards and backwards."""
    block, x = model.layers[0], normal(2, 1, 40, 64)
    by_input = jax.make_jaxpr(jax.grad(lambda x: jnp.sum(experts.apply(SPARSE, block, x))))(x)
    by_both = jax.make_jaxpr(jax.grad(lambda block, x: jnp.sum(experts.apply(SPARSE, block, x))))(block, x)
    loops = [str(program).count("= while[") for program in (by_input, by_both)]
    assert loops == [2 * 2, 2 * 2 + 2 * 5]


def test_an_expert_that_is_not_needed_multiplies_nothing(model):
    """One token is sent to two of five experts; the others' weights may hold anything."""
    block, x = model.layers[0], normal(1, 1, 1, 64)
    sent = set(np.ravel(route(SPARSE, block.router, x).chosen).tolist())
    poison = {n: np.full_like(w, np.nan) for n, w in block.items() if n[:8] == "experts." and int(n[8]) not in sent}
    assert len(poison) == 9
    np.testing.assert_array_equal(apply(SPARSE, block.replace(poison), x), apply(SPARSE, block, x))


@pytest.fixture(scope="module")
def before_mlp(model, tiny_batches):
    activations = Activations(SPARSE, model.outer, tiny_batches)
    for stage in range(2):
        activations.advance(stage, model.layers[0])
    return activations


def inputs_by_hand(block, activations):
    """What each expert's gate and up, and its down read: two lists of [tokens, in]."""
    entering, inner = [[] for _ in range(5)], [[] for _ in range(5)]
    for state, _ in activations.chunks():
        x = jax.jit(norm, static_argnums=(0, 2))(SPARSE, block, "mlp_norm", state.residual).reshape(-1, 64)
        chosen = np.asarray(route(SPARSE, block.router, x).chosen)
        for expert in range(5):
            rows = np.asarray(x, np.float64)[np.any(chosen == expert, axis=-1)]
            gate, up = (rows @ np.asarray(block[f"experts.{expert}.{n}_proj"], np.float64).T for n in ("gate", "up"))
            entering[expert].append(rows)
            inner[expert].append(gate / (1 + np.exp(-gate)) * up)
    return [list(map(np.concatenate, each)) for each in (entering, inner)]


def test_each_expert_has_the_hessian_of_its_own_tokens(model, before_mlp):
    block, activations = model.layers[0], before_mlp.copy()
    entering, inner = inputs_by_hand(block, activations)
    assert stage_groups(SPARSE, KIND, 2)[3] == (("experts.3.gate_proj", "experts.3.up_proj"), 64)
    assert stage_groups(SPARSE, KIND, 3)[3] == (("experts.3.down_proj",), 32)
    for stage, inputs in ((2, entering), (3, inner)):
        hessians = activations.hessians(stage, block)
        assert [float(hessian.tokens) for hessian in hessians] == [len(x) for x in inputs]
        for hessian, x in zip(hessians, inputs, strict=True):
            np.testing.assert_allclose(hessian.matrix(), 2 / max(len(x), 1) * x.T @ x, rtol=1e-4, atol=1e-5)
        activations.advance(stage, block)


def test_a_gram_matrix_is_the_same_whichever_experts_are_summed_with_it(model, before_mlp, monkeypatch):
    """Bit for bit: with all experts at once, or two at a time where the Hessians of all would take too much memory."""
    whole = before_mlp.hessians(2, model.layers[0])
    parts = partial(stages.stage_parts, most_bytes=2 * 4 * 64**2)
    assert [part.experts.tolist() for part in parts(SPARSE, KIND, 2)] == [[0, 1], [2, 3], [4, stages.NO_EXPERT]]
    monkeypatch.setattr(before_mlp, "_hessian_bytes", parts.keywords["most_bytes"])
    for got, want in zip(before_mlp.hessians(2, model.layers[0]), whole, strict=True):
        np.testing.assert_array_equal(got.gram, want.gram)
        np.testing.assert_array_equal(got.tokens, want.tokens)


def test_a_part_has_an_expert_at_least():
    assert [len(part.groups) for part in stages.stage_parts(SPARSE, KIND, 3, most_bytes=1)] == [1] * 5
    (dense,) = stages.stage_parts(SPARSE, KIND, 0, most_bytes=1)
    assert dense.groups == stage_groups(SPARSE, KIND, 0)


def test_drift_of_an_expert_counts_what_the_dense_model_sent_elsewhere_as_zeros(model, before_mlp):
    """The router of the drifted block sends tokens to other experts, and none to the last."""
    original, activations = model.layers[0], before_mlp.copy()
    drifted = original.replace({"router": np.array(original.router)[[1, 2, 0, 3, 4]]})
    away = np.array(drifted.router)
    away[4] = -10 * np.sign(np.sum(away[:4], axis=0))
    drifted = drifted.replace({"router": away})
    calibrated = list(activations.calibrate(2, drifted, before_mlp, original))
    want, tokens = np.zeros((5, 64, 64)), np.zeros(5)
    for state, _ in activations.chunks():
        x = jax.jit(norm, static_argnums=(0, 2))(SPARSE, original, "mlp_norm", state.residual).reshape(-1, 64)
        here, there = (np.asarray(route(SPARSE, block.router, x).chosen) for block in (drifted, original))
        for expert in range(5):
            read, aim = (
                np.any(chosen == expert, axis=-1)[:, None] * np.asarray(x, np.float64) for chosen in (here, there)
            )
            want[expert] += (aim - read).T @ read
            tokens[expert] += np.sum(here == expert)
    for expert, (_, hessian, drift) in enumerate(calibrated):
        assert float(hessian.tokens) == tokens[expert]
        np.testing.assert_allclose(drift, 2 / max(tokens[expert], 1) * want[expert], rtol=1e-4, atol=1e-4)
    assert np.abs(want).max() > 1


def test_two_runs_give_the_same_bytes(model, tiny_batches):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        first, second = (quantize(model, tiny_batches, SpQRConfig(bits=3)) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_an_expert_that_no_text_reaches_is_rounded_with_a_warning(model, tiny_batches):
    """Its router row points away from every token."""
    many = [np.concatenate(tiny_batches)] * 4
    block = model.layers[0]
    away = np.array(block.router)
    away[1] = -100.0 * np.abs(away[1])
    outer = dataclasses.replace(model.outer, embed_tokens=np.abs(model.outer.embed_tokens) + np.float32(0.1))
    gain, nothing = np.ones(64, np.float32), np.zeros(block.o_proj.shape, np.float32)
    first = block.replace({"router": away, "attention_norm": gain, "o_proj": nothing})
    shunned = dataclasses.replace(model, outer=outer, layers=(first, model.layers[1]))
    told = LayerReports()
    with pytest.warns(UserWarning, match=r"layers.0: these experts see few calibration tokens .* 1 \(0\)"):
        quantized = quantize(shunned, many, SpQRConfig(bits=4, outlier_threshold=0.5), events=told)
    reports = {layer.path: layer.stats for layer in told.layers}
    starved, reached = reports["layers.0.experts.1.up_proj"], reports["layers.0.experts.0.up_proj"]
    assert (starved.tokens, starved.damping) == (0, pytest.approx(64 * reached.damping))
    tokens = np.concatenate(many).size
    assert reports["layers.0.q_proj"].tokens == tokens
    assert sum(reports[f"layers.0.experts.{expert}.down_proj"].tokens for expert in range(5)) == 2 * tokens
    for name in ("gate_proj", "up_proj", "down_proj"):
        weight, array = block[f"experts.1.{name}"], quantized.layers[0][f"experts.1.{name}"]
        assert isinstance(array, SpQRArray)
        step = np.max(np.abs(jax.jit(SpQRArray.statistics)(array)[0]))
        assert np.max(np.abs(np.asarray(array.to_dense()) - np.asarray(weight))) <= step


def test_a_router_stays_dense_and_a_budget_is_kept(model, tiny_batches):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        quantized = quantize(model, tiny_batches, SpQRConfig(target_bits=5.0))
    kinds = {name: isinstance(w, SpQRArray) for name, w in quantized.layers[0].items()}
    assert not kinds["router"]
    assert kinds["experts.4.down_proj"]
    assert sum(kinds.values()) == 4 + 5 * 3
    arrays = [w for block in quantized.layers for w in block.values() if isinstance(w, SpQRArray)]
    assert 8 * sum(a.stored_bytes for a in arrays) / sum(a.size for a in arrays) == pytest.approx(5.0, abs=0.25)
    same = {a.bits for name in (f"experts.{i}.down_proj" for i in range(5)) for a in [quantized.layers[0][name]]}
    assert len(same) == 1


compiled: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: compiled.append(event) if event.endswith("/backend_compile_duration") else None
)


@pytest.fixture
def compiled_by_solving(monkeypatch):
    """Grows by a number for each call of the solver: the programs that it compiled."""
    counts = []

    def counted(*args):
        before = len(compiled)
        solved = quantize_weights(*args)
        counts.append(len(compiled) - before)
        return solved

    monkeypatch.setattr(importlib.import_module("spqr_jax.job.group_solver"), "quantize_weights", counted)
    return counts


@pytest.mark.filterwarnings("ignore:.*these experts see few calibration tokens")
def test_more_experts_take_no_more_programs_to_solve(tiny_batches, compiled_by_solving):
    """Each expert has weights, tokens and outliers of its own; what solves the first solves them all."""
    for number in (4, 8):
        config = dataclasses.replace(SPARSE, num_experts=number, expert_size=40)  # a size that no other test has
        quantize(random_decoder(config, seed=number), tiny_batches, SpQRConfig())
    four, eight = compiled_by_solving[:20], compiled_by_solving[20:]
    assert len(eight) == 2 * (2 + 2 * 8)  # two blocks: what attention reads, and what each expert's matrices read
    assert four[2] > 0  # gate and up of the first expert
    assert (sum(four[3:6]), sum(four[7:]), sum(eight)) == (0, 0, 0)


def test_inspect_has_a_column_of_tokens(model, tmp_path):
    """A dash where a weight saw no calibration text."""
    save(tmp_path / "small", quantize(model, None, SpQRConfig.rtn(bits=4)))
    result = spqr("inspect", "small", "--json", "i.json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("layers.1.experts.4.up_proj")]
    assert line.split()[-1] == "–"
    assert "tokens" in result.stdout
    assert json.loads((tmp_path / "i.json").read_text())["layers"]["layers.1.experts.4.up_proj"]["tokens"] is None


@pytest.mark.slow
def test_experts_are_tuned(model, tiny_batches):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        quantized = quantize(model, tiny_batches, SpQRConfig(bits=2))

    tuned = tune(quantized, TreeSource(model), tiny_batches, TuneConfig("logits", epochs=3))
    tokens = tiny_batches[0]
    assert divergence(model, tuned, tokens) < divergence(model, quantized, tokens)
