"""Dataclasses out of JSON: whatever stands there, the message names the file and the entry."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from support.problems import TINY

from spqr_jax import DecoderConfig, ModelError, SpQRConfig, SpQRError
from spqr_jax.files.entries import shown
from spqr_jax.rules import LayerRule

CONFIGS = [
    SpQRConfig(),
    SpQRConfig.gptq(group_size=None),
    SpQRConfig.preset("4bit"),
    SpQRConfig.baseline("brecq", steps=3),
    SpQRConfig(rules=(LayerRule("a", skip=True), LayerRule("b", bits=4, outlier_threshold=math.inf))),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_a_quantization_config_comes_back(config):
    assert SpQRConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_a_decoder_config_comes_back():
    stretched = dataclasses.replace(TINY, rope_factors=(1.0,) * 8, local_layers=(1,), sliding_window=4, rope_scale=1)
    for config in (TINY, stretched, dataclasses.replace(TINY, rope_theta=None)):
        assert DecoderConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_older_quantization_configs_are_read():
    values = {"bits": 3, "quantize_head": True}
    assert SpQRConfig.from_json(values).head_bits == 3
    assert SpQRConfig.from_json({"bits": 3, "quantize_head": False}).head_bits is None


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"vocab_size": "256"}, "vocab_size is '256', expected a whole number"),
        ({"vocab_size": None}, "vocab_size is None"),
        ({"vocab_size": 2**31}, "vocab_size is 2147483648"),
        ({"vocab_size": 0}, "vocab_size must be a whole number from 1"),
        ({"num_layers": 5000}, "num_layers must be a whole number from 1 to 4096"),
        (
            {"num_experts": 4096, "experts_per_token": 1, "expert_size": 1, "num_layers": 100},
            "layers exceed 50000 in total",
        ),
        ({"num_experts": 4, "experts_per_token": 1}, "expert_size"),
        ({"num_heads": 2**20, "num_kv_heads": 2**20, "head_dim": 4096}, "heads of size 4096 exceed"),
        ({"rope_dim": 32}, "rope_dim must be at most the head size, 16, got 32"),
        ({"norm_eps": 0.0}, "norm_eps must be a finite number above 0"),
        ({"norm_eps": math.nan}, "norm_eps is nan"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"rope_factors": [1.0] * 7 + [0.0]}, "rope_factors"),
        ({"rope_factors": 1.0}, "rope_factors is 1.0, expected a list"),
        ({"eos_token_ids": [-1]}, "eos_token_ids"),
        ({"local_layers": [0] * 5000, "sliding_window": 4}, "at most 4096"),
        ({"tied_head": 1}, "tied_head is 1, expected true or false"),
        ({"norm": ["rms"]}, "norm is"),
        ({"norm": "batch"}, "norm is 'batch', expected one of rms, layer"),
        ({"\ud800": 1}, "unknown entries"),
    ],
)
def test_a_bad_decoder_config_is_refused(changes, says):
    with pytest.raises(ModelError, match=says) as caught:
        DecoderConfig.from_json(TINY.to_json() | changes, "some/file")
    assert "some/file" in str(caught.value)
    str(caught.value).encode()  # it can be printed


@pytest.mark.parametrize("values", [None, [], "text", 5, [["bits", 3]]])
def test_what_is_no_object_is_refused(values):
    for kind in (DecoderConfig, SpQRConfig):
        with pytest.raises(SpQRError, match="expected an object"):
            kind.from_json(values)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"bits": 3.5}, "bits is 3.5"),
        ({"bits": True}, "bits is True"),
        ({"bits": 9}, r"bits must lie in 2\.\.8"),
        ({"order": "random"}, "order is 'random'"),
        ({"damping": "much"}, "damping is 'much'"),
        ({"damping": 10**400}, "damping is"),
        ({"bit_choices": {"3": 1}}, "bit_choices is"),
        ({"rules": 5}, "rules is 5, expected a list"),
        ({"rules": ["down_proj=4"]}, "a rule is 'down_proj=4'"),
        ({"rules": [{"bits": 4}]}, "lacks pattern"),
        ({"rules": [{"pattern": "x{99999999999}"}]}, "not a regular expression"),
        ({"rules": [{"pattern": "(" * 5000 + ")" * 5000}]}, "not a regular expression"),
        ({"rules": [{"pattern": "x", "outlier_threshold": "infinite"}]}, "outlier_threshold is 'infinite'"),
        ({"colour": "blue"}, "unknown entries 'colour'"),
    ],
)
def test_a_bad_quantization_config_is_refused(changes, says):
    with pytest.raises(SpQRError, match=says) as caught:
        SpQRConfig.from_json(SpQRConfig().to_json() | changes, "some/file")
    assert "some/file" in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_values_are_shown_shortened():
    shared = ()
    for _ in range(60):
        shared = (shared, shared)  # 2^60 empty tuples, if they were written
    for value, says in [
        ([1, 2, 3, 4, 5, 6], "[1, 2, 3, 4, 5, ...] (6 values)"),
        (np.arange(7), "[0, 1, 2, 3, 4, ...] (7 values)"),
        (np.zeros((3, 4), np.float32), "an array of type float32 and shape (3, 4)"),
        ("x" * 100, "'" + "x" * 56 + "..."),
        (shared, "a value too large to show"),
        ([[0] * 10**6], "a value too large to show"),
        (10**5000, "a value nested too deeply or too long to show"),
        (dict.fromkeys("abcdef"), "an object of 6 entries"),
        ({"a": [1, None]}, "{'a': [1, None]}"),
    ]:
        assert shown(value) == says
