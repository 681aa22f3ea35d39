"""Power cuts while a checkpoint grows: Orbax' own files come back whole, or are written again."""

from __future__ import annotations

import os
import random
import warnings

import pytest
from support.crash import model_run, power_cut, recorder

from spqr_jax.checkpoint import content_digest

CUTS = 12


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    return recorder.record_runs(tmp_path_factory.mktemp("recorded"), "support.crash.model_run", [])


def test_the_recording_has_all_that_orbax_writes(recorded):
    records, watched = recorded
    assert power_cut.disk_after(records, len(records)).as_it_is() == power_cut.read_tree(watched)


def test_orbax_makes_directories_before_it_writes_into_them(recorded):
    """Otherwise it may remove what its own threads have written, on a busy machine."""
    records, _ = recorded
    place = {record.path: number for number, record in enumerate(records) if record.kind in ("mkdir", "create")}
    for path, number in place.items():
        if "orbax-checkpoint-tmp/" in path:
            assert place[path.rpartition("/")[0]] < number, path
    assert not [r.path for r in records if r.kind == "unlink" and r.path.endswith("orbax-checkpoint-tmp")]


def test_a_power_cut_at_any_moment_changes_no_checkpoint(recorded, tmp_path, monkeypatch):
    records, watched = recorded
    params, expected = model_run.model(), content_digest(watched / "q")
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    chance = random.Random(0)
    for cut in range(CUTS):
        folder = tmp_path / str(cut)
        disk = power_cut.disk_after(records, chance.randint(0, len(records)))
        power_cut.write_tree(folder, disk.after_power_cut(chance))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model_run.run(folder / "q", params)
        assert [path.name for path in folder.iterdir()] == ["q"], cut
        assert content_digest(folder / "q") == expected, cut
