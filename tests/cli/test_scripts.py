"""The scripts that make the tables of the documentation, on a tiny model."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support import ROOT
from support.harness_tasks import CHOICES
from support.model_files import write_hf, write_model_and_ids

SCRIPTS = ROOT / "scripts"


def test_quality_measures_each_row_once(tiny_model, tmp_path):
    write_hf(tmp_path / "model", tiny_model)
    rng = np.random.default_rng(0)
    for name in ("calib", "text"):
        np.save(tmp_path / f"{name}.npy", rng.integers(0, 256, 2000))
    command = [sys.executable, SCRIPTS / "quality.py", "model", "--out", "found", "--calib", "calib.npy"]
    command += ["--nsamples", "4", "--seqlen", "32", "--data", "a text", "text.npy", "64", "5"]
    command += ["--row", "--method rtn --bits 4", "--csv", "rows.csv"]

    def run():
        return subprocess.run(
            command, cwd=tmp_path, env=os.environ | {"COLUMNS": "200"}, capture_output=True, text=True, check=True
        )

    run()
    table = (tmp_path / "found" / "table.md").read_text()
    files = list((tmp_path / "found").glob("*.json"))
    rows = {values["row"]: values for values in (json.loads(path.read_text()) for path in files)}
    assert set(rows) == {"dense", "--method rtn --bits 4"}
    dense, quantized = rows["dense"], rows["--method rtn --bits 4"]
    assert len(dense["texts"]["a text"]["window_losses"]) == 5
    dense_perplexity = dense["texts"]["a text"]["perplexity"]
    assert quantized["texts"]["a text"]["perplexity"] != dense["texts"]["a text"]["perplexity"]
    assert quantized["ideal_bits"] == pytest.approx(6.0)  # 4 and two 16-bit floats for 16 weights
    assert quantized["cpu_seconds"] > 0.5
    assert quantized["peak_gib"] > 0.05
    assert f"{quantized['texts']['a text']['perplexity']:.2f}" in table
    with (tmp_path / "rows.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["method"], first["perplexity"], first["cpu_seconds"]) == ("dense", f"{dense_perplexity:.2f}", "")
    assert (second["method"], second["ideal_bits"], second["calibration_windows"]) == ("rtn", "6.000", "4 x 32")
    assert (second["text"], second["text_windows"]) == ("a text", "5 x 64")
    times = [path.stat().st_mtime_ns for path in files]
    run()  # what is done is kept
    assert times == [path.stat().st_mtime_ns for path in files]
    assert (tmp_path / "found" / "table.md").read_text() == table


def run_script(name, folder, *arguments):
    environment = os.environ | {"COLUMNS": "200", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, SCRIPTS / name, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    return write_model_and_ids(tmp_path_factory.mktemp("scripts"), tiny_model, eos_token=2)


@pytest.mark.slow
def test_compare_methods_gives_all_the_same_bits(folder):
    text = ("--calib", "ids.npy", "--nsamples", 4, "--seqlen", 32, "--data", "ids.npy", "--windows", 4)
    arguments = ("model", *text, "--eval-seqlen", 64, "--methods", "rtn,adaround", "--group-size", 32, "--out", "found")
    result = run_script("compare_methods.py", folder, *arguments)
    assert result.returncode == 0, result.stderr
    rows = {v["row"]: v for v in (json.loads(path.read_text()) for path in (folder / "found").glob("*.json"))}
    assert set(rows) == {"rtn", "adaround", "spqr"}
    assert rows["rtn"]["stored_bits"] == rows["adaround"]["stored_bits"]
    assert rows["spqr"]["stored_bits"] <= rows["rtn"]["stored_bits"] + 0.02
    for values in rows.values():
        assert values["peak_gib"] > 0.05
        assert values["kl_mean"] > 0
        assert f"| {values['perplexity']:.2f} |" in (folder / "found" / "table.md").read_text()
    assert run_script("compare_methods.py", folder, "model", "--methods", "magic").returncode == 1


@pytest.mark.slow
def test_paper_tables_run_dry_on_the_demo_model_and_go_on_where_they_were(tmp_path):
    environment = os.environ | {"ACCELERATOR": "cpu", "VENV": str(Path(sys.prefix)), "COLUMNS": "200"}
    command = [SCRIPTS / "perplexity.sh", "--dry-run", "--out", tmp_path / "paper"]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    table = (tmp_path / "paper" / "table.md").read_text()
    assert table.count("\n| ") == 7  # a head and six rows
    assert "| dense, 16 bits | 16.000 |" in table
    again = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert "$ spqr" not in again.stdout  # nothing was left to do
    assert (tmp_path / "paper" / "table.md").read_text() == table


def test_paper_tables_ask_what_to_do(tmp_path):
    assert "nothing to do" in run_script("paper_tables.py", tmp_path).stderr
    assert "no model llama" in run_script("paper_tables.py", tmp_path, "llama").stderr


@pytest.fixture
def questions(folder):
    """The task `tiny_choices`, in the folder tasks."""
    pytest.importorskip("lm_eval", reason="the LM Evaluation Harness is not installed (extra `eval`)")
    (folder / "tasks").mkdir(exist_ok=True)
    rows = [{"question": "ab " * n, "choices": ["c", " d"], "answer": n % 2} for n in range(1, 7)]
    (folder / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tasks" / "choices.yaml").write_text(CHOICES.format(folder=folder))


@pytest.mark.slow
def test_rivals_answer_tasks_and_are_compared_with_the_dense_model(folder, questions):
    asked = ("--calib", "ids.npy", "--nsamples", 4, "--seqlen", 32)
    asked += ("--tasks", "tiny_choices", "--include-path", "tasks")
    result = run_script("rivals.py", folder, "model", *asked, "--rows", "^RTN [34] bits.* 32$", "--out", "asked")
    assert result.returncode == 0, result.stderr
    with (folder / "asked" / "rivals_tasks.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["name"], row["task"], row["questions"]) for row in rows] == [
        (f"RTN {bits} bits, groups of 32", "tiny_choices", "6") for bits in (3, 4)
    ]
    for row in rows:
        assert float(row["second"]) - float(row["first"]) == pytest.approx(float(row["difference"]))
    assert (folder / "asked" / "table.md").read_text().splitlines()[0].endswith("| mean of tasks | flips |")


@pytest.mark.slow
def test_ablations_answer_tasks_with_several_seeds(folder, questions):
    text = ("--calib", "ids.npy", "--nsamples", 4, "--seqlen", 32, "--data", "a text", "ids.npy", 64, 4)
    text += ("--data", "another", "ids.npy", 32, 3)
    asked = ("--tasks", "tiny_choices", "--include-path", "tasks", "--paper", "--rows", "^no outliers", "--seeds", 0, 1)
    result = run_script("ablations.py", folder, "model", *text, *asked, "--out", "ablated")
    assert result.returncode == 0, result.stderr
    found = [json.loads(path.read_text()) for path in (folder / "ablated" / "rows").iterdir()]
    kept = {(values["row"], values["seed"]): values for values in found}
    assert sorted(kept) == [("SpQR", 0), ("SpQR", 1), ("dense", 0), ("no outliers", 0), ("no outliers", 1)]
    for values in found:
        value, _ = values["tasks"]["tiny_choices"]
        assert 0 <= value <= 1
    assert kept["no outliers", 0]["outlier_percent"] == 0 < kept["SpQR", 0]["outlier_percent"]
    table = (folder / "ablated" / "table.md").read_text()
    assert "| mean of tasks |" in table
    both = [kept["no outliers", seed]["texts"]["another"]["perplexity"] for seed in (0, 1)]
    assert both[0] != both[1]  # the seeds draw other windows
    assert f"| {np.mean(both):.2f} ± {np.std(both, ddof=1):.2f} |" in table
    with (folder / "ablated" / "table.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 5 * 3  # two texts and a task each
    assert (folder / "ablated" / "perplexity_by_bits.png").is_file()


@pytest.mark.parametrize(
    "script", ["quality_tables.py", "plot_quality.py", "rivals_results.py", "ablations_results.py"]
)
def test_tables_and_picture_of_the_quality_page_are_made_from_the_results(script):
    result = run_script(script, ROOT, "--check")
    assert result.returncode == 0, result.stderr


def test_kinds_of_text_are_told_apart(folder):
    np.save(folder / "low.npy", np.random.default_rng(0).integers(0, 128, (8, 64)))
    np.save(folder / "high.npy", np.random.default_rng(1).integers(128, 256, (8, 64)))
    texts = ("--text", "low", "low.npy", "--text", "high", "high.npy", "--nsamples", 8, "--seqlen", 64)
    unseen = ("--unseen", "noise", "ids.npy")
    result = run_script("text_kinds.py", folder, "model", *texts, *unseen, "--out", "kinds")
    assert result.returncode == 0, result.stderr
    rows = [line.strip("| ").split(" | ") for line in (folder / "kinds" / "table.md").read_text().splitlines()[2:]]
    errors = {(calibration, way): tuple(map(float, measured)) for calibration, way, *measured in rows}
    assert not any(calibration.startswith("noise") for calibration, _ in errors)  # it is only measured on
    low, high = errors["low, 8 windows", "damping 0.01"], errors["high, 8 windows", "damping 0.01"]
    assert low[0] < high[0]  # each kind is served best by itself
    assert high[1] < low[1]
    none = errors["low, 8 windows", "no compensation"]
    assert low[0] < none[0]
    mixed = errors["mixture, 8 windows of each", "damping 0.01"]
    assert mixed[0] < high[0]
    assert mixed[1] < low[1]


def test_what_a_plan_promises_is_measured(folder):
    np.save(folder / "many.npy", np.random.default_rng(0).integers(0, 256, (48, 64)))
    options = ("--blocks", 1, "--text", "many.npy", "--seqlen", 64)
    result = run_script("plan_promise.py", folder, "model", *options, "--nsamples", 48, "--out", "promise")
    assert result.returncode == 0, result.stderr
    rows = [line.strip("| ").split(" | ") for line in (folder / "promise" / "table.md").read_text().splitlines()[2:]]
    assert len(rows) == 7
    for _, _, *figures in rows:
        half, factor, real = map(float, figures)
        assert half > factor > 1  # the plan's tokens are twice a half's, and most of a gap counts
        assert 0.8 < real < half  # a file has one side, so nothing is unseen here
    short = run_script("plan_promise.py", folder, "model", *options, "--nsamples", 4)
    assert short.returncode == 1
    assert "which has no halves" in short.stderr
