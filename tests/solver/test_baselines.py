"""The methods that SpQR is compared with: each against what its own paper claims."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.events import LayerReports
from support.problems import correlated_problem, run_forward, with_dense_weights

from spqr_jax import SpQRConfig, SpQRError, load, perplexity, quantize, save
from spqr_jax.array import SpQRArray
from spqr_jax.config import BASELINES
from spqr_jax.methods import quantize_weight, quantize_weights
from spqr_jax.methods.grid import weight_grid, with_codes
from spqr_jax.methods.table import SOLVERS
from spqr_jax.solver.hessian import factorize

LAYERWISE = list(SOLVERS)


def weight_problem(out, inner, seed=0, tokens=200):
    """A weight and H, f32."""
    w, x = correlated_problem(out, inner, seed, tokens=tokens)
    return w, hessian_matrix(x)


def hessian_matrix(x):
    x = np.asarray(x, np.float64)
    return (2 / len(x) * x.T @ x).astype(np.float32)


@pytest.fixture(scope="module")
def problem():
    return weight_problem(48, 96, tokens=400)


def loss(w, h, array):
    miss = np.asarray(w, np.float64) - np.asarray(array.to_dense(), np.float64)
    return np.sum((miss @ np.asarray(h, np.float64)) * miss)


def nearest(w, bits=3, group_size=32):
    return quantize_weight(w, None, SpQRConfig.rtn(bits, group_size, fit="search"))


@pytest.fixture(scope="module")
def solved(problem):
    w, h = problem
    return {name: quantize_weight(w, h, SpQRConfig.baseline(name, 3, 32)) for name in LAYERWISE}


@pytest.mark.parametrize("method", LAYERWISE)
def test_each_beats_rounding_to_nearest_in_the_same_array(problem, solved, method):
    w, h = problem
    array, plain = solved[method].validate(), nearest(w)
    share = 1.0 if method == "bit-split" else 0.9  # its levels lie around zero, one fewer than the others'
    assert loss(w, h, array) < share * loss(w, h, plain)
    assert (array.bits, array.stored_bits) == (3, plain.stored_bits)


@pytest.mark.parametrize("method", LAYERWISE)
def test_the_reported_error_is_the_arrays(problem, method):
    w, h = problem
    found = quantize_weights([w], h, [SpQRConfig.baseline(method, 3, 32)])[0]
    total = np.sum((np.asarray(w, np.float64) @ np.asarray(h, np.float64)) * np.asarray(w))
    assert found.stats.output_error == pytest.approx(np.sqrt(loss(w, h, found.array) / total), rel=1e-4)
    np.testing.assert_array_equal(found.dense, found.array.to_dense())


# ---- OBQ ---------------------------------------------------------------------------------


def obq_by_hand(w, h, damping, array, greedy=True):
    """The paper's algorithm, H⁻¹ rewritten for every weight of every row, in float64; or in the order of the inputs."""
    u = np.asarray(factorize(h, damping).u, np.float64)
    grid = weight_grid(array)
    scale, zero = np.asarray(grid.scale, np.float64), np.asarray(grid.zero, np.float64)
    codes = np.zeros(w.shape)
    for row in range(len(w)):
        inverse, now, left = u.T @ u, np.asarray(w[row], np.float64).copy(), list(range(w.shape[1]))
        while left:
            q = np.clip(np.round(now / scale[row] + zero[row]), 0, grid.maxq)
            miss = now - scale[row] * (q - zero[row])
            cost = np.where(np.abs(miss) > scale[row] / 2, 0, miss**2 / np.diag(inverse))
            p = min(left, key=lambda j: cost[j] if greedy else j)
            codes[row, p] = q[p]
            now -= miss[p] / inverse[p, p] * inverse[:, p]
            inverse = inverse - np.outer(inverse[:, p], inverse[p]) / inverse[p, p]
            inverse[p, p] = 1
            left.remove(p)
    return codes


def codes_of(array):
    scale, zero, maxq = weight_grid(array)
    return np.clip(np.round(np.asarray(array.to_dense()) / np.asarray(scale) + np.asarray(zero)), 0, maxq)


def test_obq_goes_in_the_exact_greedy_order(problem, solved):
    w, h = problem
    expected = obq_by_hand(w, h, 0.01, nearest(w))
    same = codes_of(solved["obq"]) == expected
    # A tie within float32's rounding takes another way from there on: it may happen to a row or two.
    assert same.all(axis=1).mean() > 0.9


@pytest.mark.slow
def test_the_order_matters_little_as_gptq_found():
    """On one grid, rows in the greedy order against one order for all: GPTQ's reason to exist (section 3, step 1)."""
    greedy, fixed = [], []
    for seed in range(4):
        w, h = weight_problem(32, 64, seed, tokens=300)
        greedy.append(loss(w, h, quantize_weight(w, h, SpQRConfig.baseline("obq", 3, 64))))
        plain = nearest(w, 3, 64)
        fixed.append(loss(w, h, with_codes(plain, jnp.asarray(obq_by_hand(w, h, 0.01, plain, greedy=False)))))
    assert 0.85 < np.mean(greedy) / np.mean(fixed) < 1.15


