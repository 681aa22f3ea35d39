"""The fuzzer finds planted faults, and no fault in a few inputs for every reader (docs/explanation/reliability.md)."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from support.fuzz import pool, seeds
from support.fuzz.judge import Bench
from support.fuzz.mutate_gguf import parse
from support.fuzz.readers import BY_NAME, READERS

_SLOW_TO_BEGIN = ("checkpoint", "tokenizer", "gguf-tokenizer", "chat", "directory")
QUICK = [reader for reader in READERS if reader.share and reader.name not in _SLOW_TO_BEGIN]
INPUTS = 2000


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return pool.make_seeds(QUICK, tmp_path_factory.mktemp("seeds"))


def benches(folder: Path, scratch: Path, seed: int = 0) -> list[Bench]:
    return [Bench(reader, folder, scratch, seed) for reader in QUICK]


def test_inputs_depend_on_reader_seed_and_number_alone(folder, tmp_path):
    first, second = benches(folder, tmp_path / "a"), benches(folder, tmp_path / "b")
    for bench, again in zip(first, second, strict=True):
        numbers = list(range(40))
        inputs = [bench.input(number) for number in numbers]
        random.Random(0).shuffle(numbers)
        assert {number: again.input(number) for number in numbers} == dict(enumerate(inputs))
        assert len({repr(changes) for _, changes in inputs}) > 30, bench.reader.name
    other = benches(folder, tmp_path / "c", seed=1)
    assert all(a.input(3) != b.input(3) for a, b in zip(first, other, strict=True))


def test_gguf_files_are_put_together_as_they_were(folder):
    for path in (folder / "gguf_files").rglob("*.gguf"):
        assert parse(path.read_bytes()).to_bytes() == path.read_bytes()


def test_sound_files_are_small(folder):
    assert max(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 100_000


PLANTED = {
    "fine": None,
    "key-error": "KeyError",
    "busy": "time",
    "asleep": "hang",
    "hungry": "memory",
    "hidden": "memory",
    "dead": "crash",
    "panic": "PanicException",
    "nameless": "message without a file",
    "endless": "message too long",
}


def test_every_kind_of_fault_is_found(folder, tmp_path, monkeypatch):
    """After a process is lost another one goes on; a reader that costs too many is given up."""
    monkeypatch.setattr(pool, "HANG_SECONDS", 1.0)
    monkeypatch.setattr(pool, "_MOST_LOST", 1)
    tasks = [pool.Task(f"planted-{name}", first, first + 1) for first in range(2) for name in PLANTED]
    outcome = pool.Pool(folder, tmp_path, 0).run(tasks, processes=1)
    assert outcome.given_up == {"planted-asleep", "planted-dead"}
    for name, kind in PLANTED.items():
        count = 1 if kind in ("hang", "crash") else 2
        assert outcome.inputs[f"planted-{name}"] == count
        faults = [fault for fault in outcome.faults if fault.reader == f"planted-{name}"]
        expected = [] if kind is None else [(number, kind) for number in range(count)]
        assert [(fault.number, fault.kind) for fault in faults] == expected, name


def test_a_few_inputs_for_every_reader(folder, tmp_path):
    outcome = pool.Pool(folder, tmp_path, 0).run(pool.tasks_of(QUICK, INPUTS), processes=1)
    assert sum(outcome.inputs.values()) > 0.99 * INPUTS
    assert set(outcome.inputs) == {reader.name for reader in QUICK}
    assert not outcome.faults


def test_seeds_are_named_by_readers():
    assert {reader.seeds for reader in BY_NAME.values()} == set(seeds.MAKERS)
