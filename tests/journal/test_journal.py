"""The journal of a run: what was committed is there again, and nothing else is accepted."""

from __future__ import annotations

import json
import os

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from spqr_jax import CheckpointError
from spqr_jax.journal import Journal, identity_of
from spqr_jax.journal.parts import read_part, write_part

SAME = {"model": "a" * 64, "text": "none", "configuration": '{"bits": 4, "order": "natural"}', "format": "1"}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def arrays(seed=0):
    random = np.random.default_rng(seed)
    return {
        "bfloat16": random.normal(size=(3, 5)).astype(ml_dtypes.bfloat16),
        "float16": random.normal(size=(7,)).astype(np.float16),
        "float32": random.normal(size=(2, 3, 4)).astype(np.float32),
        "uint16": random.integers(0, 65536, (4, 4)).astype(np.uint16),
        "int32": random.integers(-9, 9, (5,)).astype(np.int32),
        "bool": random.normal(size=(6,)) > 0,
        "one number": np.float64(seed),
        "empty": np.zeros((0, 4), np.float32),
        "transposed": np.arange(12, dtype=np.int64).reshape(3, 4).T,
    }


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert actual[name].dtype == array.dtype
        np.testing.assert_array_equal(actual[name], array)


def begin(folder, resume=False, **changed):
    return Journal(folder, {**SAME, **changed}, resume)


def three_commits(folder):
    """Journal with states 1, 2 and 3, of which each names its part."""
    journal = begin(folder)
    for count in (1, 2, 3):
        journal.commit({"count": count, "inside": [{"part": journal.put(arrays(count))}]})
    return journal


# ---- parts --------------------------------------------------------------------------------------


def test_arrays_of_all_types_come_back(tmp_path):
    digest = write_part(tmp_path / "parts", arrays())
    assert_same(read_part(tmp_path / "parts", digest), arrays())
    assert write_part(tmp_path / "parts", arrays()) == digest
    assert names(tmp_path / "parts") == [f"{digest}.safetensors"]


def test_other_programs_read_a_part(tmp_path):
    plain = {name: array for name, array in arrays().items() if name != "bfloat16"}
    digest = write_part(tmp_path / "parts", plain)
    assert_same(safetensors.numpy.load_file(tmp_path / "parts" / f"{digest}.safetensors"), plain)


def test_a_type_that_the_format_lacks_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="array x has the type complex128: expected one of BOOL, U8"):
        begin(tmp_path / "run").put({"x": np.zeros(3, np.complex128)})


@pytest.mark.parametrize("place", [0, 9, -1])
def test_a_part_with_one_wrong_bit_is_refused(tmp_path, place):
    journal = begin(tmp_path / "run")
    digest = journal.put(arrays())
    path = tmp_path / "run" / "parts" / f"{digest}.safetensors"
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="does not match its name"):
        journal.get(digest)
    with pytest.raises(CheckpointError, match="cannot be read"):
        journal.get("0" * 64)


# ---- states -------------------------------------------------------------------------------------


def test_a_run_goes_on_from_what_was_committed_last(tmp_path):
    assert begin(tmp_path / "run").state is None
    three_commits(tmp_path / "run").put(arrays(4))
    journal = begin(tmp_path / "run", resume=True)
    assert journal.state["count"] == 3
    assert_same(journal.get(journal.state["inside"][0]["part"]), arrays(3))
    assert names(tmp_path / "run") == ["parts", "state-00000002.json", "state-00000003.json"]
    assert len(names(tmp_path / "run" / "parts")) == 2  # of the fourth nobody knows
    journal.commit({"count": 4})
    assert begin(tmp_path / "run", resume=True).state == {"count": 4}


def test_numbers_that_json_does_not_have_come_back(tmp_path):
    begin(tmp_path / "run").commit({"values": [float("inf"), 0.1 + 0.2, 1e-310], "none": None})
    assert begin(tmp_path / "run", resume=True).state == {"values": [float("inf"), 0.1 + 0.2, 1e-310], "none": None}


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def empty(path):
    path.write_bytes(b"")


def edit(path):
    path.write_text(path.read_text().replace('"count": 3', '"count": 4'))


def drop_parts(path):
    for digest in json.loads(path.read_text())["parts"]:
        (path.parent / "parts" / f"{digest}.safetensors").unlink()


@pytest.mark.parametrize("damage", [cut, empty, edit, drop_parts])
def test_the_state_before_takes_over_from_a_damaged_one(tmp_path, damage):
    three_commits(tmp_path / "run")
    damage(tmp_path / "run" / "state-00000003.json")
    with pytest.warns(UserWarning, match="newest state of the run in .* is damaged: going on from the one before"):
        journal = begin(tmp_path / "run", resume=True)
    assert journal.state["count"] == 2
    assert_same(journal.get(journal.state["inside"][0]["part"]), arrays(2))
    journal.commit({"count": 33})
    assert begin(tmp_path / "run", resume=True).state == {"count": 33}


