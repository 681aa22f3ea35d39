"""Layers in loops over stacked weights give the same as layers one after the other.

The stacks are those of the GPU kernels; here XLA multiplies by them.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from support.arrays import dense_model, random_array, random_quantized
from support.family_files import torch_config

from spqr_jax import Generator
from spqr_jax.models.families import family_of_hf
from spqr_jax.models.ready import BlockStack, ReadyDecoder, make_ready, stack_blocks
from spqr_jax.models.weights import random_decoder
from spqr_jax.products import BACKENDS, prepare_for
from spqr_jax.products.pallas import PallasMatrix
from spqr_jax.quantized import quantized_leaves

pytest.importorskip("torch", reason="torch is not installed (extra `parity`): the families' configurations need it")

GPU = BACKENDS["mosaic_gpu"]


def quantized(variant, **form):
    values = torch_config(variant).to_dict()
    config = dataclasses.replace(family_of_hf(values).from_hf(values), eos_token_ids=())
    return random_quantized(random_decoder(config, 0), **form)


def in_stacks(model):
    return ReadyDecoder(prepare_for(GPU, model.outer, jnp.float32), stack_blocks(model, GPU), model.config)


@pytest.mark.parametrize(
    "variant",
    ["llama", "gemma3", "mixtral", *(pytest.param(name, marks=pytest.mark.slow) for name in ("falcon 7b", "gpt2"))],
)
def test_same_tokens_as_the_dense_model(variant):
    model = quantized(variant)
    ready = in_stacks(model)
    assert all(isinstance(part, BlockStack) for part in ready.parts)
    assert len(ready.parts) <= 1 + any(kind.sparse for kind in model.config.kinds)
    assert all(isinstance(weight, PallasMatrix) for weight in quantized_leaves(ready.parts))
    prompts = [[5, 9, 17, 4, 80, 33, 21], [3, 44]]
    expected = Generator(dense_model(model))(prompts, max_new_tokens=12)
    assert Generator(ready)(prompts, max_new_tokens=12).tokens == expected.tokens


def test_matrices_that_read_one_input_are_joined():
    block = in_stacks(quantized("llama")).parts[0].block
    assert [name for name in block if name.endswith("proj")] == [
        *("q_proj+k_proj+v_proj", "o_proj", "gate_proj+up_proj", "down_proj")
    ]


def test_different_widths_run_in_one_loop():
    """A size target gives weights different widths."""
    model = quantized("llama")
    widths = iter(np.random.default_rng(0).permutation([2, 3, 4] * 20).tolist())

    def redrawn(name, weight):
        if not name.endswith("proj"):
            return weight
        return dataclasses.replace(random_array(weight.shape, bits=next(widths), seed=len(name)), perm=weight.perm)

    layers = tuple(block.replace({n: redrawn(n, w) for n, w in block.items()}) for block in model.layers)
    model = dataclasses.replace(model, layers=layers)
    ready = in_stacks(model)
    assert len(ready.parts) == 1
    expected = Generator(dense_model(model))([[5, 9, 17]], max_new_tokens=6)
    assert Generator(ready)([[5, 9, 17]], max_new_tokens=6).tokens == expected.tokens


def test_weights_with_their_own_orders_are_not_joined():
    model = quantized("llama")
    block = model.layers[0]
    changed = dataclasses.replace(block.q_proj, perm=block.q_proj.perm[::-1])
    model = dataclasses.replace(model, layers=(block.replace({"q_proj": changed}), *model.layers[1:]))
    ready = in_stacks(model)
    assert "q_proj" in ready.parts[0].block
    expected = Generator(dense_model(model))([[5, 9, 17]], max_new_tokens=6)
    assert Generator(ready)([[5, 9, 17]], max_new_tokens=6).tokens == expected.tokens


def test_a_block_of_a_stack_is_the_block():
    model = quantized("gemma3")
    for block, again in zip(model.layers, in_stacks(model).layers, strict=True):
        assert block.kind == again.kind
        np.testing.assert_array_equal(again.attention_norm, block.attention_norm)
        np.testing.assert_allclose(again.o_proj.to_dense(), block.o_proj.to_dense(), rtol=2e-3, atol=2e-3)


def test_on_a_cpu_blocks_stay_alone(tiny_model):
    assert not any(isinstance(part, BlockStack) for part in make_ready(tiny_model).parts)
