"""Compiled programs are kept between runs of the command, within bounds."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from support.model_files import write_hf

from spqr_jax import compile_cache


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    write_hf(folder / "model", tiny_model)
    np.save(folder / "ids.npy", np.random.default_rng(0).integers(0, 256, 2000))
    return folder


def measure(folder, cache):
    """`spqr perplexity` in a process that JAX's own settings say nothing to; its exit status and messages."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    arguments = ["perplexity", "model", "--data", "ids.npy", "--seqlen", "32", "--windows", "2"]
    result = subprocess.run(
        [sys.executable, "-m", "spqr_jax", *arguments],
        cwd=folder,
        env=environment | {compile_cache.CACHE_VARIABLE: str(cache), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    return result.returncode, result.stdout, result.stderr


def entries(root):
    return {path.name for path in root.rglob("*-cache")}


def test_the_second_run_compiles_nothing(folder):
    root = folder / "programs"
    status, first, errors = measure(folder, root)
    assert status == 0, errors
    kept = entries(root)
    assert {"jit_pass_block", "jit__see_piece"} <= {name.partition("-")[0] for name in kept}
    status, second, errors = measure(folder, root)
    assert status == 0, errors
    assert entries(root) == kept
    assert second.rpartition(",")[0] == first.rpartition(",")[0]  # but for the seconds


def test_nothing_is_kept_where_that_is_asked_for(folder, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "home"))
    status, _, errors = measure(folder, "off")
    assert status == 0, errors
    assert not entries(folder / "home")


def test_a_place_that_cannot_be_written_is_said_and_no_more(folder):
    (folder / "a file").write_text("")
    status, _, errors = measure(folder, folder / "a file")
    assert status == 0
    assert "compiled programs cannot be cached" in errors
    assert compile_cache.CACHE_VARIABLE in errors


def test_what_was_used_longest_ago_goes_first(tmp_path):
    for age, name in enumerate("abcde"):
        path = tmp_path / "jax-x" / f"{name}-cache"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(100))
        os.utime(path, (1e9 - age, 1e9 - age))
    (tmp_path / "jax-x" / "no entry").write_bytes(bytes(1000))
    compile_cache.trim(tmp_path, 250)
    assert entries(tmp_path) == {"a-cache", "b-cache"}
    assert (tmp_path / "jax-x" / "no entry").exists()
    compile_cache.trim(tmp_path, 250)
    assert entries(tmp_path) == {"a-cache", "b-cache"}


def test_the_environment_names_the_place(tmp_path, monkeypatch):
    monkeypatch.setenv(compile_cache.CACHE_VARIABLE, str(tmp_path))
    assert compile_cache.cache_root() == tmp_path
    monkeypatch.setenv(compile_cache.CACHE_VARIABLE, "OFF")
    assert compile_cache.cache_root() is None
    monkeypatch.delenv(compile_cache.CACHE_VARIABLE)
    assert compile_cache.cache_root().name == "compiled"
