from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.events import LayerReports
from support.problems import divergence, random_tokens, run_forward

import spqr_jax
from spqr_jax import (
    DataError,
    LayerRule,
    NotFiniteError,
    SpQRArray,
    SpQRConfig,
    SpQRError,
    accumulate_hessian,
    empty_hessian,
    quantize,
    quantize_weight,
)
from spqr_jax.job.job import Job
from spqr_jax.models.config import BlockKind
from spqr_jax.models.decoder import plain_linear, random_decoder
from spqr_jax.stream.activations import Activations
from spqr_jax.stream.blocks import TreeSource
from spqr_jax.stream.stages import rounded_linear, stage_groups

GPTQ8 = SpQRConfig.gptq(8, 16)
PROGRAMS = 38
"""That quantizing a model with blocks of one kind may compile: by stage, by input width, by shape; and small ones."""


MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def tokens(tiny_config):
    return random_tokens((4, 32), 7, tiny_config.vocab_size)


@pytest.mark.parametrize("sequential", [True, False])
def test_every_matrix_is_quantized_and_nothing_else(tiny_model, tiny_batches, tokens, sequential):
    quantized = quantize(tiny_model, tiny_batches, SpQRConfig(sequential=sequential))
    for block in quantized.layers:
        for name, weight in block.items():
            assert isinstance(weight, SpQRArray) == (name in MATRICES)
            if isinstance(weight, SpQRArray):
                weight.validate()
    pairs = zip(jax.tree.leaves(quantized.outer), jax.tree.leaves(tiny_model.outer), strict=True)
    assert all(after is before for after, before in pairs)
    assert divergence(tiny_model, quantized, tokens) < 0.1


def test_more_bits_and_better_methods_diverge_less(tiny_model, tiny_batches, tokens):
    def run(config):
        return divergence(tiny_model, quantize(tiny_model, tiny_batches, config), tokens)

    assert run(GPTQ8) < run(SpQRConfig()) < run(SpQRConfig.rtn(2, 16))


def test_odd_sizes(odd_model, tiny_batches, tokens):
    quantized = quantize(odd_model, tiny_batches, SpQRConfig())
    assert quantized.layers[0].q_proj.shape == (50, 50)
    assert divergence(odd_model, quantized, tokens) < 0.2


def test_the_first_stage_sees_the_hessian_of_its_inputs(tiny_model, tiny_batches):
    """The recording pass gives the very Gram matrix of what q, k and v read."""
    activations = Activations(tiny_model.config, tiny_model.outer, tiny_batches)
    assert [names for names, _ in stage_groups(tiny_model.config, BlockKind(), 0)] == [("q_proj", "k_proj", "v_proj")]
    (hessian,) = activations.hessians(0, tiny_model.layers[0])
    total = empty_hessian(64)
    for batch in tiny_batches:
        x = np.asarray(tiny_model.outer.embed_tokens)[batch]
        x = x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-5) * np.asarray(tiny_model.layers[0].attention_norm)
        total = accumulate_hessian(total, jnp.asarray(x))
    np.testing.assert_allclose(hessian.matrix(), total.matrix(), rtol=1e-4, atol=1e-3)
    assert float(hessian.tokens) == sum(batch.size for batch in tiny_batches)


def test_calibration_in_bfloat16_sees_nearly_the_same(tiny_model, tiny_batches):
    """Products of factors rounded to 8 bits, and nothing else, differ: by less than 1%, but not by nothing."""
    seen = []
    for linear in (plain_linear, rounded_linear):
        activations = Activations(tiny_model.config, tiny_model.outer, tiny_batches, linear)
        for stage in range(4):
            activations.advance(stage, tiny_model.layers[0])
        seen.append(activations.hessians(0, tiny_model.layers[1])[0].matrix())
    assert 0 < float(jnp.linalg.norm(seen[1] - seen[0]) / jnp.linalg.norm(seen[0])) < 0.01


