from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.problems import correlated_problem
from support.reference_spqr import spqr as reference_spqr

from spqr_jax import DataError, SpQRConfig, SpQRError, accumulate_hessian, empty_hessian, quantize_weight
from spqr_jax._compat import multiplies_bfloat16
from spqr_jax.methods import quantize_weights
from spqr_jax.packing import unpack_codes
from spqr_jax.solver.hessian import factorize, quadratic_form

INF = math.inf


def hessian_of(x):
    return accumulate_hessian(empty_hessian(x.shape[1]), x)


def output_error(w, array, x):
    """‖(W-Ŵ)X‖/‖WX‖ in float64."""
    w, x = np.asarray(w, np.float64), np.asarray(x, np.float64)
    return np.linalg.norm((w - np.asarray(array.to_dense(), np.float64)) @ x.T) / np.linalg.norm(w @ x.T)


def codes_of(array):
    return unpack_codes(np.asarray(array.codes), array.bits)[:, : array.shape[1]]


# ---- the paper's algorithm --------------------------------------------------------------


@pytest.mark.parametrize("order", ["activation", "identity"])
@pytest.mark.parametrize("shape", [(16, 64), (32, 112), (48, 272)])
def test_matches_spqr_written_from_the_paper(shape, order):
    w, x = correlated_problem(*shape, seed=sum(shape))
    hessian = hessian_of(x)
    config = SpQRConfig(fit="minmax", damping=0.1, order=order)
    array = quantize_weight(w, hessian, config)
    codes, dense, residual, perm = reference_spqr(
        w, hessian.matrix(), bits=3, group=16, stats_bits=3, tile=16, tau=0.2, damping=0.1, order=order
    )
    # float32 against float64: a weight midway between two codes may fall to either
    # side, and its row differs from there on; so rows are compared, nearly all must agree
    same = np.mean(np.all(codes_of(array) == codes, axis=1))
    assert same >= 0.9
    undo = np.argsort(perm)
    agree = np.all(codes_of(array) == codes, axis=1)
    np.testing.assert_allclose(
        np.asarray(array.to_dense())[agree], (dense + residual)[:, undo][agree], rtol=2e-3, atol=2e-4
    )
    np.testing.assert_allclose(array.nnz, np.count_nonzero(residual), atol=2 + 0.02 * np.count_nonzero(residual))


def test_spqr_beats_gptq_beats_round_to_nearest():
    w, x = correlated_problem(128, 128)
    errors = {
        name: output_error(w, quantize_weight(w, hessian_of(x), config), x)
        for name, config in {
            "spqr": SpQRConfig(damping=0.01),
            "gptq": SpQRConfig.gptq(3, 16),
            "rtn": SpQRConfig.rtn(3, 16),
        }.items()
    }
    assert errors["spqr"] < 0.8 * errors["gptq"]
    assert errors["gptq"] < 0.8 * errors["rtn"]


def test_compensation_trades_weight_error_for_output_error():
    w, x = correlated_problem(64, 128)
    gptq, rtn = (quantize_weight(w, hessian_of(x), c) for c in (SpQRConfig.gptq(3, 16), SpQRConfig.rtn(3, 16)))
    assert output_error(w, gptq, x) < output_error(w, rtn, x)
    by_weight = [np.linalg.norm(np.asarray(w) - np.asarray(array.to_dense())) for array in (gptq, rtn)]
    assert by_weight[0] > by_weight[1]


def test_search_beats_minmax_at_fewer_bits():
    w, x = correlated_problem(128, 128, seed=5)
    search, minmax = (quantize_weight(w, hessian_of(x), SpQRConfig(fit=fit)) for fit in ("search", "minmax"))
    assert output_error(w, search, x) < output_error(w, minmax, x)
    assert search.ideal_bits < minmax.ideal_bits


def test_scaling_the_hessian_changes_no_code():
    w, x = correlated_problem(32, 96)
    h = np.asarray(hessian_of(x).matrix())
    first, second = quantize_weight(w, h, SpQRConfig()), quantize_weight(w, 1024 * h, SpQRConfig())
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)


