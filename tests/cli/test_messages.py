"""What the command line says: help and messages that keep their brackets, one message for every failure."""

from __future__ import annotations

import contextlib
import errno
import inspect
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import typing
import warnings

import jax
import numpy as np
import pytest
from support import ROOT
from support.command import QUICK, spqr
from support.model_files import write_hf, write_model_and_ids

from spqr_jax import CheckpointError, DataError
from spqr_jax.cli.app import app
from spqr_jax.cli.main import run
from spqr_jax.report import read_result
from spqr_jax.terminal import interrupt

BRACKETS = "my[model] [red]x :smile:"


# ---- help ---------------------------------------------------------------------------------------


def help_texts(command):
    """The command's own help and that of each of its options, as the source has them."""
    yield inspect.getdoc(command)
    for annotation in typing.get_type_hints(command, include_extras=True).values():
        for note in getattr(annotation, "__metadata__", ()):
            yield note.help or ""


COMMANDS = {info.name or info.callback.__name__.replace("_", "-"): info.callback for info in app.registered_commands}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_holds_each_word_of_the_source(name, tmp_path):
    result = spqr(name, "--help", cwd=tmp_path)
    assert result.returncode == 0
    shown = set(re.sub("[│╭╮╰╯─]", " ", result.stdout).split())
    for text in help_texts(COMMANDS[name]):
        assert set(text.split()) <= shown, set(text.split()) - shown


def test_the_list_of_commands_holds_each_first_sentence(tmp_path):
    result = spqr("--help", cwd=tmp_path)
    assert "pip install 'spqr-jax[eval]'" in result.stdout
    assert set(COMMANDS) <= set(result.stdout.split())


# ---- brackets in names --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    """A model, and the same in a folder whose name rich would take for markup, quantized."""
    folder = write_model_and_ids(tmp_path_factory.mktemp("messages"), tiny_model)
    os.rename(folder / "model", folder / BRACKETS)
    result = spqr("quantize", BRACKETS, "--out", "q[bold]", "--method", "rtn", "--bits", 4, cwd=folder)
    assert result.returncode == 0, result.stderr
    assert "q[bold]: " in result.stdout
    return folder


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["inspect", "q[bold]"], "q[bold]"),
        (["export", "q[bold]", "--out", "e[b] :x:"], "e[b] :x:: "),
        (["perplexity", BRACKETS, "--data", "ids[1].npy", "--seqlen", 32, "--windows", 2], "on ids[1].npy, 2 windows"),
        (["perplexity", "q[bold]", "--against", BRACKETS, "--data", "ids.npy", "--seqlen", 32, "--windows", 2],
         f"{BRACKETS}: "),
        (["compare", BRACKETS, "q[bold]", "--data", "ids.npy", "--seqlen", 32, "--windows", 2],
         f"q[bold] compared with {BRACKETS}: "),
        (["bench", "q[bold]", "--prompt-tokens", 4, "--new-tokens", 2, "--turns", 1], "q[bold]: 4 prompt"),
    ],
)  # fmt: skip
def test_names_with_brackets_are_shown_as_they_are(folder, arguments, shown):
    (folder / "ids[1].npy").write_bytes((folder / "ids.npy").read_bytes())
    result = spqr(*arguments, cwd=folder)
    assert result.returncode == 0, result.stderr
    assert shown in " ".join(result.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["inspect", "[/nothing]"], "[/nothing]"),
        (["perplexity", "[red]none"], "'[red]none'"),
        (["perplexity", BRACKETS, "--data", "[bold]"], "[bold]"),
        (["perplexity", BRACKETS, "[/red]"], "[/red]"),
        (["[/frobnicate]"], "[/frobnicate]"),
        (["quantize", BRACKETS, "--out", "x", "--bits", 3, "--calib", "[red]", *QUICK], "[red]"),
        (["quantize", BRACKETS, "--out", "x", "--rule", "[/a]=b"], "[/a]=b"),
        (["quantize", BRACKETS, "--out", "q[bold]"], "q[bold] exists already"),
        (["report", "q[bold]", "--out", "q[bold]"], "q[bold] is a directory"),
        (["export", "q[bold]", "--out", "x", "--perplexity", "[i].json"], "[i].json does not exist"),
    ],
)
def test_errors_show_brackets(folder, arguments, shown):
    result = spqr(*arguments, cwd=folder)
    assert result.returncode == 2
    assert shown in " ".join(re.sub("│", " ", result.stderr).split())
    assert not (folder / "x").exists()