def test_the_calibration_dtype_is_the_configurations(tiny_model, tiny_batches):
    exact, rounded, again = (
        quantize(tiny_model, tiny_batches, SpQRConfig(calibration_dtype=dtype)).layers[1].down_proj.codes
        for dtype in ("float32", "bfloat16", "bfloat16")
    )
    assert np.any(exact != rounded)
    np.testing.assert_array_equal(rounded, again)
    with pytest.raises(SpQRError, match="calibration_dtype must be one of auto, bfloat16, float32"):
        SpQRConfig(calibration_dtype="float16")


def test_the_calibration_dtype_follows_the_processor(monkeypatch):
    for able, dtype in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr("spqr_jax.config.multiplies_bfloat16", lambda able=able: able)
        assert SpQRConfig().resolved().calibration_dtype == dtype
    assert (
        SpQRConfig(calibration_dtype="bfloat16").resolved().calibration_dtype == "bfloat16"
    )  # what is asked for stays


def test_rounded_calibration_sums_what_the_weights_read(tiny_model, tiny_batches):
    """The Hessian of a rounded run is that of its rounded inputs: sums of exact products, in float32."""
    activations = Activations(tiny_model.config, tiny_model.outer, tiny_batches, rounded_linear)
    for stage in range(3):
        activations.advance(stage, tiny_model.layers[0])
    assert all(state.inner.dtype == jnp.bfloat16 for state, _ in activations.chunks())
    inputs = [np.asarray(state.inner, np.float64) for state, _ in activations.chunks()]
    inputs = np.concatenate([x.reshape(-1, tiny_model.config.intermediate_size) for x in inputs])
    gram = np.asarray(activations.hessians(3, tiny_model.layers[0])[0].gram)
    np.testing.assert_allclose(np.triu(gram), np.triu(inputs.T @ inputs), rtol=1e-4, atol=1e-5)


def test_the_stream_ends_where_the_model_does(tiny_model, tiny_batches):
    """Stage by stage through all blocks is the forward pass."""
    activations = Activations(tiny_model.config, tiny_model.outer, tiny_batches)
    for block in tiny_model.layers:
        for stage in range(4):
            activations.advance(stage, block)
    hessian = activations.head_hessian(tiny_model.outer)
    assert hessian.gram.shape == (64, 64)
    logits = run_forward(tiny_model, tiny_batches[0])
    residual = activations._states[0].residual
    from spqr_jax.models.decoder import logits as head

    np.testing.assert_allclose(head(tiny_model.config, tiny_model.outer, residual), logits, atol=1e-5)


def test_sequential_inputs_have_passed_the_quantized_weights(tiny_model, tiny_batches):
    """Skipping the first stage's weights changes what the second stage is given."""
    errors = {}
    for name, config in {"on": SpQRConfig(bits=2), "off": SpQRConfig(bits=2, sequential=False)}.items():
        reports = LayerReports()
        quantize(tiny_model, tiny_batches, config, events=reports)
        errors[name] = {report.path: report.stats.output_error for report in reports.layers}
    assert errors["on"]["layers.0.q_proj"] == pytest.approx(errors["off"]["layers.0.q_proj"], rel=1e-6)
    assert errors["on"]["layers.0.o_proj"] != errors["off"]["layers.0.o_proj"]


def test_rules_skip_and_change_bits(tiny_model, tiny_batches):
    config = SpQRConfig(
        rules=(LayerRule(r"layers\.0\..*_proj", skip=True), LayerRule("down_proj", bits=4), LayerRule("k_proj", bits=2))
    )
    quantized = quantize(tiny_model, tiny_batches, config)
    assert not any(isinstance(getattr(quantized.layers[0], n), SpQRArray) for n in MATRICES)
    assert [quantized.layers[1].down_proj.bits, quantized.layers[1].k_proj.bits] == [4, 2]
    assert quantized.layers[1].q_proj.bits == 3


