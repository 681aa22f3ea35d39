"""The decoder against transformers, and loading from every format."""

from __future__ import annotations

import dataclasses

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from support.family_files import write_gguf
from support.model_files import write_hf

from spqr_jax import ModelError, forward
from spqr_jax.models.decoder import random_decoder
from spqr_jax.models.families import FAMILIES, family_of_hf
from spqr_jax.models.gguf import GGUFFile, open_gguf
from spqr_jax.models.hf import hf_config, hf_tensors, open_hf
from spqr_jax.stream.blocks import collect


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
        ("no weights", "such as pickles, are not read"),
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
        ({"rope_parameters": {"rope_type": "mrope", "factor": 2.0}}, "mrope.*expected one of default, linear"),
        ({"num_key_value_heads": 3}, "cannot share"),
        ({"model_type": "falcon", "alibi": True}, "alibi"),
        ({"model_type": "opt", "do_layer_norm_before": False, "ffn_dim": 8}, "do_layer_norm_before"),
        ({"model_type": "gpt2", "n_embd": None}, "lacks n_embd"),
        (
            {"model_type": "mixtral", "num_experts_per_tok": 9, "num_local_experts": 4},
            r"experts_per_token must lie in 1\.\.4, the number of experts, got 9",
        ),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ],
)
def test_what_we_do_not_run_is_refused(tiny_config, changes, says):
    values = hf_config(tiny_config) | changes
    with pytest.raises(ModelError, match=says):
        family_of_hf(values).from_hf(values)


def test_sizes_that_the_file_leaves_out_on_purpose_have_no_default():
    for kind in ("llama", "falcon", "opt", "mixtral"):
        values = {"model_type": kind, "hidden_size": None}
        with pytest.raises(ModelError, match=r"config\.json lacks hidden_size"):
            family_of_hf(values).from_hf(values)


@pytest.mark.parametrize("kind", [name for name in FAMILIES if name != "falcon"])
def test_absent_entries_are_what_transformers_takes_for_them(kind):
    theirs = transformers.CONFIG_MAPPING[kind]().to_dict()
    ours = FAMILIES[kind].from_hf({"model_type": kind})
    for name in ("bos_token_id", "eos_token_id"):  # several files tell of these
        theirs.pop(name, None)
    assert ours == FAMILIES[kind].from_hf(theirs)


@pytest.mark.parametrize(
    ("entry", "value", "says"),
    [
        ("num_hidden_layers", "two", "num_hidden_layers is 'two', expected a whole number"),
        ("num_attention_heads", 0, "num_attention_heads is 0"),
        ("vocab_size", [256], r"vocab_size is \[256\]"),
        ("hidden_size", 64.5, "hidden_size is 64.5"),
        ("rms_norm_eps", "1e-5", "rms_norm_eps is '1e-5', expected a finite number"),
        ("tie_word_embeddings", "false", "tie_word_embeddings is 'false', expected true or false"),
        ("eos_token_id", ["</s>"], "eos_token_id is '</s>'"),
        ("rope_parameters", 4.0, "rope_parameters is 4.0, expected an object"),
        ("rope_theta", True, "rope_theta is True"),
        ("architectures", {"a": 1}, "architectures is"),
        ("hidden_act", ["silu"], "hidden_act is"),
        ("num_hidden_layers", 10**9, "num_hidden_layers is 1000000000"),
    ],
)
def test_entries_of_a_wrong_type_are_named_with_their_file(tmp_path, tiny_model, entry, value, says):
    config = hf_config(tiny_model.config)
    if entry == "rope_theta":
        del config["rope_parameters"]
    write_hf(tmp_path / "m", tiny_model, config=config | {entry: value})
    with pytest.raises(ModelError, match=says) as caught:
        open_hf(tmp_path / "m", jnp.float32)
    assert str(tmp_path / "m" / "config.json") in str(caught.value)


def test_a_head_that_differs_from_the_embedding_is_kept_whatever_the_flag_says(tmp_path, tiny_model):
    values = hf_config(tiny_model.config)
    write_hf(tmp_path / "m", tiny_model, config=values | {"tie_word_embeddings": True})
    with pytest.warns(UserWarning, match=r"lm_head\.weight is there and differs"):
        loaded = collect(open_hf(tmp_path / "m", jnp.float32))
    assert_same_tree(loaded, tiny_model)
    tensors = hf_tensors(tiny_model)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    write_hf(tmp_path / "same", tiny_model, config=values | {"tie_word_embeddings": True}, tensors=tensors)
    assert open_hf(tmp_path / "same", jnp.float32).config.tied_head  # pytest makes a warning an error


def test_weights_beyond_the_type_asked_for_say_which_type_holds_them(tmp_path, tiny_model):
    tensors = hf_tensors(tiny_model)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name] * np.float32(1e7)
    write_hf(tmp_path / "m", tiny_model, tensors=tensors)
    with pytest.raises(ModelError, match=r"up_proj.*float16 cannot hold.*bfloat16"):
        open_hf(tmp_path / "m", jnp.float16).block(0)
    open_hf(tmp_path / "m", jnp.bfloat16).block(0)
