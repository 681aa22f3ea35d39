"""Every family against transformers' own model, and through quantization, checkpoints and files."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.family_files import VARIANTS, torch_config, torch_model, write_gguf

from spqr_jax import Generator, SpQRConfig, forward, quantize
from spqr_jax.checkpoint import load, save
from spqr_jax.models.families import family_of_hf
from spqr_jax.models.gguf import GGUFFile, open_gguf
from spqr_jax.models.hf import hf_config, open_hf, write_hf
from spqr_jax.models.weights import random_decoder
from spqr_jax.stream.blocks import collect

torch = pytest.importorskip("torch", reason="torch is not installed (extra `parity`): transformers' models cannot run")

each_family = pytest.mark.parametrize("variant", VARIANTS)


def mostly_slow(*quick):
    """Each family, but only some in the quick tests."""
    marks = [pytest.param(name, marks=[] if name in quick else [pytest.mark.slow]) for name in VARIANTS]
    return pytest.mark.parametrize("variant", marks)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(transformers' model, ours read from its files), made once."""
    made = {}

    def get(variant):
        if variant not in made:
            theirs = torch_model(variant)
            directory = tmp_path_factory.mktemp("theirs")
            theirs.save_pretrained(directory)
            made[variant] = theirs, collect(open_hf(directory, jnp.float32))
        return made[variant]

    return get


def config_of(variant):
    values = torch_config(variant).to_dict()
    return family_of_hf(values).from_hf(values)


def their_logits(model, tokens, padding=None):
    mask = None if padding is None else torch.from_numpy(np.arange(tokens.shape[1]) >= padding[:, None]).long()
    places = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(torch.from_numpy(tokens), attention_mask=mask, position_ids=places).logits.numpy()


def random_tokens(batch, length, seed=0):
    return np.random.default_rng(seed).integers(3, 256, (batch, length))


@each_family
def test_logits_match(pair, variant):
    theirs, ours = pair(variant)
    tokens = random_tokens(2, 100)
    np.testing.assert_allclose(forward(ours, jnp.asarray(tokens)), their_logits(theirs, tokens), atol=1e-4, rtol=1e-4)


@mostly_slow("gemma3", "falcon 40b", "opt")
def test_logits_match_under_padding(pair, variant):
    theirs, ours = pair(variant)
    tokens, padding = random_tokens(2, 60), np.array([0, 23])
    expected, got = their_logits(theirs, tokens, padding), forward(ours, jnp.asarray(tokens), jnp.asarray(padding))
    for row, first in enumerate(padding):
        np.testing.assert_allclose(got[row, first:], expected[row, first:], atol=1e-4, rtol=1e-4)


@mostly_slow("mistral", "gemma3", "falcon 7b", "gpt2", "mixtral")
def test_greedy_text_matches(pair, variant):
    """With the cache, and prompts of different lengths in one batch."""
    theirs, ours = pair(variant)
    tokens = random_tokens(2, 40, seed=1)
    prompts = [tokens[0, :37].tolist(), tokens[1, :11].tolist()]
    made = Generator(ours)(prompts, max_new_tokens=12, stop_tokens=())
    for prompt, got in zip(prompts, made.tokens, strict=True):
        with torch.no_grad():
            greedy = theirs.generate(torch.tensor([prompt]), max_new_tokens=12, min_new_tokens=12, do_sample=False)
        assert got == greedy[0, len(prompt) :].tolist()


@mostly_slow("gemma2", "phi3", "falcon 11b", "gpt2", "qwen3_moe")
def test_written_directories_are_transformers_models(pair, variant, tmp_path):
    import transformers

    theirs, ours = pair(variant)
    write_hf(tmp_path / "m", ours)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32).eval()
    assert type(again) is type(theirs)
    tokens = random_tokens(1, 70)
    np.testing.assert_allclose(their_logits(again, tokens), their_logits(theirs, tokens), atol=1e-5, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(collect(open_hf(tmp_path / "m", jnp.float32))), jax.tree.leaves(ours), strict=True):
        np.testing.assert_array_equal(a, b)


