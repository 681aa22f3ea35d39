"""The decoder against transformers, and loading from every format."""

from __future__ import annotations

import dataclasses

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.family_files import write_gguf
from support.model_files import write_hf

from spqr_jax import ModelError, forward
from spqr_jax.blocks import collect
from spqr_jax.models.decoder import random_decoder
from spqr_jax.models.families import family_of_hf
from spqr_jax.models.gguf import GGUFFile, open_gguf
from spqr_jax.models.hf import hf_config, hf_tensors, open_hf


def assert_same_tree(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


# ---- the forward pass ------------------------------------------------------------------


def test_left_padding_changes_nothing(tiny_model):
    tokens = jnp.arange(10, dtype=jnp.int32)[None] + 5
    padded = jnp.concatenate([jnp.zeros((1, 6), jnp.int32), tokens], axis=1)
    plain = forward(tiny_model, tokens)
    np.testing.assert_allclose(forward(tiny_model, padded, jnp.array([6]))[:, 6:], plain, atol=2e-5)


def test_long_sequences_attend_in_chunks_as_short_ones_do(tiny_config):
    model = random_decoder(dataclasses.replace(tiny_config, max_positions=512), seed=3)
    tokens = jax.random.randint(jax.random.key(0), (1, 300), 0, tiny_config.vocab_size)
    whole = forward(model, tokens)
    np.testing.assert_allclose(forward(model, tokens[:, :60]), whole[:, :60], atol=2e-5)


# ---- loading ----------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
def test_safetensors_round_trip(tmp_path, tiny_model, shards):
    assert_same_tree(collect(open_hf(write_hf(tmp_path / "m", tiny_model, shards), jnp.float32)), tiny_model)


def test_weights_take_the_type_asked_for(tmp_path, tiny_model):
    loaded = collect(open_hf(write_hf(tmp_path / "m", tiny_model), jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {jnp.dtype(jnp.bfloat16)}
    again = write_hf(tmp_path / "b", loaded)
    assert_same_tree(collect(open_hf(again, jnp.bfloat16)), loaded)


def test_gguf_round_trip_undoes_the_row_order(tmp_path, tiny_model):
    loaded = collect(open_gguf(GGUFFile(write_gguf(tmp_path / "m.gguf", tiny_model)), jnp.float32))
    expected = dataclasses.replace(tiny_model.config, norm_eps=float(np.float32(tiny_model.config.norm_eps)))
    assert loaded.config == expected  # GGUF keeps it as float32
    assert_same_tree(loaded, tiny_model)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0"])
def test_gguf_types_dequantize(tmp_path, tiny_model, kind):
    path = write_gguf(tmp_path / "m.gguf", tiny_model, getattr(gguf.GGMLQuantizationType, kind))
    loaded = collect(open_gguf(GGUFFile(path), jnp.float32))
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(tiny_model), strict=True):
        assert np.linalg.norm(a - b) <= 0.12 * np.linalg.norm(b)


def test_every_problem_is_reported_at_once(tmp_path, tiny_model):
    tensors = hf_tensors(tiny_model)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.norm.weight"] = np.ones(3, np.float32)
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.ones(64, np.float32)
    with pytest.raises(ModelError) as caught:
        open_hf(write_hf(tmp_path / "m", tiny_model, tensors=tensors), jnp.float32)
    for word in ("missing layers.1.up_proj (96, 64)", "norm.weight has shape (3,), expected (64,)", "q_proj.bias"):
        assert word in str(caught.value)


def test_non_finite_weights_are_named(tmp_path, tiny_model):
    tensors = hf_tensors(tiny_model)
    for name in ("model.layers.1.mlp.up_proj.weight", "model.layers.1.self_attn.k_proj.weight"):
        tensors[name] = np.full_like(tensors[name], np.nan)
    source = open_hf(write_hf(tmp_path / "m", tiny_model, tensors=tensors), jnp.float32)
    source.block(0)
    with pytest.raises(ModelError, match=r"k_proj.*up_proj"):
        source.block(1)


def damage(directory, what):
    file = directory / "model.safetensors"
    if what == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif what == "no weights":
        file.unlink()
    elif what == "no config":
        (directory / "config.json").unlink()
    elif what == "bad config":
        (directory / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("truncated", "safetensors"),
        ("no weights", "no pickles"),
        ("no config", "does not exist"),
        ("bad config", "not valid JSON"),
    ],
)
def test_damaged_directories_give_clear_errors(tmp_path, tiny_model, what, says):
    damage(write_hf(tmp_path / "m", tiny_model), what)
    with pytest.raises(ModelError, match=says):
        collect(open_hf(tmp_path / "m", jnp.float32))


def test_a_missing_shard_is_named(tmp_path, tiny_model):
    write_hf(tmp_path / "m", tiny_model, shards=2)
    (tmp_path / "m" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match="model-00002-of-00002"):
        open_hf(tmp_path / "m", jnp.float32)


def test_a_broken_gguf_is_refused(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + b"\x00" * 40)
    with pytest.raises(ModelError, match="cannot be read as GGUF"):
        GGUFFile(path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"architectures": ["FooForCausalLM"], "model_type": "foo"},
            "Foo.*supported: llama .*adding-a-model",
        ),
        ({"hidden_act": "tanh"}, "tanh"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"num_key_value_heads": 3}, "cannot share"),
        ({"model_type": "falcon", "alibi": True}, "alibi"),
        ({"model_type": "opt", "do_layer_norm_before": False, "ffn_dim": 8}, "do_layer_norm_before"),
        ({"model_type": "gpt2"}, "lacks n_embd"),
        ({"model_type": "mixtral", "num_experts_per_tok": 9, "num_local_experts": 4}, "9 experts a token of 4"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ],
)
def test_what_we_do_not_run_is_refused(tiny_config, changes, says):
    values = hf_config(tiny_config) | changes
    with pytest.raises(ModelError, match=says):
        family_of_hf(values).from_hf(values)


def test_a_configuration_without_its_sizes_is_refused():
    for kind in ("llama", "falcon", "gpt2", "opt", "mixtral"):
        with pytest.raises(ModelError, match=r"config\.json lacks"):
            family_of_hf({"model_type": kind}).from_hf({"model_type": kind})