# ---- results that are not what they should be ----------------------------------------------------

NONSENSE = [
    "", "[]", "3", '"perplexity"', "{", '{"perplexity": "low"}', '{"perplexity": NaN}', '{"perplexity": null}',
    '{"perplexity": 3.5}', '{"perplexity": 3.5, "data": 7, "windows": 2, "seqlen": 32}', '{"results": 3}',
    '{"results": {"a": 1}}', "[" * 100_000, '{"perplexity": 1' + "0" * 5000 + "}",
    '{"perplexity": 3.5, "data": "a", "windows": 2, "seqlen": 32, "kl_mean": "x"}',
]  # fmt: skip


def test_a_result_that_is_none_is_named(folder):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra `plots`): spqr report cannot run")
    for text in NONSENSE:
        (folder / "bad.json").write_text(text)
        with pytest.raises(DataError, match=r"bad\.json"):
            read_result(folder / "bad.json")
    for command, option in (("report", "--results"), ("export", "--perplexity")):
        result = spqr(command, "q[bold]", "--out", "x", option, "bad.json", cwd=folder)
        assert result.returncode == 2, result.stderr
        assert "bad.json: kl_mean is 'x', expected a finite number" in result.stderr
        assert not (folder / "x").exists()


def test_a_result_is_refused_before_the_work_where_it_cannot_be_written(folder):
    text = ["--data", "ids.npy", "--seqlen", 32, "--windows", 2]
    for place, says in (
        ("nowhere/r.json", "no directory nowhere"),
        ("q[bold]", "is a directory"),
        ("/proc/r", "/proc"),
    ):
        result = spqr("perplexity", "no such model", *text, "--json", place, cwd=folder)
        assert result.returncode == 2
        assert says in result.stderr


# ---- how a command ends -------------------------------------------------------------------------


def run_here(command):
    """Exit status and what was written to stderr."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        try:
            run(command)
        except SystemExit as end:
            return end.code, errors.getvalue()
    return 0, errors.getvalue()


def raising(error):
    def command():
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (DataError("no text: [bold]"), 2, "error: no text: [bold]\n"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "error: system error: No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "/a[b]"), 2, "error: /a[b]: Permission denied"),
        (MemoryError(), 2, "error: not enough memory"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 12345 bytes.\nmore"), 2,
         "not enough memory: RESOURCE_EXHAUSTED: Out of memory allocating 12345 bytes."),
        (jax.errors.JaxRuntimeError("INTERNAL: something"), 70, "internal error: JaxRuntimeError: INTERNAL: something"),
        (KeyError("hidden_size"), 70, "error: internal error: KeyError: 'hidden_size' at "),
        (RecursionError("too deep"), 70, "internal error: RecursionError: too deep"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 141, ""),
    ],
    ids=str,
)  # fmt: skip
def test_every_failure_is_one_message_and_a_status(error, status, says, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code, text = run_here(raising(error))
    assert code == status
    assert says in text
    assert "Traceback" not in text
    assert text.count("\n") == (0 if status == 141 else 1)
    files = list(tmp_path.glob("spqr-error-*.txt"))
    assert len(files) == (status == 70)
    for file in files:
        assert str(file) in text
        assert f"{type(error).__name__}: " in file.read_text()


def test_the_traceback_is_shown_to_those_who_ask(monkeypatch):
    monkeypatch.setenv("SPQR_TRACEBACK", "1")
    code, text = run_here(raising(DataError("no text")))
    assert code == 2
    assert "Traceback" in text
    assert text.endswith("error: no text\n")


def test_an_interrupted_command_waits_for_no_timer():
    timer = threading.Timer(100, print)  # as JAX has, which warns of slow compilation

    def command():
        timer.start()
        raise SystemExit(130)

    assert run_here(command) == (130, "stopped; no incomplete output is left\n")
    timer.join(5)
    assert not timer.is_alive()


def test_warnings_are_notes_each_once():
    def command():
        for text in ("weights\ndiffer [a]", "weights differ [a]", "other"):
            warnings.warn(text, stacklevel=1)
        warnings.warn("for programmers", DeprecationWarning, stacklevel=1)

    assert run_here(command) == (0, "note: weights differ [a]\nnote: other\n")


PROGRAM = """
import sys
from spqr_jax.cli.main import run
from spqr_jax.report import read_result
from spqr_jax.terminal.display import tell