@mostly_slow("gemma3", "opt")
def test_quantized_saved_loaded_and_run(pair, variant, tmp_path):
    _, ours = pair(variant)
    batches = [random_tokens(4, 48, seed).astype(np.int32) for seed in range(4)]  # enough for every expert
    quantized = quantize(ours, batches, SpQRConfig(bits=4, head_bits=8, outlier_threshold=0.5))
    save(tmp_path / "m", quantized, SpQRConfig())
    loaded = load(tmp_path / "m")
    assert loaded.config == ours.config
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(quantized), strict=True):
        np.testing.assert_array_equal(a, b)
    tokens = jnp.asarray(random_tokens(1, 60))
    dense, rounded = forward(ours, tokens), forward(loaded, tokens)
    assert np.corrcoef(np.ravel(dense), np.ravel(rounded))[0, 1] > 0.9
    text = Generator(loaded)([tokens[0, :20].tolist()], max_new_tokens=6, stop_tokens=())
    assert len(text.tokens[0]) == 6


# ---- GGUF -------------------------------------------------------------------------------

# Name -> (variant, changes to it that make it one that GGUF can say, entries of the header).
GGUF_VARIANTS = {
    "llama": ("llama", {}, {}),
    "mistral": ("mistral", {}, {"attention.sliding_window": 24}),
    "qwen2": ("qwen2", {}, {}),
    "qwen3": ("qwen3", {}, {}),
    "gemma2": (
        "gemma2",
        {"query_scale": 0.25},
        {"attention.sliding_window": 24, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    ),
    "gemma3": (
        "gemma3",
        {"query_scale": 0.25, "num_layers": 6, "local_layers": (0, 1, 2, 3, 4), "rope_factors": None},
        {"attention.sliding_window": 24},
    ),
    "phi3": ("phi3", {}, {"attention.sliding_window": 24}),
    "falcon 7b": ("falcon 7b", {}, {}),
    "falcon 40b": ("falcon 40b", {"qkv_bias": False, "o_bias": False, "mlp_bias": False}, {}),
    "gpt2": ("gpt2", {}, {}),
    "mixtral": (
        "mixtral",
        {"sliding_window": None, "local_layers": ()},
        {"expert_count": 4, "expert_used_count": 2},
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {"dense_layers": ()},
        {"expert_count": 6, "expert_used_count": 3, "expert_feed_forward_length": 32},
    ),
}
READ_BY_TRANSFORMERS = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "falcon 7b", "gpt2", "qwen3_moe")


def gguf_model(name):
    variant, changes, keys = GGUF_VARIANTS[name]
    config = dataclasses.replace(config_of(variant), **changes)
    return random_decoder(config, seed=5), keys


@pytest.mark.parametrize("name", GGUF_VARIANTS)
def test_gguf_files_are_read_back(tmp_path, name):
    model, keys = gguf_model(name)
    loaded = collect(open_gguf(GGUFFile(write_gguf(tmp_path / "m.gguf", model, keys=keys)), jnp.float32))
    wanted = dataclasses.replace(model.config, norm_eps=loaded.config.norm_eps)  # GGUF keeps it as float32
    assert loaded.config == wanted
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(model), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-7)  # Gemma's norms have a 1 added and taken away


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("llama", "gemma3", "gpt2") else [pytest.mark.slow])
        for name in READ_BY_TRANSFORMERS
    ],
)
def test_gguf_files_mean_the_same_to_transformers(tmp_path, name):
    """It knows from llama.cpp's converter in which order rows lie, and what is added to norms."""
    import transformers

    model, keys = gguf_model(name)
    write_gguf(tmp_path / "m.gguf", model, keys=keys)
    config = transformers.AutoConfig.for_model(**hf_config(model.config))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", config=config, dtype=torch.float32
    ).eval()
    tokens = random_tokens(1, 40)
    np.testing.assert_allclose(forward(model, jnp.asarray(tokens)), their_logits(theirs, tokens), atol=1e-4, rtol=1e-4)