def test_obq_leaves_large_matrices_to_gptq_and_says_so():
    w, h = np.random.default_rng(0).standard_normal((16, 1040)).astype(np.float32), np.eye(1040, dtype=np.float32)
    with pytest.warns(UserWarning, match="more than 1024"):
        array = quantize_weight(w, h, SpQRConfig.baseline("obq", 3, 16))
    expected = quantize_weight(w, h, SpQRConfig.gptq(3, 16, order="identity", fit="search"))
    np.testing.assert_array_equal(array.codes, expected.codes)


# ---- AdaRound ----------------------------------------------------------------------------


def test_adaround_rounds_up_or_down_and_nowhere_else(problem, solved):
    w, _ = problem
    grid = weight_grid(nearest(w))
    place = np.asarray(w) / np.asarray(grid.scale) + np.asarray(grid.zero)
    codes = codes_of(solved["adaround"])
    low, high = (np.clip(edge(place), 0, grid.maxq) for edge in (np.floor, lambda p: np.floor(p) + 1))
    assert np.all((codes == low) | (codes == high))
    assert 0.05 < np.mean(codes != codes_of(nearest(w))) < 0.7


def test_adaround_comes_near_the_best_of_all_choices():
    """Ten weights: all 1024 ways to round them up or down are tried."""
    learned, to_nearest = [], []
    for seed in range(8):
        w, h = weight_problem(1, 10, seed, tokens=60)
        plain = nearest(w, 2, None)
        grid = weight_grid(plain)
        floor = np.floor(np.asarray(w) / np.asarray(grid.scale) + np.asarray(grid.zero))
        values = [
            np.asarray(grid.scale) * (np.clip(floor + np.array(up), 0, grid.maxq) - np.asarray(grid.zero))
            for up in itertools.product((0, 1), repeat=10)
        ]
        losses = [((np.asarray(w) - v) @ np.asarray(h) @ (np.asarray(w) - v).T).item() for v in values]
        found = loss(w, h, quantize_weight(w, h, SpQRConfig.baseline("adaround", 2, None)))
        assert found > min(losses) * (1 - 1e-5)
        learned.append(found / min(losses))
        to_nearest.append(loss(w, h, plain) / min(losses))
    assert np.mean(to_nearest) > 1.5
    assert np.mean(learned) < 1.25
    assert np.sum(np.array(learned) < 1 + 1e-5) >= 3  # the best of all


# ---- AdaQuant ----------------------------------------------------------------------------


def test_adaquant_moves_scales_and_codes_farther(problem, solved):
    """It relaxes AdaRound's choice: codes more than a neighbour away, and scales of its own."""
    w, h = problem
    before, after = nearest(w), solved["adaquant"]
    moved = np.abs(np.asarray(after.tile_stats, np.float32) / np.asarray(before.tile_stats, np.float32) - 1)[..., 0]
    assert np.median(moved) > 0.002
    longer = quantize_weight(w, h, SpQRConfig.baseline("adaquant", 3, 32, steps=1500))
    assert loss(w, h, longer) < loss(w, h, after) < loss(w, h, before)


# ---- Bit-split ---------------------------------------------------------------------------


def test_no_bit_alone_could_be_better_after_bit_split():
    """Coordinate descent has come to rest: changing one bit of one weight never lowers the loss."""
    w, h = weight_problem(4, 24)
    array = quantize_weight(w, h, SpQRConfig.baseline("bit-split", 3, None, steps=60, damping=0.0))
    scale, zero = np.moveaxis(np.asarray(array.tile_stats, np.float32), -1, 0)
    assert np.all(zero == 3)  # codes 0..6 stand for -3..3
    q, base = codes_of(array) - 3, loss(w, h, array)
    assert set(np.unique(q)) <= set(range(-3, 4))
    alpha, wide, big = np.asarray(scale, np.float64), np.asarray(w, np.float64), np.asarray(h, np.float64)
    for row, column in np.ndindex(q.shape):
        for change in (-4, -2, -1, 1, 2, 4):  # what one bit of {-1, 0, 1} can change
            if abs(q[row, column] + change) <= 3:
                other = q.copy()
                other[row, column] += change
                miss = wide - alpha * other
                # Rounding a bit moves it to the best of its own three values given the other; some
                # changes are no single bit's, and none of these may be much better either.
                assert np.sum((miss @ big) * miss) > base * (1 - 1e-2)


def test_more_sweeps_never_hurt():
    w, h = weight_problem(16, 40)
    losses = [
        loss(w, h, quantize_weight(w, h, SpQRConfig.baseline("bit-split", 3, 16, steps=n, damping=0.0)))
        for n in (1, 2, 8)
    ]
    assert losses[0] >= losses[1] * (1 - 1e-3)
    assert losses[1] >= losses[2] * (1 - 1e-3)


# ---- all of them on models ---------------------------------------------------------------


