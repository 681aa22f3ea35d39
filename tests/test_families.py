"""Every family against transformers' own model, and through quantization, checkpoints and files."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_files import VARIANTS, torch_model, write_gguf

from spqr_jax import Generator, ModelError, SpQRConfig, forward, quantize
from spqr_jax.blocks import collect
from spqr_jax.checkpoint import load, save
from spqr_jax.models.families import FAMILIES, family_of_hf
from spqr_jax.models.gguf import GGUFFile, open_gguf
from spqr_jax.models.hf import hf_config, hf_tensors, open_hf, write_hf
from spqr_jax.models.weights import random_decoder

torch = pytest.importorskip("torch", reason="torch is not installed (extra `parity`): transformers' models cannot run")

each_family = pytest.mark.parametrize("variant", VARIANTS)


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


@each_family
def test_logits_match_under_padding(pair, variant):
    theirs, ours = pair(variant)
    tokens, padding = random_tokens(2, 60), np.array([0, 23])
    expected, got = their_logits(theirs, tokens, padding), forward(ours, jnp.asarray(tokens), jnp.asarray(padding))
    for row, first in enumerate(padding):
        np.testing.assert_allclose(got[row, first:], expected[row, first:], atol=1e-4, rtol=1e-4)


@each_family
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


@each_family
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


@each_family
def test_quantized_saved_loaded_and_run(pair, variant, tmp_path):
    _, ours = pair(variant)
    batches = [random_tokens(2, 48, seed).astype(np.int32) for seed in range(2)]
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
