"""Power cuts: whatever the disk kept of what was not flushed, the next run comes to the same result."""

from __future__ import annotations

import os
import random
import warnings

import pytest
from support.crash import power_cut, recorder, small_run

CUTS = 60


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """The changes of two undisturbed runs, of which the second replaces the result of the first."""
    folder = tmp_path_factory.mktemp("recorded")
    records, watched = recorder.record_runs(folder, "support.crash.small_run", [], ["--overwrite"])
    return records, power_cut.read_tree(watched)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """The runs that go on need not reach the disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def resumed(folder, tree):
    """What is wrong after a run that goes on from `tree`; empty for nothing."""
    power_cut.write_tree(folder, tree)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            small_run.run(folder / "q", overwrite=True)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    expected = {f"q/{name}": content for name, content in small_run.expected().items()}
    left = {path: content for path, content in power_cut.read_tree(folder).items() if path != "q"}
    return "" if left == expected else f"found {sorted(left)}"


def problems(records, folder, seed):
    chance, wrong = random.Random(seed), []
    for number in range(CUTS):
        count = chance.randint(0, len(records))
        tree = power_cut.disk_after(records, count).after_power_cut(chance)
        if problem := resumed(folder / str(number), tree):
            wrong.append(f"cut {number}, after {count} of {len(records)} changes: {problem}")
    return wrong


def test_the_recording_has_all_that_happened(recorded):
    records, tree = recorded
    assert power_cut.disk_after(records, len(records)).as_it_is() == tree
    assert {record.kind for record in records} >= {"create", "write", "sync", "rename", "unlink", "mkdir"}


def test_a_power_cut_at_any_moment_changes_no_result(recorded, tmp_path):
    assert problems(recorded[0], tmp_path, seed=0) == []


@pytest.mark.parametrize("kind", ["files", "folders"])
def test_without_flushes_results_would_be_lost(recorded, tmp_path, kind):
    """That the model of the disk can find what it looks for."""
    records = recorded[0]
    folders = {record.inode for record in records if record.kind == "mkdir"}
    files = {record.inode for record in records if record.kind == "create"}
    dropped = files if kind == "files" else folders
    records = [record for record in records if not (record.kind == "sync" and record.inode in dropped)]
    assert problems(records, tmp_path, seed=0)
