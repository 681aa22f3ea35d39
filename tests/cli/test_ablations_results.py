"""scripts/ablations_results.py: from what the ablations measured to the page and the picture."""

from __future__ import annotations

import csv
import importlib

import pytest
from support import ROOT

MODEL = "SmolLM2-135M, off the grid"
MEASURED = {  # by row and seed: perplexity and the score of a task
    ("dense", 0): (20.0, 0.50),
    ("SpQR", 0): (22.0, 0.48),
    ("SpQR", 1): (24.0, 0.46),
    ("no outliers", 0): (26.0, 0.46),
    ("no outliers", 1): (30.0, 0.40),
}


@pytest.fixture
def results(monkeypatch, tmp_path):
    """The script, with a page, a picture and a file of its own."""
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    script = importlib.import_module("ablations_results")
    for name, file in (("FILE", "kept.csv"), ("PAGE", "page.md"), ("PICTURE", "picture.png")):
        monkeypatch.setattr(script, name, tmp_path / file)
    (tmp_path / "page.md").write_text("above\n<!-- ablations-smollm2 -->\n<!-- end of ablations-smollm2 -->\nbelow\n")
    return script


def measured(folder, values):
    """What scripts/ablations.py leaves in a folder."""
    names = ("question", "row", "seed", "ideal_bits", "stored_bits", "outlier_percent", "seconds")
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*names, "measure", "value", "stderr"])
        for (row, seed), (perplexity, score) in values.items():
            begin = ["", row, seed, 4.0, 4.2, 1.25, 60.0]
            writer.writerow([*begin, "perplexity, WikiText-2", perplexity, 0.5])
            writer.writerow([*begin, "piqa@validation", score, 0.01])


def run(results, monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["ablations_results.py", *map(str, words)])
    return results.main()


def test_means_deviations_and_paired_differences(results, monkeypatch, tmp_path):
    measured(tmp_path, MEASURED)
    assert run(results, monkeypatch, "--add", tmp_path, "--model", MODEL) == 0
    assert run(results, monkeypatch) == 0
    page = results.PAGE.read_text()
    assert page.startswith("above\n<!-- ablations-smollm2 -->\n| ")
    assert page.endswith("<!-- end of ablations-smollm2 -->\nbelow\n")
    _, _, dense, base, without = (line for line in page.splitlines() if line.startswith("|"))
    assert dense == "| dense | 4.20 | 1.25% | 20.00 | 50.0 | 50.0 | – |"
    assert base == "| SpQR | 4.20 | 1.25% | 23.00 ± 1.41 | 47.0 ± 1.4 | 47.0 ± 1.4 | – |"
    # differences of -2 and -6 points: their mean, and its standard error over two seeds
    assert without == "| no outliers | 4.20 | 1.25% | 28.00 ± 2.83 | 43.0 ± 4.2 | 43.0 ± 4.2 | −4.0 ± 2.0 |"
    assert run(results, monkeypatch, "--check") == 0


def test_other_figures_are_noticed(results, monkeypatch, tmp_path, capsys):
    measured(tmp_path, MEASURED)
    run(results, monkeypatch, "--add", tmp_path, "--model", MODEL)
    run(results, monkeypatch)
    measured(tmp_path, {("SpQR", 1): (25.0, 0.46)})  # measured again: replaces one row, the others stay
    run(results, monkeypatch, "--add", tmp_path, "--model", MODEL)
    assert len(results.read_rows(results.FILE)) == 2 * len(MEASURED)
    assert run(results, monkeypatch, "--check") == 1
    said = capsys.readouterr().err
    assert "page.md was made from other figures" in said
    assert "picture.png was made from other figures" in said
    run(results, monkeypatch)
    assert "| 23.50 ± 2.12 |" in results.PAGE.read_text()
    assert run(results, monkeypatch, "--check") == 0