def test_the_head_is_quantized_on_request(tiny_model, tiny_batches, tokens):
    config = SpQRConfig(head_bits=3)
    quantized = quantize(tiny_model, tiny_batches, config)
    assert isinstance(quantized.outer.lm_head, SpQRArray)
    assert divergence(tiny_model, quantized, tokens) < 0.1


def test_a_head_of_eight_bits_is_rounded_without_text(tiny_model, tokens):
    quantized = quantize(tiny_model, None, SpQRConfig.rtn(8, 16, head_bits=8))
    expected = SpQRConfig.rtn(8, 32, fit="search", stats_bits=3)
    np.testing.assert_array_equal(
        quantized.outer.lm_head.to_dense(), quantize_weight(tiny_model.outer.lm_head, None, expected).to_dense()
    )
    assert divergence(tiny_model, quantized, tokens) < 1e-3
    assert SpQRConfig().for_head("lm_head") is None
    skipped = SpQRConfig(head_bits=8, rules=(LayerRule("lm_head", skip=True),))
    assert skipped.for_head("lm_head") is None


def test_a_tied_head_serves_quantized_on_both_sides(tiny_model, tiny_batches, tokens, tmp_path):
    tied = dataclasses.replace(
        tiny_model,
        outer=dataclasses.replace(tiny_model.outer, lm_head=None),
        config=dataclasses.replace(tiny_model.config, tied_head=True),
    )
    config = SpQRConfig(head_bits=3, rules=(LayerRule("embed_tokens", bits=4),))
    quantized = quantize(tied, tiny_batches, config)
    assert quantized.outer.embed_tokens.bits == 4
    assert divergence(tied, quantized, tokens) < 0.1
    spqr_jax.save(tmp_path / "m", quantized)
    loaded = spqr_jax.load(tmp_path / "m")
    scores = run_forward(quantized, tokens)
    np.testing.assert_array_equal(run_forward(loaded, tokens), scores)
    np.testing.assert_allclose(run_forward(spqr_jax.prepare(quantized), tokens), scores, atol=1e-5)


def test_round_to_nearest_needs_no_text(tiny_model):
    quantized = quantize(tiny_model, None, SpQRConfig.rtn(4, 16))
    expected = quantize_weight(tiny_model.layers[1].up_proj, None, SpQRConfig.rtn(4, 16))
    np.testing.assert_array_equal(quantized.layers[1].up_proj.to_dense(), expected.to_dense())


def test_it_is_deterministic(tiny_model, tiny_batches):
    first, second = (quantize(tiny_model, iter(tiny_batches), SpQRConfig()) for _ in range(2))
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)


def test_blocks_are_read_once_and_put_in_order(tiny_model, tiny_batches):
    events = []

    class Source(TreeSource):
        def block(self, index):
            events.append(("read", index))
            return super().block(index)

    class Sink:
        def put_block(self, index, block):
            events.append(("put", index))

        def put_outer(self, outer):
            events.append(("outer", None))

        def record(self, path, stats):
            pass

        def describe(self, quantization):
            events.append(("described", quantization.bits))

    Job(Source(tiny_model), Sink(), tiny_batches, SpQRConfig()).run()
    assert events == [("described", 3), ("read", 0), ("put", 0), ("read", 1), ("put", 1), ("outer", None)]


@pytest.mark.parametrize(
    ("batches", "says"),
    [
        ([], "no calibration batches"),
        (None, "needs calibration batches"),
        ([np.zeros((1, 200), np.int32)], "longer than the model's context of 128"),
        ([np.full((1, 8), 999, np.int32)], "vocabulary has 256"),
        ([np.zeros((1, 8), np.float32)], "integer token ids"),
        ([np.zeros(8, np.int32)], "integer token ids"),
        ([np.zeros((0, 8), np.int32)], "integer token ids"),
    ],
)
def test_unusable_calibration_says_why(tiny_model, batches, says):
    with pytest.raises(DataError, match=says):
        quantize(tiny_model, batches, SpQRConfig())


