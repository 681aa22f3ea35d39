"""The command on a tiny model made here: once as a user runs it, in a process, else in the test's own."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
from support.command import QUICK, spqr, spqr_process
from support.family_files import write_gguf
from support.model_files import byte_tokenizer, write_model_and_ids

from spqr_jax import Generation, SpQRError
from spqr_jax.cli.options import build_config
from spqr_jax.cli.stream import TextStream, converse
from spqr_jax.config import DEFAULT_PRESET, PRESETS


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    return write_model_and_ids(tmp_path_factory.mktemp("cli"), tiny_model)


@pytest.fixture(scope="module")
def quantized(folder):
    result = spqr_process(
        "quantize", "model", "--out", "small", "--bits", 3, "--calib", "ids.npy", *QUICK, "--json", "q.json", cwd=folder
    )
    assert result.returncode == 0, result.stderr
    return result


def test_quantize_shows_each_block_and_writes_what_it_says(folder, quantized):
    assert "layers.0" in quantized.stderr
    assert "layers.1" in quantized.stderr
    assert "stored bits" in quantized.stdout
    values = json.loads((folder / "q.json").read_text())
    assert set(values["layers"]) >= {"layers.0.q_proj", "layers.1.down_proj"}
    assert 3.6 < values["ideal_bits"] < values["stored_bits"] < 8
    assert values["seconds"] > 0
    assert (folder / "small" / "tokenizer.json").is_file()
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_without_flags_the_default_preset_is_met_and_tuning_keeps_the_size(folder):
    result = spqr(
        "quantize", "model", "--out", "tuned", "--calib", "ids.npy", *QUICK,
        "--tune", "logits", "--tune-epochs", 2, "--json", "t.json", cwd=folder,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "plan" in result.stderr + result.stdout
    values = json.loads((folder / "t.json").read_text())
    assert abs(values["stored_bits"] - PRESETS[DEFAULT_PRESET]["target_bits"]) < 0.02
    result = spqr("inspect", "tuned", "--json", "t.json", cwd=folder)
    assert result.returncode == 0, result.stderr
    values = json.loads((folder / "t.json").read_text())
    assert values["layers"]["lm_head"]["bits"] == 8
    assert 8 < values["head_bits"] < 9
    provenance = values["provenance"]
    assert provenance["target_bits"] == PRESETS[DEFAULT_PRESET]["target_bits"]
    assert (provenance["tuned"]["objective"], provenance["tuned"]["epochs"]) == ("logits", 2)


def test_inspect_reads_everything_back(folder, quantized):
    result = spqr("inspect", "small", "--json", "i.json", cwd=folder)
    assert result.returncode == 0, result.stderr
    values = json.loads((folder / "i.json").read_text())
    for key in ("ideal_bits", "stored_bits", "outlier_percent", "bytes", "dense_bytes", "layers"):
        assert key in values
    layer = values["layers"]["layers.1.up_proj"]
    assert layer["shape"] == [96, 64]
    assert 0 < layer["output_error"] < 0.5
    assert layer["tokens"] == values["layers"]["layers.0.q_proj"]["tokens"] > 0
    assert layer["damping"] > 0
    assert values["quantization"]["outlier_threshold"] == 0.2
    assert "layers.1.up_proj" in result.stdout


def test_perplexity_is_the_very_same_in_another_process(folder, quantized):
    runs = []
    for run, name in ((spqr_process, "a.json"), (spqr_process, "b.json")):
        result = run(
            "perplexity", "small", "--data", "ids.npy", "--seqlen", 64, "--windows", 3, "--json", name, cwd=folder
        )
        assert result.returncode == 0, result.stderr
        runs.append(json.loads((folder / name).read_text()))
    assert runs[0]["perplexity"] == runs[1]["perplexity"]
    assert {"perplexity", "stderr", "tokens", "windows", "seconds"} <= set(runs[0])
    assert (runs[0]["tokens"], runs[0]["windows"]) == (3 * 63, 3)
    dense = spqr(
        "perplexity", "model", "--data", "ids.npy", "--seqlen", 64, "--windows", 3, "--json", "d.json", cwd=folder
    )
    assert dense.returncode == 0
    assert json.loads((folder / "d.json").read_text())["perplexity"] != runs[0]["perplexity"]


def test_generate_streams_text_and_reports(folder, quantized):
    result = spqr("generate", "small", "--prompt", "abc", "--max-new-tokens", 5, "--json", "g.json", cwd=folder)
    assert result.returncode == 0, result.stderr
    values = json.loads((folder / "g.json").read_text())
    keys = {"text", "prompt_tokens", "new_tokens", "prefill_seconds", "decode_tokens_per_second", "first_token_seconds"}
    assert keys <= set(values)
    assert values["prompt_tokens"] == 3
    assert values["new_tokens"] <= 5
    assert result.stdout.rstrip("\n") == values["text"].rstrip("\n")
    assert "tokens/s" in result.stderr


def test_bench_compares_what_takes_turns(folder, quantized):
    options = ["--dense", "model", "--turns", 2, "--prompt-tokens", 8, "--new-tokens", 4, "--json", "b.json"]
    result = spqr("bench", "small", *options, cwd=folder)
    assert result.returncode == 0, result.stderr
    values = json.loads((folder / "b.json").read_text())
    assert values["read_bandwidth_gb_s"] > 0.1
    results = values["results"]
    assert next(iter(results)) == "dense float32"
    assert len(results) >= 2
    for each in results.values():
        assert len(each["decode_turns"]) == len(each["prefill_turns"]) == 2
        assert min(each["decode_turns"]) <= each["decode_tokens_per_second"] <= max(each["decode_turns"])
        assert each["bytes"] > 0
    assert "tokens/s" in result.stdout
    too_long = spqr("bench", "small", "--prompt-tokens", 100000, cwd=folder)
    assert too_long.returncode == 2
    assert "do not fit" in too_long.stderr


def test_chat_applies_the_template_and_stdin_is_a_prompt(folder, quantized):
    result = spqr("generate", "small", "--chat", "--max-new-tokens", 2, "--json", "c.json", cwd=folder, stdin="hi\n")
    assert result.returncode == 0, result.stderr
    assert json.loads((folder / "c.json").read_text())["prompt_tokens"] == len("<user>hi<assistant>")


def test_several_prompts_of_different_lengths(folder, quantized):
    result = spqr(
        "generate", "small", "--prompt", "a", "--prompt", "longer", "--max-new-tokens", 3,
        "--temperature", 0.8, "--seed", 3, "--json", "p.json", cwd=folder,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    values = json.loads((folder / "p.json").read_text())
    assert values["prompt_tokens"] == [1, 6]
    assert len(values["text"]) == 2


@pytest.mark.parametrize("method", ["gptq", "rtn", "reference"])
def test_other_methods(folder, method):
    calibration = [] if method == "rtn" else ["--calib", "pydoc", *QUICK]
    result = spqr(
        "quantize", "model", "--out", method, "--method", method, *calibration, "--rule", "k_proj=skip", cwd=folder
    )
    assert result.returncode == 0, result.stderr
    assert spqr("inspect", method, cwd=folder).returncode == 0


def test_gguf_files_are_models(folder, tiny_model):
    write_gguf(folder / "tiny.gguf", tiny_model)
    result = spqr("perplexity", "tiny.gguf", "--data", "ids.npy", "--seqlen", 32, "--windows", 2, cwd=folder)
    assert result.returncode == 0, result.stderr


BAD = {
    "tuning options without tuning": (["quantize", "model", "--out", "x", "--tune-epochs", 3], "--tune logits"),
    "a head of no bits": (["quantize", "model", "--out", "x", "--head-bits", "some"], "--head-bits"),
    "no such model": (["perplexity", "nowhere", "--data", "ids.npy"], "no model found for 'nowhere'"),
    "no such data": (["perplexity", "model", "--data", "nothing"], "no data found for 'nothing'"),
    "window too long": (["perplexity", "model", "--data", "ids.npy", "--seqlen", "1000"], "model's context of 128"),
    "text too short": (["perplexity", "model", "--data", "ids.npy", "--seqlen", "5000"], "less than one window"),
    "bad bits": (["quantize", "model", "--out", "x", "--bits", "1", "--calib", "ids.npy"], "bits must lie in 2..8"),
    "bad method": (["quantize", "model", "--out", "x", "--method", "magic"], "method must be one of"),
    "bad rule": (["quantize", "model", "--out", "x", "--rule", "k_proj"], "PATTERN=skip or PATTERN=BITS"),
    "bad regex": (["quantize", "model", "--out", "x", "--rule", "(=skip"], "not a regular expression"),
    "bad dtype": (["perplexity", "model", "--dtype", "int7", "--data", "ids.npy"], "dtype must be one of"),
    "not a checkpoint": (["inspect", "model"], "not a checkpoint"),
    "unused option": (["quantize", "model", "--out", "x", "--method", "rtn", "--damping", "1"], "does not use damping"),
    "existing output": (["quantize", "model", "--out", "model", "--calib", "ids.npy", *QUICK], "exists already"),
    "unknown option": (["perplexity", "model", "--frobnicate"], "No such option"),
}


@pytest.mark.parametrize(("arguments", "says"), BAD.values(), ids=BAD.keys())
def test_bad_input_exits_with_two_and_one_clear_message(folder, arguments, says):
    result = spqr(*arguments, cwd=folder)
    assert result.returncode == 2
    assert says in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    assert not (folder / "x").exists()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_quantize_can_go_on_or_leaves_nothing(folder, how):
    command = [sys.executable, "-m", "spqr_jax", "quantize", "model", "--out", "stopped", "--bits", "3"]
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it, and their children
    try:
        process = subprocess.Popen(
            [*command, "--calib", "ids.npy", *QUICK], cwd=folder, stderr=subprocess.PIPE, text=True
        )
    finally:
        signal.signal(signal.SIGINT, handler)
    deadline = time.monotonic() + 120
    while not (folder / ".stopped.run").is_dir() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.poll() is None, "it ended before it could be stopped"
    process.send_signal(how)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    kept = (folder / ".stopped.run").is_dir()  # it was stopped at a safe point, or before the first one
    assert errors.splitlines()[-1] == (
        "stopped; run the same command with --resume to go on" if kept else "stopped; no incomplete output is left"
    )
    assert not (folder / "stopped").exists()
    result = spqr(*command[3:], "--calib", "ids.npy", *QUICK, *(["--resume"] if kept else []), cwd=folder)
    assert result.returncode == 0, result.stderr
    assert spqr("inspect", "stopped", cwd=folder).returncode == 0
    shutil.rmtree(folder / "stopped")
    assert not list(folder.glob(".stopped*"))


def test_a_swallowed_interrupt_is_raised_again():
    """As when it arrives in a destructor; in a process of its own, since it changes how signals are handled."""
    program = """
