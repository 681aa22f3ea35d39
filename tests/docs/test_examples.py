"""The programs of examples/ do what they say, on a tiny model; the notebook is whole and runs."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import math
import os
import re
import runpy
import shutil
import sys
from unittest import mock

import pytest
from support import ROOT
from support.model_files import write_model_and_ids
from support.problems import TINY

import spqr_jax

EXAMPLES = ROOT / "examples"
PROGRAMS = sorted(path.name for path in EXAMPLES.glob("*.py"))
NOTEBOOK = EXAMPLES / "quickstart.ipynb"
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def run_example(name, *arguments, cwd):
    """Runs an example as a program, in this process; what it printed."""
    printed = io.StringIO()
    with (
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(printed),
        mock.patch.dict(os.environ, {"HF_HUB_OFFLINE": "1"}),
        mock.patch.object(sys, "argv", [name, *map(str, arguments)]),
    ):
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return printed.getvalue()


def numbers(line):
    return [float(number) for number in re.findall(r"(?<![\w.])-?\d+\.\d+", line)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model):
    """A folder with the dense ``model``, and a text in ``text.txt``."""
    folder = write_model_and_ids(tmp_path_factory.mktemp("examples"), tiny_model)
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    return folder


@pytest.fixture(scope="module")
def saved(folder):
    """What quantize_and_save.py printed; the model is in ``small``."""
    return run_example("quantize_and_save.py", "model", "--text", "text.txt", "--preset", "3bit", cwd=folder)


# ---- the programs -------------------------------------------------------------------------------


def test_quantize_and_save(folder, saved):
    *layers, last = saved.splitlines()
    assert last == "saved in small"
    assert len(layers) == TINY.num_layers * len(MATRICES) + 1  # and the head
    small, tokenizer = spqr_jax.load_model(str(folder / "small"))
    assert tokenizer.decode(tokenizer.encode("fox")) == "fox"
    for line in layers[:-1]:
        _, block, name = line.split()[0].split(".")
        array = small.layers[int(block)][name]
        assert f" {array.bits} bits, {array.stored_bits:.2f} stored" in line
        assert 0 < numbers(line)[-1] < 0.5


def test_size_budget(folder):
    lines = run_example("size_budget.py", "model", "--bits", "3.6", cwd=folder).splitlines()
    bits = {line.split()[0]: numbers(line)[0] for line in lines}
    assert bits["embed_tokens"] == bits["mlp_norm"] == 32
    assert 8 < bits["lm_head"] < 9
    dense = spqr_jax.load_model(str(folder / "model"))[0]
    sizes = {name: dense.layers[0][name].size for name in MATRICES}
    mean = sum(bits[name] * sizes[name] for name in MATRICES) / sum(sizes.values())
    assert mean == pytest.approx(3.6, abs=0.05)


def test_load_and_generate(folder, saved):
    """The text comes in pieces of one token, and no character is lost or shown by halves."""
    printed = run_example("load_and_generate.py", "small", "--max-new-tokens", "40", cwd=folder)
    text, _, last = printed.rstrip("\n").rpartition("\n")
    small, tokenizer = spqr_jax.load_model(str(folder / "small"))
    prompt = tokenizer.encode("<user>Why is the sky blue?<assistant>")
    sampling = spqr_jax.Sampling(temperature=0.7, top_p=0.9)
    tokens = spqr_jax.generate(small, [prompt], max_new_tokens=40, sampling=sampling).tokens[0]
    assert text == tokenizer.decode(tokens).rstrip("\ufffd")
    assert re.fullmatch(rf"{len(tokens)} tokens, [\d.]+ tokens per second", last)


def test_evaluate(folder, saved):
    dense, quantized, increase = run_example("evaluate.py", "model", "small", cwd=folder).splitlines()
    (before, before_error), (after, after_error) = numbers(dense), numbers(quantized)
    mean, stderr = numbers(increase)
    assert mean == pytest.approx(math.log(after / before), abs=2e-4)
    assert 0 < stderr < min(before_error / before, after_error / after)  # pairs are more certain
    assert increase.endswith(f"10 windows of {TINY.max_positions} tokens")


def test_one_matrix(tmp_path):
    *methods, outliers = run_example("one_matrix.py", cwd=tmp_path).splitlines()
    errors = {line[:18].strip(): numbers(line) for line in methods}
    rounded, moved, spqr = (errors[name] for name in ("round to nearest", "SpQR, no outliers", "SpQR"))
    assert moved[0] > rounded[0], "weights move further"
    assert moved[1] < 0.8 * rounded[1], "and outputs less"
    assert moved[2] == rounded[2], "at the same ideal bits"
    assert spqr[1] < 0.8 * moved[1]
    assert int(outliers.split()[0]) > 0


def test_flax_model(tmp_path):
    *layers, last = run_example("flax_model.py", cwd=tmp_path).splitlines()
    bits = {line.split()[0]: numbers(line)[0] for line in layers}
    assert set(bits) == {"up", "down", "head"}
    assert bits["head"] > 8 > 5 > max(bits["up"], bits["down"])
    assert 0 < numbers(last)[0] < 0.15


@pytest.mark.parametrize("name", PROGRAMS)
def test_an_example_is_short_and_says_how_to_run_it(name):
    text = (EXAMPLES / name).read_text()
    assert 20 <= len(text.splitlines()) <= 40
    assert f"    python examples/{name}" in text.split('"""')[1]