def test_nan_in_the_model_is_found_in_calibration(tiny_model, tiny_batches):
    bad = dataclasses.replace(
        tiny_model, outer=dataclasses.replace(tiny_model.outer, embed_tokens=jnp.full((256, 64), jnp.nan))
    )
    with pytest.raises(NotFiniteError, match=r"inputs of layers\.0\.q_proj.*not finite"):
        quantize(bad, tiny_batches, SpQRConfig())


def test_params_of_another_kind_ask_for_forward():
    with pytest.raises(SpQRError, match="forward=fn"):
        quantize({"w": jnp.ones((4, 4))}, [], SpQRConfig())


# ---- models of one's own ----------------------------------------------------------------


def normal(seed, *shape):
    return jax.device_put(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def own_model():
    return {
        "first": normal(0, 48, 32) * 0.2,
        "gate": normal(1, 48, 32) * 0.2,
        "last": [normal(2, 8, 48) * 0.2],
        "bias": jnp.ones(8),
    }


def own_forward(params, batch, linear):
    hidden = jnp.tanh(linear("mlp.first", params["first"], batch)) * linear("mlp.gate", params["gate"], batch)
    return linear("mlp.last", params["last"][0], hidden) + params["bias"]


def test_any_forward_function(tiny_batches):
    params, batches = own_model(), [normal(10 + i, 16, 32) for i in range(4)]
    quantized = quantize(params, iter(batches), SpQRConfig(), forward=own_forward)
    assert isinstance(quantized["last"][0], SpQRArray)
    assert quantized["bias"] is params["bias"]
    x = normal(9, 64, 32)

    def run(p):
        return own_forward(p, x, lambda path, w, x: spqr_jax.linear(w, x))

    assert np.linalg.norm(run(quantized) - run(params)) < 0.2 * np.linalg.norm(run(params))
    hessian = empty_hessian(32)
    for batch in batches:
        hessian = accumulate_hessian(hessian, batch)
    expected = quantize_weight(params["gate"], hessian, SpQRConfig())
    np.testing.assert_array_equal(quantized["gate"].codes, expected.codes)


def test_forward_must_name_each_leaf_once():
    params, batch = own_model(), jnp.ones((4, 32))
    with pytest.raises(SpQRError, match="not a leaf of params"):
        quantize(params, [batch], forward=lambda p, x, linear: linear("a", 2 * p["first"], x))
    with pytest.raises(SpQRError, match="twice"):
        quantize(params, [batch], forward=lambda p, x, linear: linear("a", p["gate"], x) + linear("a", p["first"], x))
    with pytest.raises(DataError, match="no calibration batches"):
        quantize(params, [], forward=own_forward)


def test_inference_ignores_names(tiny_model):
    x = jnp.ones((2, 64))
    np.testing.assert_array_equal(
        plain_linear("anything", tiny_model.layers[0].q_proj, x), spqr_jax.linear(tiny_model.layers[0].q_proj, x)
    )


def test_thresholds_of_infinity_keep_nothing_apart(tiny_model, tiny_batches):
    quantized = quantize(tiny_model, tiny_batches, SpQRConfig(outlier_threshold=math.inf))
    assert all(getattr(block, name).nnz == 0 for block in quantized.layers for name in MATRICES)


def test_few_programs_are_compiled(tiny_config):
    """A program takes longer to compile than to run: their number is what a small model's time depends on."""
    config = dataclasses.replace(tiny_config, num_layers=3, hidden_size=80, intermediate_size=112, head_dim=20)
    model = random_decoder(config, seed=0)
    batches = [random_tokens((2, 32), seed, config.vocab_size) for seed in range(2)]
    programs = 0

    def count(event: str, seconds: float, **_: object) -> None:
        nonlocal programs
        programs += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        quantize(model, batches, SpQRConfig())
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert 20 < programs <= PROGRAMS
