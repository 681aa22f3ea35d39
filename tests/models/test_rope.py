"""Rotary scaling as files describe it: against transformers' own formulas, and by llama.cpp's rule for GGUF."""

from __future__ import annotations

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from support.family_files import write_gguf
from support.model_files import write_hf

from spqr_jax import ModelError
from spqr_jax.models.families import FAMILIES
from spqr_jax.models.families.rope import llama3_factors, rope_entries
from spqr_jax.models.gguf import GGUFFile, open_gguf
from spqr_jax.models.hf import hf_config, open_hf

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip
SHORT = [1.0 + 0.1 * i for i in range(8)]
SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "linear, named as before": {"type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": LLAMA3,
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    "yarn without its original context": {"rope_type": "yarn", "factor": 2.0},
    "yarn with settings": {"rope_type": "yarn", "factor": 8.0, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
    "yarn with scales": {"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.7},
    "yarn with a factor on attention": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.25},
    "longrope": {"rope_type": "longrope", "factor": 4.0, "short_factor": SHORT, "long_factor": SHORT},
    "a base inside": {"rope_type": "default", "rope_theta": 1e6},
    "a base and a part inside": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5, "partial_rotary_factor": 0.5},
}


def values_with(tiny_config, **entries):
    values = hf_config(tiny_config) | {"max_position_embeddings": 4096}
    return {name: value for name, value in (values | entries).items() if value is not None}


def of_transformers(values):
    """Inverse frequencies and the factor on cosines and sines."""
    pytest.importorskip("torch", reason="torch is not installed (extra `parity`): transformers' formulas cannot run")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = transformers.LlamaConfig(**values)
    entries = config.rope_parameters
    if entries["rope_type"] == "default":
        dim = int(config.head_dim * entries.get("partial_rotary_factor", 1.0))
        return entries["rope_theta"] ** -(np.arange(0, dim, 2) / dim), 1.0
    frequencies, scale = ROPE_INIT_FUNCTIONS[entries["rope_type"]](config, "cpu")
    return frequencies.numpy(), scale


def of_ours(config):
    divisors = np.ones(config.rotated // 2) if config.rope_factors is None else np.array(config.rope_factors)
    return config.rope_theta ** -(np.arange(0, config.rotated, 2) / config.rotated) / divisors, config.rope_scale


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
@pytest.mark.parametrize("where", ["rope_parameters", "rope_scaling", "added by hand"])
def test_frequencies_are_those_of_transformers(tiny_config, scaling, where):
    entries = {"rope_parameters": None, "rope_scaling": None}
    if where == "added by hand":  # to a file that transformers 5 wrote, as model cards tell users to
        entries = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "rope_scaling": scaling}
    else:
        entries[where] = scaling
    values = values_with(tiny_config, **entries)
    ours = FAMILIES["llama"].from_hf(json.loads(json.dumps(values)))
    theirs = of_transformers(json.loads(json.dumps(values)))
    np.testing.assert_allclose(of_ours(ours)[0], theirs[0], rtol=2e-6)  # theirs are float32
    np.testing.assert_allclose(of_ours(ours)[1], theirs[1], rtol=1e-6)


def test_yarn_lengthens_the_context_and_dynamic_scaling_does_not(tiny_config):
    def context(scaling):
        values = values_with(tiny_config, rope_parameters=None, rope_scaling=scaling)
        return FAMILIES["llama"].from_hf(values).max_positions

    assert context({"rope_type": "yarn", "factor": 4.0}) == 4 * 4096
    assert context({"rope_type": "dynamic", "factor": 4.0}) == 4096


@pytest.mark.parametrize(
    ("scaling", "says"),
    [
        ({"rope_type": "mrope", "mrope_section": [1, 2]}, "rotary scaling 'mrope' is not supported"),
        ({"rope_type": "linear"}, "lacks rope_scaling.factor"),
        ({"factor": 4.0}, "type 'default' has unknown entries: factor"),
        ({"rope_type": "dynamic", "factor": 2.0, "alpha": 1000.0}, "unknown entries: alpha"),
        ({"rope_type": "linear", "factor": "four"}, "rope_scaling.factor is 'four'"),
        (LLAMA3 | {"high_freq_factor": 1.0}, "high_freq_factor is 1.0, expected more than low_freq_factor"),
        ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}, "8 positive numbers"),
        ([1, 2], "rope_scaling is .* expected an object"),
        (
            {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 7.0},
            "partial_rotary_factor is 7.0, expected a number above 0 and at most 1",
        ),
    ],
)
def test_what_is_there_and_not_understood_is_refused(tiny_config, scaling, says):
    with pytest.raises(ModelError, match=says):
        FAMILIES["llama"].from_hf(values_with(tiny_config, rope_scaling=scaling))


