"""What commands say at their start and end: the forecast, a warning of low memory, the next command."""

from __future__ import annotations

import json
import shlex

import pytest
from support.command import QUICK, spqr
from support.model_files import write_model_and_ids

from spqr_jax import SpQRConfig
from spqr_jax.cli import next_step, outlook
from spqr_jax.forecast import Machine, Text
from spqr_jax.resolve import open_model

MACHINE = Machine("cpu", "cpu, 2 cores", 2, {"float32": 190e9, "bfloat16": 380e9}, 2e9)


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    return write_model_and_ids(tmp_path_factory.mktemp("outlook"), tiny_model)


@pytest.fixture(scope="module")
def quantized(folder):
    """A directory with a space in its name, and what the command wrote."""
    result = spqr(
        "quantize", "model", "--out", "small one", "--bits", 3, "--calib", "ids.npy", *QUICK, "--json", "q.json",
        cwd=folder,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result


def test_quantize_says_what_it_will_do_and_what_to_try_next(folder, quantized):
    said = quantized.stderr
    assert "quantizing 14 matrices (61 thousand weights) with SpQR and 3-bit codes" in said
    assert "calibrated on 4 windows of 32 tokens of ids.npy" in said
    assert "GB of memory on this machine (" in said or "MB of memory on this machine (" in said
    assert said.index("of memory on this machine") < said.index("layers.0")  # before the work
    last = said.strip().splitlines()[-1]
    assert last == 'next: spqr generate "small one" --chat --prompt "Why is the sky blue?"'
    assert "next:" not in quantized.stdout
    values = json.loads((folder / "q.json").read_text())
    assert values["forecast_seconds"] > 0
    assert values["forecast_bytes"] > 0.4e9


def test_the_next_command_can_be_pasted(folder, quantized):
    line = quantized.stderr.strip().splitlines()[-1].removeprefix("next: ")
    result = spqr(*shlex.split(line)[1:], "--max-new-tokens", 2, cwd=folder)
    assert result.returncode == 0, result.stderr
    assert "next:" not in result.stderr


def test_perplexity_of_a_quantized_model_leads_to_compare(folder, quantized):
    text = ["--data", "ids.npy", "--seqlen", 32, "--windows", 2]
    result = spqr("perplexity", "small one", *text, cwd=folder)
    assert "measuring the perplexity of small one on 2 windows of 32 tokens of ids.npy" in result.stderr
    line = result.stderr.strip().splitlines()[-1]
    assert line == 'next: spqr compare model "small one" --data ids.npy --seqlen 32 --windows 2'
    compared = spqr(*shlex.split(line.removeprefix("next: "))[1:], cwd=folder)
    assert compared.returncode == 0, compared.stderr
    assert compared.stderr.strip().splitlines()[-1] == 'next: spqr bench "small one" --dense model'
    dense = spqr("perplexity", "model", *text, cwd=folder)
    assert dense.stderr.strip().splitlines()[-1] == "next: spqr quantize model --out model-spqr"


def test_next_lines_without_a_chat_template_or_a_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    assert next_step.after_writing(tmp_path) == f'spqr generate {tmp_path} --prompt "The sky is blue because"'
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert "--chat" in next_step.after_writing(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    assert next_step.after_writing(tmp_path) == f"spqr inspect {tmp_path}"


@pytest.mark.parametrize("word", ["plain", "two words", "it's", "a $HOME b", 'say "yes" now', "a;b", ""])
def test_words_survive_a_shell(word):
    assert shlex.split(next_step.command("inspect", word)) == ["spqr", "inspect", word]


def test_exports_are_loaded_by_transformers():
    assert 'from_pretrained("you/name")' in next_step.after_export("you/name", "dense")
    assert 'device_map="cuda"' in next_step.after_export("out", "hf-spqr")


def test_other_commands_lead_on(folder, quantized):
    opened, dense = open_model(str(folder / "small one")), open_model(str(folder / "model"))
    assert next_step.after_eval(opened, "--tasks", "piqa") == "spqr eval model --tasks piqa"
    assert next_step.after_analyze(opened, "out") == next_step.command("report", opened.label, "out")
    assert next_step.after_analyze(dense, "out").startswith("spqr quantize")
    assert next_step.after_bench(opened.label).startswith("spqr generate")


def test_low_memory_is_said_with_what_takes_less():
    advice = ["a smaller --nsamples", "--dtype bfloat16"]
    warning = outlook.low_memory(3e9, MACHINE, advice)
    assert warning is not None
    assert warning.startswith("only 2.0 GB of memory is free")
    assert warning.endswith("To use less: a smaller --nsamples, --dtype bfloat16")
    assert outlook.low_memory(1e9, MACHINE, advice) is None
    unknown = Machine("cpu", "cpu", 2, MACHINE.rates, None)
    assert outlook.low_memory(1e15, unknown, advice) is None


def test_a_command_warns_of_low_memory_and_goes_on(folder, quantized, monkeypatch):
    monkeypatch.setattr(outlook, "measure_machine", lambda dtypes: Machine("cpu", "toy", 1, MACHINE.rates, 1e6))
    result = spqr("perplexity", "small one", "--data", "ids.npy", "--seqlen", 32, "--windows", 2, cwd=folder)
    assert result.returncode == 0, result.stderr
    assert "on this machine (toy)" in result.stderr
    assert "warning: only 10 MB of memory is free" in result.stderr
    assert "--dtype bfloat16" in result.stderr


def test_lines_in_plain_words():
    assert outlook.describe_method("spqr", SpQRConfig.preset("4bit")) == "SpQR at 4.3 stored bits per weight"
    assert outlook.describe_method("gptq", SpQRConfig.gptq(4)) == "GPTQ and 4-bit codes"
    assert outlook.describe_text(Text(1, 512), "pydoc") == "1 window of 512 tokens of pydoc"
    line = outlook.cost_line(170, 2.9e9, MACHINE, compiling=21)
    assert line == (
        "about 3 minutes and 2.9 GB of memory on this machine (cpu, 2 cores); "
        "about 20 seconds of it to compile programs, which are kept for the next run"
    )
    assert "compile" not in outlook.cost_line(170, 2.9e9, MACHINE, compiling=3)