def command():
    for _ in range(5000):
        tell("é✓ \\udce9")

run(command)
"""


def test_terminals_that_are_not_utf_8_and_readers_that_stop(tmp_path):
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "SPQR_CACHE": "off", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path
    ) as process:
        assert process.stdout.readline() == b"\\xe9\\u2713 \\udce9\n"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode != 0


# ---- generation ---------------------------------------------------------------------------------


def test_generate_says_why_it_ended(folder):
    def generate(*options):
        result = spqr("generate", BRACKETS, "--prompt", "hi", *options, "--json", "g.json", cwd=folder)
        assert result.returncode == 0, result.stderr
        return result.stderr, json.loads((folder / "g.json").read_text())["ended"]

    text, ended = generate("--max-new-tokens", 3)
    assert "stopped after 3 tokens (--max-new-tokens)" in text
    assert ended == "length"
    text, ended = generate("--max-new-tokens", 1000)
    assert "stopped after 126 of 1000 tokens: the model's context of 128 tokens is full" in text
    assert ended == "context"
    text, ended = generate("--prompt", "you", "--max-new-tokens", 2)
    assert "prompt 0: stopped after 2 tokens (--max-new-tokens); prompt 1: stopped after 2" in text
    assert ended == ["length", "length"]


def test_text_that_is_no_number_is_no_result(folder, tiny_model):
    block = tiny_model.layers[0]
    wide = block.replace({name: block[name] * 1e4 for name in ("up_proj", "down_proj")})
    write_hf(folder / "wide", tiny_model.__class__(tiny_model.outer, (wide, *tiny_model.layers[1:]), tiny_model.config))
    for name in os.listdir(folder / BRACKETS):
        if "tokenizer" in name or name.endswith(".jinja"):
            (folder / "wide" / name).write_bytes((folder / BRACKETS / name).read_bytes())
    result = spqr("generate", "wide", "--prompt", "hi", "--dtype", "float16", cwd=folder)
    assert result.returncode == 2, result.stderr
    assert "next token of prompt 0 is not a number: activations are not finite from block 0 of 2 on" in result.stderr
    assert "try --dtype bfloat16" in result.stderr


@pytest.mark.parametrize(
    "options",
    [
        ["--temperature", "nan"],
        ["--temperature", "-1"],
        ["--temperature", "inf"],
        ["--top-p", "1.5"],
        ["--top-p", "nan"],
        ["--top-k", "-1"],
        ["--top-k", "1.5"],
        ["--seed", "9" * 30],
        ["--max-new-tokens", "0"],
    ],
)
def test_numbers_that_make_no_sense_are_one_message(folder, options):
    result = spqr("generate", BRACKETS, "--prompt", "hi", *options, cwd=folder)
    assert result.returncode == 2, result.stderr
    assert options[0].strip("-").replace("-", "_") in result.stderr.replace("-", "_")


def test_numbers_of_quantize_too(folder):
    for options in (["--bits", "²"], ["--bits", "9" * 5000], ["--head-bits", "٣"], ["--seed", "-1"], ["--rule", "a=²"]):
        result = spqr("quantize", BRACKETS, "--out", "x", "--calib", "ids.npy", *QUICK, *options, cwd=folder)
        assert result.returncode == 2, (options, result.stderr)
    result = spqr("analyze", BRACKETS, "--out", "x", "--maps", "[", "--calib", "ids.npy", *QUICK, cwd=folder)
    assert result.returncode == 2, result.stderr
    assert "--maps '[' is not a regular expression" in result.stderr
    assert not (folder / "x").exists()
    assert np.load(folder / "ids.npy").size


def test_an_interrupt_that_a_library_turned_into_an_error_is_an_interrupt(capsys, monkeypatch):
    """As asyncio inside of Orbax does: the file that was being read is not damaged."""

    def command():
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise CheckpointError("the arrays cannot be read")

    monkeypatch.setattr(interrupt, "_received", [])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(SystemExit) as end:
            run(command)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert end.value.code == 130
    assert "stopped" in capsys.readouterr().err