def test_a_run_without_a_whole_state_is_refused_not_begun_anew(tmp_path):
    three_commits(tmp_path / "run")
    for count in (2, 3):
        cut(tmp_path / "run" / f"state-0000000{count}.json")
    with pytest.raises(CheckpointError, match="cannot go on: state 3 is damaged; begin again with --restart"):
        begin(tmp_path / "run", resume=True)


def test_nothing_is_removed_before_a_state_is_whole(tmp_path, monkeypatch):
    """Whatever call on the file system fails, the run goes on from the last state or the one that was being written."""
    import spqr_jax.journal.generations as generations
    import spqr_jax.journal.parts as parts

    for failing in range(1, 12):
        folder = tmp_path / str(failing)
        journal, count = three_commits(folder), 0

        def fail(kind, function):
            def call(*args):
                nonlocal count
                count += 1
                if count == failing:  # noqa: B023
                    raise OSError(5, "Input/output error")
                return function(*args)

            return call

        with monkeypatch.context() as patch:
            for module in (generations, parts):
                for name in ("flush", "flush_folder"):
                    patch.setattr(module, name, fail(name, getattr(module, name)))
            patch.setattr(os, "replace", fail("replace", os.replace))
            try:
                journal.commit({"count": 4, "part": journal.put(arrays(4))})
                failed = False
            except CheckpointError:
                failed = True
        state = begin(folder, resume=True).state
        assert failed == (failing <= 6)
        assert state["count"] in ((3, 4) if failed else (4,))


# ---- refusals -----------------------------------------------------------------------------------


def test_an_unfinished_run_is_not_begun_anew_unasked(tmp_path):
    begin(tmp_path / "run").commit({})
    with pytest.raises(CheckpointError, match=r"unfinished run is in .*run: --resume goes on .*, --restart removes it"):
        begin(tmp_path / "run")


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"model": "b" * 64}, "differs in the model .aaaaaaaaaaaa…, now bbbbbbbbbbbb….: give the same again"),
        ({"text": "c" * 64}, "differs in the calibration text .none, now cccccccccccc…."),
        ({"configuration": '{"bits": 3, "order": "natural"}'}, "the configuration .bits 4, now 3.:"),
        ({"format": "2"}, "the version of spqr-jax's format .1, now 2."),
        ({"text": "x", "format": "2"}, "the calibration text .none, now x. and in the version"),
        ({"devices": "8"}, "devices .none, now 8."),
    ],
)
def test_another_run_is_refused_and_told_what_differs(tmp_path, changed, says):
    begin(tmp_path / "run").commit({"count": 1})
    with pytest.raises(CheckpointError, match=says):
        begin(tmp_path / "run", resume=True, **changed)
    assert begin(tmp_path / "run", resume=True).state == {"count": 1}


def test_two_processes_do_not_write_to_a_run_in_turn(tmp_path):
    first = three_commits(tmp_path / "run")
    begin(tmp_path / "run", resume=True).commit({"count": 4})
    with pytest.raises(CheckpointError, match="another process goes on with the run"):
        first.commit({"count": 5})
    assert begin(tmp_path / "run", resume=True).state == {"count": 4}


def test_identity_tells_texts_and_settings_apart():
    tokens = np.arange(12).reshape(3, 4)
    same = identity_of("m", [tokens], {"bits": 3, "order": "natural"}, None)
    assert same == identity_of("m", [tokens.astype(np.int32)], {"order": "natural", "bits": 3}, None)
    others = [
        identity_of("n", [tokens], {"bits": 3, "order": "natural"}, None),
        identity_of("m", [tokens + 1], {"bits": 3, "order": "natural"}, None),
        identity_of("m", [tokens.reshape(4, 3)], {"bits": 3, "order": "natural"}, None),
        identity_of("m", [tokens[:2], tokens[2:]], {"bits": 3, "order": "natural"}, None),
        identity_of("m", None, {"bits": 3, "order": "natural"}, None),
        identity_of("m", [tokens], {"bits": 4, "order": "natural"}, None),
        identity_of("m", [tokens], {"bits": 3, "order": "natural"}, {"epochs": 1}),
    ]
    assert all(other != same for other in others)


# ---- the end ------------------------------------------------------------------------------------


def test_the_folder_goes_when_the_run_is_done(tmp_path):
    journal = three_commits(tmp_path / "run")
    journal.close(done=False)
    with pytest.raises(CheckpointError, match="is closed"):
        journal.commit({})
    journal = begin(tmp_path / "run", resume=True)
    journal.close(done=True)
    assert names(tmp_path) == []