def test_round_to_nearest_with_one_group_a_row():
    w = np.asarray(correlated_problem(8, 40)[0])
    array = quantize_weight(w, None, SpQRConfig.rtn(4, None))
    low, high = np.min(w, axis=1, keepdims=True), np.max(w, axis=1, keepdims=True)
    step = (high - low) / 15
    assert np.all(np.abs(np.asarray(array.to_dense()) - w) <= 0.51 * step)
    assert array.ideal_bits == 4 + 32 / 40


def test_rows_share_nothing_but_their_tile():
    """Permuting whole tiles of rows permutes the result."""
    w, x = correlated_problem(48, 64)
    swap = np.r_[16:32, 0:16, 32:48]
    config = SpQRConfig(outlier_threshold=INF)
    first = quantize_weight(w, hessian_of(x), config).to_dense()
    second = quantize_weight(np.asarray(w)[swap], hessian_of(x), config).to_dense()
    np.testing.assert_array_equal(np.asarray(first)[swap], second)


def test_a_tile_that_is_not_full_is_as_if_its_last_row_were_repeated():
    w, x = correlated_problem(20, 64)
    config = SpQRConfig(outlier_threshold=INF)
    short, full = (
        np.asarray(quantize_weight(rows, hessian_of(x), config).to_dense())
        for rows in (w, np.pad(w, ((0, 12), (0, 0)), mode="edge"))
    )
    np.testing.assert_array_equal(short, full[:20])


def test_stacking_matrices_changes_nothing():
    w, x = correlated_problem(50, 96)
    w = np.asarray(w)
    together = quantize_weights([w[:20], w[20:]], hessian_of(x), [SpQRConfig()] * 2)
    for part, solved in zip((w[:20], w[20:]), together, strict=True):
        alone = quantize_weight(part, hessian_of(x), SpQRConfig())
        np.testing.assert_allclose(solved.array.to_dense(), alone.to_dense(), atol=1e-6)
        # one formula in two programs: XLA may fuse its multiply and add in one and not in the other
        np.testing.assert_allclose(solved.dense, solved.array.to_dense(), rtol=0, atol=2.0**-24)


# ---- outliers ---------------------------------------------------------------------------


def test_a_huge_weight_becomes_an_outlier_and_comes_back():
    w, x = correlated_problem(32, 64)
    w = np.array(w)
    w[7, 11] = 3.0
    array = quantize_weight(w, hessian_of(x), SpQRConfig())
    rows, cols, _ = array.to_coo()
    assert (7, 11) in set(zip(rows.tolist(), cols.tolist(), strict=True))
    assert float(np.asarray(array.to_dense())[7, 11]) == pytest.approx(3.0, abs=0.15)  # moved by others' compensation
    assert quantize_weight(w, hessian_of(x), SpQRConfig(outlier_threshold=INF)).nnz == 0


def test_lower_thresholds_keep_more_apart():
    w, x = correlated_problem(64, 128)
    counts = [quantize_weight(w, hessian_of(x), SpQRConfig(outlier_threshold=t)).nnz for t in (2.0, 0.5, 0.1)]
    assert counts[0] < counts[1] < counts[2]


def test_every_weight_an_outlier_is_lossless_to_float16():
    w, x = correlated_problem(16, 32)
    array = quantize_weight(w, hessian_of(x), SpQRConfig(outlier_threshold=1e-12)).validate()
    assert array.nnz > 0.95 * array.size
    np.testing.assert_allclose(array.to_dense(), w, atol=2e-4)


# ---- awkward inputs ---------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (17, 250), (3, 5), (33, 100), (100, 8)])
@pytest.mark.parametrize(
    "config",
    [
        SpQRConfig(),
        SpQRConfig(bits=4, group_size=8, stats_group_size=8),
        SpQRConfig(bits=2, group_size=32, stats_bits=4, stats_group_size=24, order="identity"),
        SpQRConfig.gptq(8, 128),
        SpQRConfig.gptq(4, None),
        SpQRConfig.rtn(3, 16),
    ],
    ids=["spqr", "small groups", "odd tiles", "8-bit", "per row", "rtn"],
)
def test_any_size_works(shape, config):
    w, x = correlated_problem(*shape, seed=1, tokens=64)
    array = quantize_weight(w, hessian_of(x), config).validate()
    assert array.shape == shape
    dense = array.to_dense()
    assert dense.shape == shape
    bound = {2: 0.8, 3: 0.5, 4: 0.25, 8: 0.02}[config.bits]
    assert output_error(w, array, x) < bound