def test_the_table_lists_every_file():
    listed = re.findall(r"^\| \[`?([\w.]+)`?\]\(\1\)", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted([*PROGRAMS, NOTEBOOK.name])


# ---- the notebook -------------------------------------------------------------------------------


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def pictures(notebook):
    outputs = [output for cell in code_cells(notebook) for output in cell["outputs"]]
    return [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]


@pytest.fixture(scope="module")
def notebook():
    return json.loads(NOTEBOOK.read_text())


def test_the_notebook_is_small_and_has_short_cells(notebook):
    assert (notebook["nbformat"], notebook["nbformat_minor"]) >= (4, 5)
    assert {cell["cell_type"] for cell in notebook["cells"]} == {"markdown", "code"}
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    assert NOTEBOOK.stat().st_size < 400_000
    for cell in code_cells(notebook):
        assert len("".join(cell["source"]).splitlines()) < 15, cell["id"]


def test_the_notebook_has_the_outputs_of_one_run(notebook):
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert all(cell["outputs"] for cell in cells)
    kinds = {output["output_type"] for cell in cells for output in cell["outputs"]}
    assert kinds <= {"stream", "display_data"}  # no error
    assert not [output for cell in cells for output in cell["outputs"] if output.get("name") == "stderr"]
    assert len(pictures(notebook)) >= 5
    assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in pictures(notebook))


def test_the_notebook_tells_nothing_of_the_machine_it_ran_on():
    without_pictures = re.sub(r'"image/png": "[^"]*"', "", NOTEBOOK.read_text())
    assert not re.findall(r"(?<![\w.])/(?:home|root|work|tmp|usr|opt|Users)\b[^\"\s]*", without_pictures)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    try:
        spqr_jax.load_model("demo")
    except spqr_jax.ModelError as error:
        pytest.skip(f"the demo model is not at hand: {error}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    copy = nbformat.read(shutil.copy(NOTEBOOK, tmp_path), as_version=4)
    for cell in code_cells(copy):
        cell["outputs"] = []
    place = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(
        copy, timeout=1800, kernel_name="python3", resources=place
    ).execute()  # raises if a cell does
    assert len(pictures(copy)) == len(pictures(json.loads(NOTEBOOK.read_text())))
    assert all(cell["outputs"] for cell in code_cells(copy))
    printed = "".join(output.get("text", "") for cell in code_cells(copy) for output in cell["outputs"])
    dense, quantized = (float(value) for value in re.findall(r"perplexity (\d+\.\d+)", printed))
    assert dense < quantized < 1.2 * dense
