"""Calibration and evaluation text on the command line: records, conversations, mixtures."""

from __future__ import annotations

import json

import numpy as np
import pytest
from support.command import QUICK, spqr
from support.model_files import byte_tokenizer, write_model_and_ids

from spqr_jax import DataError, texts
from spqr_jax.checkpoint import CheckpointSource
from spqr_jax.data import calibration_windows
from spqr_jax.formats.card import model_card
from spqr_jax.inspection import summarize
from spqr_jax.models.tokenizer import encode_stream
from spqr_jax.report.page import _short
from spqr_jax.resolve import open_model
from spqr_jax.texts import read_calibration, read_tokens

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    folder = write_model_and_ids(tmp_path_factory.mktemp("calibration"), tiny_model)
    (folder / "chat.jsonl").write_text("\n".join([json.dumps({"messages": CHAT})] * 20))
    (folder / "prose.txt").write_text("Some prose. " * 50)
    np.save(folder / "other.npy", np.arange(200, 300))
    return folder


@pytest.fixture
def opened(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return open_model("model")


def test_conversations_are_rendered_by_the_models_template(opened):
    ids = read_tokens("chat.jsonl", "calibration", opened)
    expected = encode_stream(byte_tokenizer(), "<user>hi<assistant>hello<assistant>" * 20)
    np.testing.assert_array_equal(ids, expected)


def test_a_model_without_a_template_says_so_with_the_record(opened):
    opened.tokenizer().chat_template = None
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    object.__setattr__(opened, "tokenizer", lambda: tokenizer)
    with pytest.raises(ValueError, match=r"chat\.jsonl, line 1: .*no chat template"):
        read_tokens("chat.jsonl", "calibration", opened)


def test_one_text_is_drawn_and_described_as_ever(opened):
    windows, kept = read_calibration(["ids.npy"], opened, 32, 4, 5)
    np.testing.assert_array_equal(windows, calibration_windows(np.load("ids.npy"), 32, 4, 5))
    assert kept == {"data": "ids.npy", "windows": 4, "seqlen": 32, "seed": 5}
    weighted, kept = read_calibration(["ids.npy=3"], opened, 32, 4, 5)
    np.testing.assert_array_equal(weighted, windows)
    assert kept["data"] == "ids.npy"


def test_several_texts_are_mixed_and_described(opened):
    windows, kept = read_calibration(["prose.txt", "chat.jsonl=2"], opened, 32, 7, 0)
    assert windows.shape == (7, 32)
    assert kept == {
        "data": "prose.txt + 2 × chat.jsonl",
        "windows": 7,
        "seqlen": 32,
        "seed": 0,
        "texts": [
            {"name": "prose.txt", "weight": 1.0, "windows": 2},
            {"name": "chat.jsonl", "weight": 2.0, "windows": 5},
        ],
    }


@pytest.fixture
def short_texts(monkeypatch):
    """Names of texts in place of texts; `codeparrot` and `wikipedia-zh` cannot be had."""

    def read(name, split, model):
        if name in ("codeparrot", "wikipedia-zh"):
            raise DataError(f"{name} could not be read from the hub")
        return np.full(200, len(name), np.int32)

    monkeypatch.setattr(texts, "read_tokens", read)


def names_and_windows(kept):
    return {text["name"]: text["windows"] for text in kept["texts"]}


def test_without_a_network_the_default_is_what_python_brings(opened, short_texts, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    _, kept = read_calibration(None, opened, 32, 20, 0)
    assert kept["data"] == "2 × pydoc + 2 × pysource + pychat"
    assert names_and_windows(kept) == {"pydoc": 8, "pysource": 8, "pychat": 4}
    assert "the Hugging Face hub cannot be reached" in "".join(capsys.readouterr())
    _, with_own = read_calibration(["mixed", "prose.txt=3"], opened, 32, 20, 0)
    assert names_and_windows(with_own) == {"pydoc": 2, "pysource": 2, "pychat": 1, "prose.txt": 15}


def test_the_default_leaves_out_what_a_model_cannot_read(opened, short_texts, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    _, kept = read_calibration(None, opened, 32, 2, 0)
    assert names_and_windows(kept) == {"pydoc": 1, "pysource": 1}  # not more texts than windows
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    object.__setattr__(opened, "tokenizer", lambda: tokenizer)
    _, kept = read_calibration(["mixed"], opened, 32, 20, 0)
    assert names_and_windows(kept) == {"pydoc": 10, "pysource": 10}


def test_what_the_hub_does_not_give_is_replaced_and_said(opened, short_texts, monkeypatch, capsys):
    monkeypatch.setattr(texts, "_reaches_hub", lambda otherwise: True)
    _, kept = read_calibration(None, opened, 32, 23, 0)
    assert names_and_windows(kept) == {
        "wikitext2": 8, "pysource": 8, "ultrachat": 4, "wikipedia-de": 1, "wikipedia-es": 1, "wikipedia-fr": 1,
    }  # fmt: skip
    said = "".join(capsys.readouterr())
    assert "codeparrot could not be read from the hub; using pysource" in " ".join(said.split())
    assert "using the other texts in its place" in " ".join(said.split())


def test_ids_of_another_model_are_refused(opened):
    with pytest.raises(DataError, match="token ids range from 200 to 299, but the model's vocabulary has 256"):
        read_calibration(["other.npy"], opened, 100, 1, 0)


def test_a_mixture_is_kept_with_the_model_and_in_its_card(folder):
    result = spqr(
        "quantize", "model", "--out", "mixed", "--bits", 3, "--calib", "ids.npy", "--calib", "chat.jsonl=3", *QUICK,
        cwd=folder,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    summary = summarize(CheckpointSource(folder / "mixed"))
    kept = summary["provenance"]["calibration"]
    assert [text["windows"] for text in kept["texts"]] == [1, 3]
    assert "4 windows of 32 tokens from ids.npy + 3 × chat.jsonl, seed 0" in model_card("m", "dense", summary)
    assert spqr("inspect", "mixed", cwd=folder).returncode == 0


def test_reports_name_each_text_of_a_mixture():
    assert _short("a/b/wiki.txt") == "wiki.txt"
    assert _short("my texts/a.txt + 2 × c/d.jsonl + pydoc") == "a.txt + 2 × d.jsonl + pydoc"


QUANTIZE = ["quantize", "model", "--out", "x", "--bits", 3]
BAD = {
    "a weight of nothing": (["--calib", "ids.npy=0"], "must be the weight of the text: a positive number"),
    "a weight that is a word": (
        ["--calib", "ids.npy", "--calib", "prose.txt=abc"],
        "'abc' must be the weight of the text",
    ),
    "more texts than windows": (
        ["--calib", "ids.npy", "--calib", "prose.txt", "--nsamples", 1],
        "1 windows are too few for 2 texts: use more windows",
    ),
    "a text that is not there": (["--calib", "ids.npy", "--calib", "nowhere.txt"], "no data found for 'nowhere.txt'"),
    "ids of another model": (["--calib", "other.npy", "--seqlen", 100], "the model's vocabulary has 256"),
    "a seed below 0": (
        ["--calib", "ids.npy", "--seqlen", 32, "--seed", -1],
        "'--seed': Input should be greater than or equal to 0",
    ),
}


@pytest.mark.parametrize(("arguments", "says"), BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("command", [QUANTIZE, ["analyze", "model", "--out", "x"]], ids=["quantize", "analyze"])
def test_bad_texts_are_one_message(folder, command, arguments, says):
    if command[0] == "analyze":
        pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra `plots`): analyze cannot run")
    result = spqr(*command, *arguments, cwd=folder)
    assert result.returncode == 2
    assert says in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


def test_records_are_evaluated_too(folder):
    result = spqr("perplexity", "model", "--data", "chat.jsonl", "--seqlen", 32, "--windows", 2, cwd=folder)
    assert result.returncode == 0, result.stderr
    result = spqr("perplexity", "model", "--data", "prose.txt=2", "--seqlen", 32, cwd=folder)
    assert result.returncode == 2
    assert "no data found for 'prose.txt=2'" in " ".join(result.stderr.split())