def test_dead_inputs_keep_their_weights():
    w, x = correlated_problem(32, 64)
    w, x = np.asarray(w), np.array(x)
    x[:, [3, 40, 41]] = 0.0
    for order in ("activation", "identity"):
        array = quantize_weight(w, hessian_of(x), SpQRConfig(order=order))
        assert np.all(np.isfinite(array.to_dense()))
        dead = (np.asarray(array.to_dense()) - w)[:, [3, 40, 41]]
        assert np.linalg.norm(dead) < 0.5 * np.linalg.norm(w[:, [3, 40, 41]])


def test_zero_matrix_and_zero_columns_come_back_exactly():
    w, x = correlated_problem(32, 64)
    block = np.array(w)
    block[:, 16:32] = 0.0
    w = np.asarray(w)
    for config in (SpQRConfig(), SpQRConfig.gptq(3, 16), SpQRConfig.rtn(3, 16)):
        np.testing.assert_array_equal(quantize_weight(0 * w, hessian_of(x), config).to_dense(), 0 * w)
    array = quantize_weight(block, None, SpQRConfig.rtn(3, 16, stats_bits=3))
    np.testing.assert_array_equal(np.asarray(array.to_dense())[:, 16:32], 0 * w[:, 16:32])


def test_a_singular_hessian_is_damped_until_it_factors():
    w, x = correlated_problem(16, 64, tokens=8)  # fewer tokens than inputs
    h = hessian_of(x).matrix()
    used = factorize(h, 0.0).damping
    assert used > 0
    solved = quantize_weights([w], h, [SpQRConfig(damping=0.0)])[0]
    assert solved.stats.damping > 0
    assert np.all(np.isfinite(solved.dense))


def test_the_factor_is_the_upper_cholesky_factor_of_the_inverse():
    _, x = correlated_problem(1, 48)
    h = np.asarray(hessian_of(x).matrix(), np.float64)
    _, u, used, _ = factorize(h.astype(np.float32), 0.1)
    damped = h + 0.1 * np.mean(np.diag(h)) * np.eye(48)
    assert used == 0.1
    np.testing.assert_allclose(np.asarray(u).T @ np.asarray(u), np.linalg.inv(damped), rtol=1e-3, atol=1e-5)
    assert np.all(np.tril(np.asarray(u), -1) == 0)


@pytest.mark.parametrize("width", [100, 1100, 2500])
def test_wide_inputs_are_summed_in_panels(width):
    rng = np.random.default_rng(width)
    x, w = (rng.standard_normal((rows, width)).astype(np.float32) for rows in (40, 7))
    h = hessian_of(x).matrix()
    np.testing.assert_allclose(h, 2 / 40 * x.T.astype(np.float64) @ x, atol=1e-5)
    np.testing.assert_array_equal(h, h.T)
    np.testing.assert_allclose(jax.jit(quadratic_form)(w, h), np.sum((w @ np.asarray(h)) * w), rtol=1e-5)


@pytest.mark.parametrize("width", [576, 1536])
def test_a_processor_with_instructions_for_bfloat16_uses_them(width):
    if jax.default_backend() != "cpu" or not multiplies_bfloat16():
        pytest.skip("this processor has no instructions for products of bfloat16 matrices")
    compiled = jax.jit(accumulate_hessian).lower(empty_hessian(width), jnp.zeros((256, width), jnp.bfloat16)).compile()
    programs = [part for part in compiled.as_text().split("\n\n") if " dot(" in part]
    assert programs
    for program in programs:
        factors = re.search(r" dot\((%[\w.]+), (%[\w.]+)\)", program).groups()
        types = [re.search(rf"{re.escape(name)} = (\w+)\[", program)[1] for name in factors]
        assert types == ["bf16", "bf16"]  # else XLA has made float32 of them, which takes twice as long


