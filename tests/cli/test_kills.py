"""`spqr quantize` goes on after a kill or a power cut at any moment, to the same bytes.

A recording of one undisturbed run tells what the disk holds at each moment: after a kill, all changes until then; after
a power cut, what was flushed and perhaps more. scripts/crash kills real processes.
"""

from __future__ import annotations

import os
import random
import re
from unittest import mock

import pytest
from support import ROOT
from support.command import QUICK, spqr, spqr_process
from support.crash import power_cut, recorder
from support.model_files import write_model_and_ids

from spqr_jax.checkpoint import CheckpointFolder, content_digest

COMMAND = [
    "quantize", "model", "--out", "q", "--target-bits", "4.5", "--calib", "ids.npy", *QUICK,
    "--tune", "logits", "--tune-epochs", "2",
]  # fmt: skip
KILLS, CUTS = 4, 2
_FINISHED_BLOCK = re.compile(r"\.q\.run/(untuned)/layers/(\d{5})")  # those of the result come all at once, at the end


@pytest.fixture(scope="module")
def recorded(tiny_model, tmp_path_factory):
    """The inputs, the changes of an undisturbed run, and the digest of its result."""
    folder = tmp_path_factory.mktemp("recorded")
    library = recorder.compile_shim(folder)
    if library is None:
        pytest.skip("recording needs a C compiler and Linux")
    write_model_and_ids(folder, tiny_model)
    place = new_place(folder, folder / "place")
    environment = recorder.recording(library, place, folder / "log") | {"PYTHONPATH": str(ROOT)}
    with mock.patch.dict(os.environ, environment):
        result = spqr_process(*COMMAND, cwd=place)
    assert result.returncode == 0, result.stderr
    assert left(place) == []
    return folder, recorder.read_log(folder / "log", place), content_digest(place / "q")


def new_place(inputs, place):
    place.mkdir()
    for name in ("model", "ids.npy"):
        (place / name).symlink_to(inputs / name)
    return place


def left(place):
    return sorted({path.name for path in place.iterdir()} - {"model", "ids.npy", "q"})


def finished_blocks(records):
    matches = [_FINISHED_BLOCK.fullmatch(record.second) for record in records if record.kind == "rename"]
    return {(match[1], int(match[2])) for match in matches if match}


def go_on(place):
    """Resumes in this process: which blocks were put, by folder and index."""
    put = []

    def noted(self, index, block):
        put.append((self._path.name, index))
        return put_block(self, index, block)

    put_block = CheckpointFolder.put_block
    with mock.patch.object(CheckpointFolder, "put_block", noted):
        result = spqr(*COMMAND, "--resume", cwd=place)
    assert result.returncode == 0, result.stderr
    return put


def test_a_killed_run_goes_on_to_the_same_bytes(recorded, tmp_path, monkeypatch):
    inputs, records, expected = recorded
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    chance = random.Random(0)
    for number in range(KILLS):
        first = len(records) * number // KILLS  # one kill in each part of the run
        count = chance.randint(first, len(records) * (number + 1) // KILLS)
        place = new_place(inputs, tmp_path / str(number))
        power_cut.write_tree(place, power_cut.disk_after(records, count).as_it_is())
        put = go_on(place)
        assert left(place) == [], count
        assert content_digest(place / "q") == expected, count
        assert len(finished_blocks(records[:count]) & set(put)) <= 1, count


def test_a_run_goes_on_after_a_power_cut_to_the_same_bytes(recorded, tmp_path, monkeypatch):
    inputs, records, expected = recorded
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    chance = random.Random(1)
    for number in range(CUTS):
        count = chance.randint(len(records) // 4, len(records))
        place = new_place(inputs, tmp_path / str(number))
        power_cut.write_tree(place, power_cut.disk_after(records, count).after_power_cut(chance))
        go_on(place)
        assert left(place) == [], count
        assert content_digest(place / "q") == expected, count
