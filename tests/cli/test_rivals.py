"""scripts/rivals.py on a tiny model. llama.cpp, which takes minutes to compile, is asked where it is installed."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import ROOT
from support.family_files import write_gguf
from support.problems import TINY, random_tokens

from spqr_jax import forward
from spqr_jax.models.decoder import random_decoder
from spqr_jax.models.gguf import GGUFFile
from spqr_jax.resolve import open_model
from spqr_jax.stream.blocks import collect

SCRIPTS = ROOT / "scripts"


@pytest.fixture(autouse=True)
def _scripts_can_be_imported(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))


@pytest.fixture
def scaled():
    return importlib.import_module("rivals_scaled")


@pytest.fixture
def files():
    return importlib.import_module("rivals_gguf")


def problem(rows=32, columns=128, tokens=512, seed=0):
    """Weights, and the Hessian of inputs whose channels differ in size."""
    rng = np.random.default_rng(seed)
    w = jnp.asarray(rng.standard_normal((rows, columns)), jnp.float32)
    x = rng.standard_normal((tokens, columns)) * np.exp(rng.uniform(-2, 2, columns))
    return w, jnp.asarray(2 / tokens * x.T @ x, jnp.float32)


def run_rivals(folder, *options):
    command = [sys.executable, SCRIPTS / "rivals.py", "dense.gguf", "--out", "rivals", "--calib", "ids.npy"]
    command += ["--nsamples", "4", "--seqlen", "32", "--data", "first", "ids.npy", "64", "3", *options]
    environment = os.environ | {"COLUMNS": "200", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture
def folder(tiny_model, tmp_path):
    write_gguf(tmp_path / "dense.gguf", tiny_model)
    np.save(tmp_path / "ids.npy", random_tokens((2000,), 0))
    return tmp_path


def test_rivals_are_measured_once_and_compared_at_equal_bits(folder):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra `plots`)")
    awq_only = "^AWQ 4 bits.* 32$"
    result = run_rivals(folder, "--seeds", 0, "--rows", f"^SpQR (3.4|5)$|{awq_only}")
    assert result.returncode == 0, result.stderr
    kept = {path: json.loads(path.read_text()) for path in (folder / "rivals").glob("*.json")}
    assert sorted(values["name"] for values in kept.values()) == ["AWQ 4 bits, groups of 32", "SpQR 3.4", "SpQR 5"]
    for values in kept.values():
        assert values["texts"]["first"]["kl_mean"] > 0
        assert values["cpu_seconds"] > 0.5
    table = importlib.import_module("rivals_table")
    done = [values | {"seed": 0} for values in kept.values()]
    few, many = table.points(done, "SpQR", "first")
    middle = table.at_equal_bits(done, (few[0] + many[0]) / 2, "first")
    assert middle == pytest.approx(np.sqrt(few[1] * many[1]))
    assert np.isnan(table.at_equal_bits(done, many[0] + 1, "first"))
    ((bits, theirs, deviation),) = table.points(done, "AWQ", "first")
    assert bits == 4.625  # 4, and 16 + 4 for 32 weights
    assert np.isnan(deviation)
    text = (folder / "rivals" / "table.md").read_text()
    assert f"| {table.at_equal_bits(done, 4.625, 'first') / theirs:.2f} |" in text
    assert (folder / "rivals" / "rivals.png").read_bytes().startswith(b"\x89PNG")
    times = {path: path.stat().st_mtime_ns for path in kept}
    assert run_rivals(folder, "--seeds", 0, 1, "--rows", awq_only).returncode == 0
    assert times == {path: path.stat().st_mtime_ns for path in times}  # what is done is kept
    with (folder / "rivals" / "rivals.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["seed"], row["text"], row["stored_bits"]) for row in rows] == [(n, "first", "4.625") for n in "01"]
    assert rows[0]["kl_mean"] != rows[1]["kl_mean"]  # the seeds draw other windows


def task_run(scores):
    """A `TaskRun` of two tasks: one scored by length-normalized accuracy, one by accuracy."""
    questions = {("long", "acc,none"): {0: 0.0, 1: 0.0}, **scores}
    metrics = {task: {name: 0.5 for other, name in scores if other == task} for task, _ in scores}
    return types.SimpleNamespace(values={"results": metrics}, questions=questions)


def test_answers_are_compared_question_by_question():
    asked, table = importlib.import_module("task_scores"), importlib.import_module("rivals_table")
    long, short = ("long", "acc_norm,none"), ("short", "acc,none")
    dense = asked.answers(task_run({long: {0: 1.0, 1: 0.0}, short: {3: 1.0, 4: 1.0, 7: 0.0, 8: 0.0}}))
    worse = asked.answers(task_run({long: {0: 1.0, 1: 0.0}, short: {3: 0.0, 4: 1.0, 7: 0.0, 8: 0.0}}))
    other = asked.answers(task_run({long: {0: 1.0, 1: 1.0}, short: {3: 0.0, 4: 1.0, 7: 0.0, 8: 1.0}}))
    assert dense["long"] == {0: 1.0, 1: 0.0}  # normalized where the task has it
    results = [asked.against(dense, answers) for answers in (worse, other)]
    assert [(r["short"]["difference"], r["short"]["lost"], r["short"]["gained"]) for r in results] == [
        (-0.25, 1, 0),
        (0.0, 1, 1),
    ]
    seeds = [{"tasks": result} for result in results]
    # one of four questions lost: -25 ± 25 points; one lost, one gained: 0 ± 41; one of two gained: +50 ± 50
    assert table.task_cells(seeds[:1], ["long", "short"]) == ["+0.0 ± 0.0", "−25.0 ± 25.0", "−12.5 ± 12.5", "16.7%"]
    assert table.task_cells(seeds[1:], ["long", "short"]) == ["+50.0 ± 50.0", "+0.0 ± 40.8", "+25.0 ± 32.3", "50.0%"]
    assert table.task_cells(seeds, ["short"]) == ["−12.5 ± 32.9", "−12.5 ± 32.9", "37.5%"]
    with pytest.raises(asked.SpQRError, match="task long has none of the metrics acc_norm,none, acc,none"):
        asked.answers(task_run({("long", "word_perplexity,none"): {0: 3.0}}))


def test_the_table_of_tasks_has_one_setting():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra `plots`)")
    results = importlib.import_module("rivals_results")
    asked = {"task": "piqa@validation", "questions": "400", "first": "0.6", "error": "0.01", "lost": "9", "gained": "3"}
    begin = {"model": results.SMOLLM2, "calibration": results.MIXTURE, "seed": "0"} | asked
    rows = [
        begin | {"name": "IQ4_XS", "stored_bits": "4.44", "difference": "-0.015"},
        begin | {"name": "SpQR 4.3", "stored_bits": "4.3", "difference": "0.005"},
        begin | {"name": "SpQR 4.3", "stored_bits": "4.3", "difference": "0.9", "model": results.QWEN},
    ]
    lines = results.markdown_of_tasks(rows).splitlines()
    assert lines[0] == "|  | stored bits | PIQA | mean | flips of 400 | seeds |"
    assert lines[2:] == [
        "| dense | 32 | 60.0 | 60.0 | – | – |",
        "| SpQR 4.3 | 4.30 | +0.5 ± 1.0 | +0.5 ± 1.0 | 3.0% | 1 |",
        "| IQ4_XS | 4.44 | −1.5 ± 1.0 | −1.5 ± 1.0 | 3.0% | 1 |",
    ]


def test_a_run_that_measures_nothing_is_refused(folder):
    command = [sys.executable, SCRIPTS / "rivals.py", "dense.gguf", "--calib", "ids.npy"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "nothing to measure: name texts (--data) or tasks (--tasks)" in result.stderr


def test_rows_that_nobody_has_are_refused(folder):
    result = run_rivals(folder, "--rows", "EXL2")
    assert result.returncode == 1
    assert "no row matches 'EXL2'; rows are: SpQR 2.9" in result.stderr


def test_llama_cpp_quantizes_with_an_importance_matrix(folder, files, tmp_path):
    pytest.importorskip("llama_cpp", reason="llama.cpp is not installed (extra `rivals`)")
    config = TINY.__class__(**{**TINY.__dict__, "hidden_size": 256, "intermediate_size": 512, "head_dim": 64})
    write_gguf(tmp_path / "wide.gguf", random_decoder(config, seed=0))
    rng = np.random.default_rng(0)
    importance = {}
    for name, shape in GGUFFile(tmp_path / "wide.gguf").shapes().items():
        if name.startswith("blk.") and len(shape) == 2:
            importance[name] = np.exp(rng.uniform(-5, 5, shape[1])).astype(np.float32)
    for out, values in (("plain.gguf", {}), ("weighed.gguf", importance)):
        files.quantize(tmp_path / "wide.gguf", tmp_path / out, "Q4_K_S", values)
    bits, types = files.stored_bits(tmp_path / "plain.gguf")
    assert 4.5 <= bits < 5.6
    assert set(types) <= {"Q4_K", "Q5_K"}
    dense, plain, weighed = (GGUFFile(tmp_path / name) for name in ("wide.gguf", "plain.gguf", "weighed.gguf"))
    name = "blk.0.ffn_gate.weight"
    errors = [
        ((dense.read(name, np.float32) - file.read(name, np.float32)) ** 2) @ importance[name]
        for file in (plain, weighed)
    ]
    assert errors[1].sum() < 0.9 * errors[0].sum()
    np.testing.assert_array_equal(
        weighed.read("token_embd.weight", np.float32), dense.read("token_embd.weight", np.float32)
    )


def test_llama_cpp_that_is_missing_or_a_type_it_lacks_is_said(folder, files):
    if importlib.util.find_spec("llama_cpp") is None:
        with pytest.raises(files.SpQRError, match=r"pip install 'spqr-jax\[rivals\]'"):
            files.quantize(folder / "dense.gguf", folder / "out.gguf", "Q4_K_M", {})
    else:
        with pytest.raises(files.SpQRError, match="no type 'Q4_KM'"):
            files.quantize(folder / "dense.gguf", folder / "out.gguf", "Q4_KM", {})


@pytest.mark.parametrize("gains", ["folded", "rescaled"])
def test_a_model_off_its_grid_is_the_same_function(tiny_model, files, tmp_path, gains):
    write_gguf(tmp_path / "grid.gguf", tiny_model)
    files.write_dense(tmp_path / "grid.gguf", tmp_path / "off.gguf", 0, gains)
    files.write_dense(tmp_path / "grid.gguf", tmp_path / "copy.gguf", None)
    off, copy = (collect(open_model(str(tmp_path / name), "float32").source) for name in ("off.gguf", "copy.gguf"))
    for left, right in zip(jax.tree.leaves(copy), jax.tree.leaves(tiny_model), strict=True):
        np.testing.assert_array_equal(left, right)
    tokens = jnp.asarray(random_tokens((2, 16), 0))
    np.testing.assert_allclose(forward(off, tokens), forward(tiny_model, tokens), rtol=1e-4, atol=1e-4)
    for name in ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj"):
        assert np.abs(off.layers[0][name] / copy.layers[0][name] - 1).max() > 0.1
    for name in ("attention_norm", "mlp_norm"):
        change = off.layers[0][name] / copy.layers[0][name]
        if gains == "folded":
            np.testing.assert_array_equal(off.layers[0][name], 1.0)
        else:
            assert 0.1 < np.abs(np.log(change)).max() <= 0.5
    assert off.config == copy.config == open_model(str(tmp_path / "grid.gguf"), "float32").source.config


def test_bits_are_counted_by_the_bytes_in_the_file(tiny_model, files, tmp_path):
    import gguf

    write_gguf(tmp_path / "model.gguf", tiny_model, gguf.GGMLQuantizationType.Q8_0)
    bits, types = files.stored_bits(tmp_path / "model.gguf")
    assert bits == 8.5
    assert types == {"Q8_0": 1.0}


def test_scaling_by_activations_beats_rounding_to_nearest(scaled):
    w, h = problem()
    plain = float(scaled.loss(w - scaled.nearest(w, 4, 32), h))
    (clipped_only,) = scaled.awq(("o_proj",), [w], h, 4, 32)  # 32 x 128: heads share values, nothing is scaled
    (both,) = scaled.awq(("down_proj",), [w], h, 4, 32)
    losses = [float(scaled.loss(w - part, h)) for part in (clipped_only, both)]
    assert losses[0] < plain
    assert losses[1] < min(losses[0], 0.8 * plain)
    (unclipped,) = scaled.awq(("q_proj",), [w], h, 4, 32)
    assert losses[1] < float(scaled.loss(w - unclipped, h)) < plain


def test_half_quadratic_rounding_lowers_the_error(scaled):
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.standard_t(3, (64, 128)), jnp.float32)
    misses = [jnp.abs(w - scaled.hqq(w, bits, 32)) for bits in (3, 4)]
    assert float(jnp.mean(misses[1])) < 0.6 * float(jnp.mean(misses[0]))
    low, high = (part(w.reshape(64, -1, 32), axis=-1, keepdims=True) for part in (jnp.min, jnp.max))
    scale = (high - low) / 7
    grid = jnp.clip(jnp.round((w.reshape(64, -1, 32) - low) / scale), 0, 7) * scale + low
    assert float(jnp.mean(misses[0])) < float(jnp.mean(jnp.abs(w - grid.reshape(w.shape))))
    codes = np.unique(np.asarray(w - (w - scaled.hqq(w, 3, 32))).reshape(64, -1, 32)[0, 0])
    assert len(codes) <= 8


def test_rows_that_groups_do_not_divide_are_refused(folder):
    command = [sys.executable, str(SCRIPTS / "rivals_scaled.py"), "dense.gguf", "out", "hqq", "--group-size", "48"]
    result = subprocess.run(
        command, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert "rows of [64, 96] weights cannot be cut into groups of 48" in result.stderr