def test_gemma3_scales_the_blocks_that_see_everything():
    values = {"model_type": "gemma3_text", "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    config = FAMILIES["gemma3_text"].from_hf(values)
    assert set(config.rope_factors) == {8.0}
    assert (config.rope_theta, config.local_rope_theta) == (1e6, 1e4)
    inside = {"model_type": "gemma3", "text_config": {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}}
    assert FAMILIES["gemma3_text"].from_hf(inside) == config


# ---- written again ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "llama3", "a base inside"])
def test_entries_are_written_in_the_form_that_they_had(tiny_config, name):
    config = FAMILIES["llama"].from_hf(values_with(tiny_config, rope_parameters=SCALINGS[name]))
    written = hf_config(config)["rope_parameters"]
    assert {key: written[key] for key in SCALINGS[name]} == SCALINGS[name]
    assert FAMILIES["llama"].from_hf(hf_config(config)) == config


@pytest.mark.parametrize("original", [32, 64, 8192])
@pytest.mark.parametrize(("head_dim", "theta"), [(16, 1e4), (64, 5e5), (128, 5e5)])
def test_llama3_is_told_from_its_factors(original, head_dim, theta):
    """As GGUF files hold them, in float32."""
    factors = llama3_factors(32.0, 1.0, 4.0, original, theta, head_dim)
    entries = rope_entries(theta, tuple(np.float32(factors).tolist()), 1.0, 2 * original)
    assert entries["rope_type"] == "llama3"
    again = FAMILIES["llama"].from_hf({"rope_parameters": entries, "head_dim": head_dim})
    np.testing.assert_allclose(again.rope_factors, factors, rtol=1e-5)


def test_other_factors_are_written_as_longrope():
    assert rope_entries(1e4, (1.0, 2.0, 7.0), 1.0, 128)["rope_type"] == "longrope"


# ---- GGUF ---------------------------------------------------------------------------------------


def gguf_config(path, tiny_model, keys):
    return open_gguf(GGUFFile(write_gguf(path / "m.gguf", tiny_model, keys=keys)), jnp.float32).config


@pytest.mark.parametrize(
    ("keys", "factor"),
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, 4.0),
        ({"rope.scaling.factor": 4.0}, 4.0),
        ({"rope.scale_linear": 2.0}, 2.0),
        ({"rope.scale_linear": 2.0, "rope.scaling.factor": 4.0}, 4.0),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
        ({"rope.scaling.factor": 0.0}, None),
        ({"rope.scaling.type": "linear"}, None),
        ({}, None),
    ],
)
def test_old_and_missing_keys_are_read_as_llama_cpp_reads_them(tmp_path, tiny_model, keys, factor):
    factors = gguf_config(tmp_path, tiny_model, keys).rope_factors
    assert factors == (None if factor is None else (factor,) * (tiny_model.config.head_dim // 2))


def test_yarn_in_a_header_is_yarn_in_a_config_json(tmp_path, tiny_model):
    keys = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 64}  # fmt: skip
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    values = hf_config(tiny_model.config) | {"rope_scaling": scaling}
    ours, expected = gguf_config(tmp_path, tiny_model, keys), FAMILIES["llama"].from_hf(values)
    np.testing.assert_allclose(ours.rope_factors, expected.rope_factors, rtol=1e-6)  # the header holds float32
    assert ours.rope_scale == pytest.approx(0.1 * math.log(4) + 1)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"rope.scaling.type": "sideways"}, "scaling.type is 'sideways', expected none, linear, yarn"),
        ({"rope.scaling.alpha": 1000.0}, "not supported: .*scaling.alpha"),
        ({"rope.scaling.factor": "4"}, "scaling.factor is '4', expected a finite number"),
        ({"rope.freq_base": -1.0}, "freq_base is -1.0"),
        ({"rope.dimension_count": 64}, "64 of 16 dimensions of a head"),
    ],
)
def test_headers_that_are_not_understood_are_refused(tmp_path, tiny_model, keys, says):
    with pytest.raises(ModelError, match=says):
        gguf_config(tmp_path, tiny_model, keys)


def test_a_scaling_added_by_hand_reaches_the_model(tmp_path, tiny_model):
    config = hf_config(tiny_model.config) | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    assert set(open_hf(write_hf(tmp_path / "m", tiny_model, config=config), jnp.float32).config.rope_factors) == {4.0}
