"""A model leaves in the form in which it came: configuration, generation settings, chat template, tokenizer."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.command import spqr
from support.family_files import write_gguf
from support.model_files import byte_tokenizer, write_hf

from spqr_jax.models.hf import hf_config, hf_tensors
from spqr_jax.resolve import open_model

RTN = ["--method", "rtn", "--bits", "4", "--group-size", "16", "--head-bits", "none"]
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
AS_IT_CAME = ("generation_config.json", "chat_template.jinja", "tokenizer_config.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model):
    folder = tmp_path_factory.mktemp("form")
    values = hf_config(tiny_model.config)
    del values["rope_parameters"], values["head_dim"]
    values |= {"rope_theta": 10000.0, "rope_scaling": LLAMA3, "torch_dtype": "bfloat16", "my_program": {"keeps": [1]}}
    write_hf(folder / "m", tiny_model, config=values)
    byte_tokenizer().save_pretrained(folder / "m")
    text = json.loads((folder / "m/tokenizer.json").read_text())
    (folder / "m/tokenizer.json").write_text(json.dumps(text, separators=(",", ":")))  # nobody else writes it so
    (folder / "m/generation_config.json").write_text('{"eos_token_id": [2, 7],\n "temperature": 0.6}')
    (folder / "m/chat_template.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    return folder


def run(*arguments, cwd):
    done = spqr(*arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done


def test_what_is_exported_has_the_entries_and_bytes_that_were_read(folder):
    run("quantize", "m", "--out", "q", *RTN, cwd=folder)
    run("export", "q", "--out", "dense", "--dtype", "float32", cwd=folder)
    for name in ("tokenizer.json", *AS_IT_CAME):
        assert (folder / "dense" / name).read_bytes() == (folder / "m" / name).read_bytes(), name
    before, after = (json.loads((folder / place / "config.json").read_text()) for place in ("m", "dense"))
    assert after == before | {"torch_dtype": "float32"}
    assert open_model(str(folder / "q")).source.config == open_model(str(folder / "dense")).source.config


def test_a_head_that_went_before_the_flag_is_exported_with_a_true_flag(folder, tiny_model):
    write_hf(folder / "tied", tiny_model, config=hf_config(tiny_model.config) | {"tie_word_embeddings": True})
    done = run("quantize", "tied", "--out", "tied-q", *RTN, cwd=folder)
    assert "lm_head.weight is there and differs" in done.stderr
    run("export", "tied-q", "--out", "tied-dense", "--dtype", "float32", cwd=folder)
    assert json.loads((folder / "tied-dense/config.json").read_text())["tie_word_embeddings"] is False
    head = load_file(folder / "tied-dense/model.safetensors")["lm_head.weight"]
    np.testing.assert_array_equal(head, hf_tensors(tiny_model)["lm_head.weight"])


def test_what_others_said_of_quantized_weights_is_no_longer_said(folder, tiny_model):
    values = hf_config(tiny_model.config) | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    write_hf(folder / "gptq", tiny_model, config=values)  # left over beside dense weights
    run("quantize", "gptq", "--out", "gptq-q", *RTN, cwd=folder)
    run("export", "gptq-q", "--out", "gptq-dense", cwd=folder)
    assert "quantization_config" not in json.loads((folder / "gptq-dense/config.json").read_text())


def test_a_gguf_file_has_no_config_json_and_gets_one(folder, tiny_model):
    write_gguf(folder / "m.gguf", tiny_model, keys={"rope.scale_linear": 2.0})
    done = run("quantize", "m.gguf", "--out", "gguf-q", *RTN, cwd=folder)
    assert "the tokenizer is not copied" in done.stderr
    run("export", "gguf-q", "--out", "gguf-dense", cwd=folder)
    entries = json.loads((folder / "gguf-dense/config.json").read_text())["rope_parameters"]
    assert (entries["rope_type"], entries["factor"]) == ("linear", 2.0)
