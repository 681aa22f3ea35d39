"""What accelerators run gives what a CPU runs: panel by panel, candidates at once, outliers listed on the device."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.problems import correlated_problem

from spqr_jax import SpQRConfig, accumulate_hessian, empty_hessian
from spqr_jax.methods import quantize_weights
from spqr_jax.solver import columns, panels, solve, sparse


@pytest.fixture
def accelerator(monkeypatch):
    """Makes the solver take an accelerator's way; chunks of 64 rows keep it quick."""

    def begin():
        monkeypatch.setattr(columns, "_CHUNK", 64)
        for module in (panels, solve, sparse):
            monkeypatch.setattr(module, "by_panels", lambda: True)
        monkeypatch.setattr(sparse, "_LARGE", 0)

    return begin


@pytest.mark.parametrize(
    "config",
    [
        SpQRConfig(),
        SpQRConfig(bits=4, group_size=32, stats_bits=16, fit="minmax", order="identity"),
        SpQRConfig.rtn(bits=4),
    ],
    ids=["second level", "halves", "nearest"],
)
def test_panels_give_what_one_program_gives(config, accelerator):
    w, x = correlated_problem(100, 150, seed=3)  # two panels, two chunks: rows and columns are padded
    hessian = accumulate_hessian(empty_hessian(150), x)
    configs = [config, dataclasses.replace(config, bits=2)]
    weights = [w, 1.5 * w[:20]]
    expected = quantize_weights(weights, hessian, configs)
    accelerator()
    for by_panels, whole in zip(quantize_weights(weights, hessian, configs), expected, strict=True):
        by_panels.array.validate()
        assert abs(by_panels.array.nnz - whole.array.nnz) <= 2
        assert by_panels.stats.output_error == pytest.approx(whole.stats.output_error, rel=1e-3)
        assert np.mean(np.asarray(by_panels.dense) != np.asarray(whole.dense)) < 0.01
        np.testing.assert_allclose(by_panels.dense, by_panels.array.to_dense(), atol=1e-6)


def test_outliers_listed_on_the_device_are_those_of_the_host():
    rng = np.random.default_rng(0)
    outliers = rng.random((37, 50)) < 0.1
    outliers[5] = False
    residual = np.where(outliers, rng.standard_normal(outliers.shape), 7).astype(np.float16)
    expected = sparse.outlier_list(residual, outliers, outliers.sum(axis=1))
    np.testing.assert_array_equal(np.repeat(np.arange(37), np.diff(expected.row_ptr)), np.nonzero(outliers)[0])
    nnz = int(outliers.sum())
    for length in (nnz, nnz + 20):
        cols, values = jax.device_get(
            sparse._listed(jnp.asarray(residual), jnp.asarray(outliers), expected.row_ptr, length)
        )
        np.testing.assert_array_equal(cols[:nnz], expected.cols)
        np.testing.assert_array_equal(values[:nnz], expected.values)
        assert not values[nnz:].any()


def test_few_shapes_share_the_large_program(accelerator):
    """Matrices of any shape need one program that solves a panel."""
    accelerator()
    before = panels._solve_panel._cache_size()
    config = SpQRConfig(order="identity", damping=0.5)
    for shape in ((40, 96), (130, 96), (70, 300)):
        w, x = correlated_problem(*shape)
        quantize_weights([w], accumulate_hessian(empty_hessian(shape[1]), x), [config])
    assert panels._solve_panel._cache_size() - before <= 1
