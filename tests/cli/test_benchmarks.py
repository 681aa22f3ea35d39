"""The benchmark scripts: their CSV files, and the page that is made from these."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import runpy
import subprocess
import sys

import pytest
from support import ROOT
from support.command import QUICK, spqr
from support.model_files import write_model_and_ids

import cpu_kernels

BENCHMARKS = ROOT / "benchmarks"
MODULES = {
    *("accelerator", "device_loop", "generate_program", "launches", "page", "report", "roofline", "timings"),
    "torch_rivals",  # needs PyTorch with CUDA
}
SCRIPTS = sorted(path.stem for path in BENCHMARKS.glob("*.py") if path.stem not in MODULES)
MACHINE = {
    "machine": "mine",
    "processor": "a processor, with a comma",
    "cores": 2,
    "kernels": "avx2",
    "jax": "0.10.2",
    "python": "3.11.9",
    "date": "2025-01-31",
    "revision": "unknown",
    "run": "main",
}


@pytest.fixture(autouse=True)
def _scripts_can_be_imported(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def timings():
    return importlib.import_module("timings")


def run_benchmark(name, *arguments):
    """Runs a script in this process: its exit status and all that it wrote."""
    written = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        patch.setattr(sys, "path", [*sys.path])
        patch.setenv("COLUMNS", "200")
        with contextlib.redirect_stdout(written), contextlib.redirect_stderr(written):
            try:
                runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")
                status = 0
            except SystemExit as end:
                status = end.code or 0
    return status, written.getvalue()


def product(timings, **values):
    sizes = {"bits": 3, "shape": "64x64", "batch": 1, "rival": "dense float32"}
    return timings.ProductRow(**MACHINE, **(sizes | values))


def test_rows_come_back_from_a_file(timings, tmp_path):
    path = tmp_path / "products.csv"
    full = product(timings, median_ms=0.12, ratio_to_dense_f32=1.0, gb_per_s=7.9, weight_bytes=16384, note='a "note"')
    empty = product(timings, rival="packed")
    timings.merge(path, [full, empty])
    assert timings.read(path, timings.ProductRow) == [full, empty]
    text = path.read_text()
    assert ",0.120,,1.00,7.9,16384," in text
    timings.merge(path, [full])
    assert path.read_text() == text


def test_a_new_row_takes_the_place_of_the_one_with_its_key(timings, tmp_path):
    path = tmp_path / "products.csv"
    slow, other = product(timings, median_ms=2.0), product(timings, batch=4, median_ms=3.0)
    timings.merge(path, [slow, other])
    fast = dataclasses.replace(slow, median_ms=1.0, revision="abc")
    timings.merge(path, [fast])
    assert timings.read(path, timings.ProductRow) == [fast, other]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("median_ms", "median_s", 1), "missing: median_ms; unknown: median_s"),
        (lambda text: text.replace("shape,batch", "batch,shape", 1), "another order"),
        (lambda text: text.replace("3.000", "fast"), "line 2: median_ms is 'fast', not a number"),
        (lambda text: text.rstrip("\n") + ",1\n", "line 2: the number of cells"),
    ],
)
def test_a_file_with_other_columns_or_cells_is_refused_and_kept(timings, tmp_path, change, message):
    path = tmp_path / "products.csv"
    timings.merge(path, [product(timings, median_ms=3.0)])
    changed = change(path.read_text())
    path.write_text(changed)
    with pytest.raises(timings.TimingsError, match=message):
        timings.merge(path, [product(timings, batch=2)])
    assert path.read_text() == changed
    status, written = run_benchmark("cpu_matmul", "--csv", path)  # stops before it measures
    assert status == 2
    assert message in written


def test_the_tables_of_the_page_on_speed_are_those_of_the_files(tmp_path):
    tables = importlib.import_module("tables")
    assert run_benchmark("tables", "--check")[0] == 0
    stale = tmp_path / "page.md"
    stale.write_text(tables.PAGE.read_text().replace("| 66.9 |", "| 67.9 |", 1))
    assert tables.update(stale, tables.page_tables(), only_check=True) == 1
    tables.update(stale, tables.page_tables(), only_check=False)
    assert stale.read_text() == tables.PAGE.read_text()


def test_the_tables_of_the_kernels_page_are_made_from_what_was_counted():
    status, written = run_benchmark("kernel_tables", "--check")
    assert status == 0, written


def test_every_file_can_be_shown():
    tables = importlib.import_module("tables")
    files = {path.stem for path in tables.RESULTS.glob("*.csv")} & set(tables.FILES)
    assert {"products", "generation", "first_and_second_run", "memory", "load_memory"} <= files
    for name in files:
        status, written = run_benchmark("tables", "--show", name)
        assert status == 0
        assert written.startswith("| machine |")
    status, written = run_benchmark("tables", "--show", "products", "--only", "shape=4096x4096", "--only", "batch=1")
    assert status == 0
    assert "11008x4096" not in written
    assert "| avx512vnni, all threads | 0.487 | 0.361 | 5.45 | 17.6 |" in written
    assert run_benchmark("tables", "--show", "products", "--only", "size=1")[0] == 1


def test_the_roofline_is_drawn(timings, tmp_path):
    pytest.importorskip("matplotlib")
    roofline = importlib.import_module("roofline")
    rows = [product(timings, rival=rival, median_ms=0.1, weight_bytes=2048) for rival in ("dense float32", "packed")]
    with pytest.raises(ValueError, match="bandwidth"):
        roofline.roofline(rows, tmp_path / "plot.png")
    rows = [dataclasses.replace(row, memory_gb_per_s=16.0) for row in rows]
    roofline.roofline(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert roofline.operations(rows[0]) == 2 * 64 * 64


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_explains_itself(name):
    pytest.importorskip("gguf")
    status, written = run_benchmark(name, "--help")
    assert status == 0
    assert f"usage: {name}.py" in written


@pytest.mark.skipif(bool(cpu_kernels.why_unavailable()), reason="the CPU kernels are not compiled")
def test_products_are_added_to_a_file(timings, tmp_path, monkeypatch):
    best = cpu_kernels.kernel_names()[0]
    monkeypatch.setattr(cpu_kernels, "kernel_names", lambda: (best,))  # fewer programs to compile
    path = tmp_path / "products.csv"
    timings.merge(path, [product(timings)])
    tiny = ("--shapes", "32x32", "--batch", 1, "--rounds", 1, "--megabytes", 0)
    status, written = run_benchmark("cpu_matmul", *tiny, "--csv", path, "--machine", "a new one", "--run", "first")
    assert status == 0, written
    older, *rows = timings.read(path, timings.ProductRow)
    assert older == product(timings)
    assert {(row.machine, row.run, row.shape, row.batch) for row in rows} == {("a new one", "first", "32x32", 1)}
    names = {row.rival for row in rows}
    assert {"dense float32", f"{best}, all threads"} <= names
    for row in rows:
        assert row.median_ms >= row.least_ms >= 0
        assert row.weight_bytes > 0
        assert row.cores > 0
    dense = [row.ratio_to_dense_f32 for row in rows if row.rival.startswith("dense float32")]
    assert max(dense) == 1.0


@pytest.mark.slow
def test_whole_models_are_added_to_files(timings, tiny_model, tmp_path):
    folder = write_model_and_ids(tmp_path, tiny_model)
    done = spqr("quantize", "model", "--out", "small", "--calib", "ids.npy", *QUICK, cwd=folder)
    assert done.returncode == 0, done.stderr

    def run(name, row_type, *arguments):
        command = [sys.executable, BENCHMARKS / f"{name}.py", *arguments, "--csv", f"{name}.csv"]
        subprocess.run(list(map(str, command)), cwd=folder, check=True, stdout=subprocess.DEVNULL)
        return timings.read(folder / f"{name}.csv", row_type)

    tokens = ("--prompt-tokens", 8, "--new-tokens", 4, "--turns", 1)
    rows = run("cpu_decode", timings.GenerationRow, "small", "--dense", "model", *tokens)
    assert {"dense float32", "packed"} <= {row.rival for row in rows}
    [row] = run("cpu_memory", timings.MemoryRow, "small")
    assert row.held_mb > row.weights_mb
    sizes = ("--data", "ids.npy", "--seqlen", 64, "--windows", 1, "--turns", 1)
    rows = run("compare_cost", timings.CompareRow, "model", "small", *sizes)
    assert len(rows) == 3
    rows = run("quantize_time", timings.QuantizeRow, "--layer", "64x64")
    assert {"compilation", "columns"} <= {row.part for row in rows}