def test_hessian_is_streamed():
    _, x = correlated_problem(1, 24)
    whole = hessian_of(x)
    parts = empty_hessian(24)
    for part in np.array_split(np.asarray(x), 5):
        parts = accumulate_hessian(parts, part.reshape(1, *part.shape))
    np.testing.assert_allclose(parts.matrix(), whole.matrix(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(whole.matrix(), 2 / len(x) * np.asarray(x).T @ np.asarray(x), rtol=1e-5, atol=1e-5)


def bad_calls():
    w, x = (np.asarray(a) for a in correlated_problem(16, 32))
    h = 2 / len(x) * x.T @ x
    nan, bad = h.copy(), w.copy()
    nan[0, 0] = bad[0, 0] = np.nan
    yield "NaN in calibration", (w, nan, SpQRConfig()), DataError, "not finite"
    yield "NaN in weights", (bad, h, SpQRConfig()), SpQRError, "not finite"
    yield "no Hessian", (w, None, SpQRConfig()), SpQRError, "needs a Hessian"
    yield "wrong Hessian", (w, h[:8, :8], SpQRConfig()), SpQRError, r"\(8, 8\), expected \(32, 32\)"
    yield "a vector", (w[0], h, SpQRConfig()), SpQRError, "expected matrices"
    yield "too large for float16", (w * 1e8, h, SpQRConfig()), SpQRError, "float16"
    yield "negative definite", (w, -h, SpQRConfig()), SpQRError, "not positive definite"


@pytest.mark.parametrize(("args", "error", "says"), [c[1:] for c in bad_calls()], ids=[c[0] for c in bad_calls()])
def test_bad_input_says_what_is_wrong(args, error, says):
    with pytest.raises(error, match=says):
        quantize_weight(*args)


@pytest.mark.parametrize(
    "changes",
    [
        {"bits": 1},
        {"group_size": 12},
        {"stats_bits": 12},
        {"stats_group_size": 4},
        {"outlier_threshold": 0.0},
        {"damping": -1.0},
        {"order": "random"},
        {"fit": "best"},
        {"compensate": False},
    ],
)
def test_impossible_configurations_are_refused(changes):
    with pytest.raises(SpQRError):
        SpQRConfig(**changes)


def test_configuration_survives_json():
    for config in (SpQRConfig(), SpQRConfig.gptq(), SpQRConfig.rtn(4, None), SpQRConfig.reference()):
        assert SpQRConfig.from_json(config.to_json()) == config
    with pytest.raises(SpQRError, match="unknown entries"):
        SpQRConfig.from_json({"bitz": 3})


def test_reference_mode_repeats_the_originals_constant_groups():
    w, x = correlated_problem(32, 64)
    w = np.array(w)
    w[:, :16] = 0.0
    config = SpQRConfig.reference(order="identity", outlier_threshold=INF, stats_bits=16)
    flawed = np.asarray(quantize_weight(w, hessian_of(x), config).to_dense())
    assert np.all(np.abs(flawed[:, 0]) > 0.1)


# ---- inputs that devices share ----------------------------------------------------------


def test_shared_inputs_are_ordered_range_by_range():
    w, x = correlated_problem(32, 128)
    hessian = hessian_of(x)
    config = SpQRConfig(input_shards=4)
    perm = np.asarray(quantize_weight(w, hessian, config).perm).reshape(4, 32)
    size = np.diagonal(np.asarray(hessian.matrix()))
    for shard, order in enumerate(perm):
        assert sorted(order) == list(range(32 * shard, 32 * (shard + 1)))
        assert np.all(np.diff(size[order]) <= 0)
    assert config.for_path("layers.0.q_proj").input_shards == 1
    assert config.for_path("layers.0.experts.3.down_proj").input_shards == 4


def test_ranges_of_inputs_are_whole_groups():
    w, x = correlated_problem(32, 128)
    with pytest.raises(SpQRError, match=r"whole groups of 16: input_shards may be 1, 2, 4, 8 for this matrix"):
        quantize_weight(w, hessian_of(x), SpQRConfig(input_shards=3))
    quantize_weight(w, hessian_of(x), SpQRConfig(input_shards=3, order="identity"))