import os, signal
from spqr_jax.terminal import interrupt
interrupt.install()
interrupt.check()
for _ in range(2):
    try:
        os.kill(os.getpid(), signal.SIGTERM) if _ == 0 else interrupt.check()
        print("went on")
    except KeyboardInterrupt:
        print("stopped")
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert result.stdout.split() == ["stopped", "stopped"]


def test_help_lists_the_commands(folder):
    result = spqr_process("--help", cwd=folder)
    assert result.returncode == 0
    for command in ("quantize", "perplexity", "generate", "inspect"):
        assert command in result.stdout


def test_a_conversation_remembers_what_was_said(monkeypatch, capsys):
    tokenizer, lines, seen = byte_tokenizer(), iter(["hi", "and?", ""]), []
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))

    def answer(ids, stream):
        seen.append(tokenizer.decode(ids))
        reply = tokenizer("yes")["input_ids"]
        for token in reply:
            stream.put(token)
        return Generation([reply], [len(ids)], 0.0, 0.0, 0.0, 1.0, ["stop"])

    converse(tokenizer, answer)
    assert seen == ["<user>hi<assistant>", "<user>hi<assistant>yes<user>and?<assistant>"]
    assert capsys.readouterr().out == "yes\nyes\n"


def test_text_is_shown_in_whole_characters(capsys):
    tokenizer = byte_tokenizer()
    stream = TextStream(tokenizer, live=True)
    shown = []
    for token in tokenizer("aé!")["input_ids"]:
        stream.put(token)
        shown.append(capsys.readouterr().out)
    assert shown == ["a", "", "é", "!"]


def test_widths_to_choose_from():
    assert build_config("spqr", bits="3,4", target_bits=4.3).bit_choices == (3, 4)
    assert build_config("spqr", bits="4").bit_choices == (4,)
    assert build_config("spqr", bits="auto", preset="3bit").bit_choices == (2, 3, 4)
    with pytest.raises(SpQRError, match="give --target-bits"):
        build_config("spqr", bits="3,4", outlier_threshold=0.2)
    with pytest.raises(SpQRError, match="such as 3,4"):
        build_config("spqr", bits="3;4", target_bits=4.3)