@pytest.mark.parametrize("inner", [37, 50])
@pytest.mark.parametrize("method", LAYERWISE)
def test_odd_sizes_dead_inputs_and_constant_rows(method, inner):
    w, x = (np.array(a) for a in correlated_problem(5, inner, tokens=200))
    w[1], x[:, 3] = 0.0, 0.0
    array = quantize_weight(w, hessian_matrix(x), SpQRConfig.baseline(method, 3, 16, steps=None)).validate()
    assert array.shape == (5, inner)
    np.testing.assert_array_equal(np.asarray(array.to_dense())[1], 0)


@pytest.fixture(scope="module")
def text(tiny_config):
    return np.random.default_rng(3).integers(0, tiny_config.vocab_size, (4, 32)).astype(np.int32)


def block_error(model, other, batches):
    model, other = with_dense_weights(model), with_dense_weights(other)
    pairs = [(run_forward(model, batch), run_forward(other, batch)) for batch in batches]
    return np.mean([np.mean(np.square(np.asarray(a) - np.asarray(b))) for a, b in pairs])


@pytest.mark.slow
def test_brecq_reconstructs_blocks_better_than_rounding_to_nearest(tiny_model, tiny_batches, tmp_path, text):
    reports = LayerReports()
    config = SpQRConfig.baseline("brecq", 3, 32, steps=60)
    small = quantize(tiny_model, tiny_batches, config, events=reports)
    plain = quantize(tiny_model, None, SpQRConfig.rtn(3, 32, fit="search"))
    assert block_error(tiny_model, small, tiny_batches) < 0.8 * block_error(tiny_model, plain, tiny_batches)
    assert len(reports.layers) == 14
    save(tmp_path / "m", small)
    assert perplexity(load(tmp_path / "m"), text).perplexity == perplexity(small, text).perplexity


def test_brecq_only_rounds_up_or_down(tiny_model, tiny_batches):
    small = quantize(tiny_model, tiny_batches, SpQRConfig.baseline("brecq", 3, 32, steps=20))
    for name, weight in small.layers[0].items():
        if isinstance(weight, SpQRArray):
            grid = weight_grid(weight)
            place = np.asarray(tiny_model.layers[0][name]) / np.asarray(grid.scale) + np.asarray(grid.zero)
            assert np.all(np.abs(codes_of(weight) - np.clip(place, 0, grid.maxq)) <= 1 + 1e-3)


def test_the_fisher_weights_are_squared_gradients(tiny_model, tiny_batches):
    """Against jax.grad through the rest of the model in one go."""
    from spqr_jax.methods.brecq import _output_importance
    from spqr_jax.models.attention import positions
    from spqr_jax.models.decoder import State, embed, logits, run_block
    from spqr_jax.stream.blocks import TreeSource

    tokens, config = jnp.asarray(tiny_batches[0]), tiny_model.config

    @jax.jit
    def gradient(model):
        where = positions(config, tokens.shape[1], jnp.zeros(2, jnp.int32), jnp.int32(0))
        first = run_block(config, model.layers[0], State(embed(config, model.outer, tokens, where)), where)

        def rest(x):
            x = run_block(config, model.layers[1], State(x), where).residual
            scores = jax.nn.log_softmax(logits(config, model.outer, x)[:, :-1])
            return -jnp.sum(jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1))

        return jax.grad(rest)(first.residual)

    expected = np.square(gradient(tiny_model))
    found = _output_importance(TreeSource(tiny_model), tiny_batches)[0][0]
    np.testing.assert_allclose(np.asarray(found, np.float32), expected, rtol=2e-2, atol=1e-12)


@pytest.mark.parametrize(
    "method", ["adaquant", *(pytest.param(m, marks=pytest.mark.slow) for m in LAYERWISE if m != "adaquant")]
)
def test_models_are_quantized_by_name(tiny_model, tiny_batches, method):
    small = quantize(tiny_model, tiny_batches, SpQRConfig.baseline(method, 4, 32, steps=None))
    plain = quantize(tiny_model, None, SpQRConfig.rtn(4, 32))
    assert block_error(tiny_model, small, tiny_batches) < block_error(tiny_model, plain, tiny_batches)


def test_configurations_that_cannot_be_say_why():
    with pytest.raises(SpQRError, match="supports neither outliers nor target_bits"):
        SpQRConfig.baseline("obq", outlier_threshold=0.2)
    with pytest.raises(SpQRError, match="16-bit floats"):
        SpQRConfig.baseline("adaquant", stats_bits=3)
    with pytest.raises(SpQRError, match="steps must"):
        SpQRConfig.baseline("obq", steps=3)
    with pytest.raises(SpQRError, match="order='identity'"):
        SpQRConfig.baseline("adaround", order="activation")
    with pytest.raises(SpQRError, match="optimizes whole blocks"):
        quantize_weight(jnp.ones((16, 16)), jnp.eye(16), SpQRConfig.baseline("brecq"))
    for name in BASELINES:
        assert SpQRConfig.from_json(SpQRConfig.baseline(name).to_json()) == SpQRConfig.baseline(name)
