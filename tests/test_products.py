"""The table of backends: which one a device gets, what naming one means, and products through prepared weights."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.arrays import dense, dense_model, random_array, random_quantized

from pallas_kernels import spqr_matmul
from spqr_jax import Generator, SpQRError, linear, prepare
from spqr_jax.models.ready import ReadyDecoder
from spqr_jax.products import BACKENDS, default_implementation, linear_all, prepare_for, take_rows
from spqr_jax.products.pallas import PallasMatrix
from spqr_jax.quantized import quantized_leaves

H100 = spqr_matmul.Target("gpu", "H100", (9, 0), 132)
V100 = spqr_matmul.Target("gpu", "V100", (7, 0), 80)
TPU = spqr_matmul.Target("tpu", "TPU v5 lite", (0, 0), 1)
KERNELS = ("mosaic_gpu", "triton", "tpu")


@pytest.mark.parametrize(
    ("target", "mosaic", "triton", "wanted"),
    [
        (H100, "", "", "mosaic_gpu"),
        (H100, "too old", "", "triton"),
        (H100, "too old", "gone", "xla"),
        (V100, "", "", "xla"),
        (TPU, "", "", "tpu"),
    ],
)
def test_choice_by_device(monkeypatch, target, mosaic, triton, wanted):
    monkeypatch.setattr(spqr_matmul, "target", lambda: target)
    monkeypatch.setattr(spqr_matmul.api, "why_no_mosaic", lambda _: mosaic)
    monkeypatch.setattr(spqr_matmul.api, "why_no_triton", lambda: triton)
    assert default_implementation() == wanted


def test_naming_a_backend_means_it_or_an_error():
    tree = {"w": random_array((32, 64))}
    with pytest.raises(SpQRError, match="mosaic_gpu cannot run here: mosaic_gpu needs a GPU, but this device is a cpu"):
        prepare(tree, implementation="mosaic_gpu")
    with pytest.raises(SpQRError, match="implementation must be one of cpu, mosaic_gpu, triton, tpu, xla, got 'cuda'"):
        prepare(tree, implementation="cuda")
    with pytest.raises(SpQRError, match="int8 activations need the native CPU kernels"):
        prepare(tree, implementation="xla", int8_activations=True)


@pytest.mark.parametrize(
    ("form", "why"),
    [
        ({"bits": 8}, "codes of 8 bits"),
        ({"group_size": 24}, "groups of 24"),
        ({"stats_bits": None}, "without a second level"),
        ({"stats_bits": 6}, "codes of 6 bits"),
        ({"tile": 8}, "second-level groups of 8 rows"),
    ],
)
def test_a_format_that_is_not_read(form, why):
    """It becomes dense with a warning, but not where the backend was named."""
    array = random_array((64, 96), **form)
    with pytest.raises(SpQRError, match=f"tpu does not read a weight of shape .*{why}"):
        prepare_for(BACKENDS["tpu"], array, jnp.float32, strict=True)
    with pytest.warns(UserWarning, match=why):
        weight = prepare_for(BACKENDS["tpu"], {"w": array}, jnp.float32)["w"]
    np.testing.assert_array_equal(weight, array.to_dense())


@pytest.mark.parametrize("kernel", KERNELS)
def test_prepared_weights_multiply(kernel):
    array = random_array((64, 256))
    weight = prepare_for(BACKENDS[kernel], array, None)
    assert isinstance(weight, PallasMatrix)
    assert prepare_for(BACKENDS[kernel], weight, None) is weight
    x = np.random.default_rng(0).standard_normal((3, 256)).astype(np.float32)
    want = x @ dense(array, np.float32).T
    with jax.default_matmul_precision("highest"):
        np.testing.assert_allclose(jax.jit(linear)(weight, x), want, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(jnp.asarray(x) @ weight.T, want, rtol=1e-4, atol=1e-4)
        for product in linear_all([weight, weight], jnp.asarray(x)):
            np.testing.assert_allclose(product, want, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(take_rows(weight, jnp.array([3, 99])), dense(array)[[3, 63]], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(weight.to_dense(), dense(array), rtol=1e-4, atol=1e-4)
    assert repr(weight) == "PallasMatrix((64, 256))"
    with pytest.raises(SpQRError, match=re.escape("activations (3, 255) do not fit")):
        linear(weight, jnp.asarray(x[:, 1:]))


@pytest.mark.parametrize(
    "kernel", [pytest.param("triton", marks=pytest.mark.slow), pytest.param("tpu", marks=pytest.mark.slow)]
)
def test_generation_from_packed_weights(kernel, tiny_model):
    """A whole model, embedding and head too, says the same from packed weights as from dense ones."""
    config = dataclasses.replace(tiny_model.config, num_layers=1)
    one_block = dataclasses.replace(tiny_model, config=config, layers=tiny_model.layers[:1])
    small = random_quantized(one_block, outer=True, outliers=0.05)
    prompts = [[5, 6, 7], [8]]
    backend = BACKENDS[kernel]
    with jax.default_matmul_precision("highest"):
        want = Generator(dense_model(small))(prompts, max_new_tokens=6, stop_tokens=())
        outer, layers = prepare_for(backend, (small.outer, small.layers), jnp.float32)
        ready = ReadyDecoder(outer, layers, small.config)
        assert len(quantized_leaves(ready)) == 7 * len(small.layers) + 2
        assert Generator(ready)(prompts, max_new_tokens=6, stop_tokens=()).tokens == want.tokens
