"""What a machine is measured to do, and how a forecast is put into words."""

from __future__ import annotations

import pytest

from spqr_jax import SpQRConfig
from spqr_jax.forecast import Machine, Work, about_bytes, about_seconds, kept_programs, machine, seconds
from spqr_jax.forecast.words import about_count


def machine_of(rate, slowness=1.0):
    return Machine("cpu", "a machine", 2, {"float32": rate, "bfloat16": 2 * rate}, None, slowness)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0.2, "a few seconds"),
        (12, "about 10 seconds"),
        (41, "about 40 seconds"),
        (57, "about 55 seconds"),
        (58, "about 60 seconds"),
        (74, "about 70 seconds"),
        (104, "about 100 seconds"),
        (106, "about 2 minutes"),
        (9.4 * 60, "about 9 minutes"),
        (17 * 60, "about 15 minutes"),
        (58 * 60, "about 1 hour"),
        (2.4 * 3600, "about 2 hours"),
        (30 * 3600, "about 30 hours"),
        (3.2 * 86400, "about 3 days"),
    ],
)
def test_durations_are_rounded_as_people_speak(number, words):
    assert about_seconds(number) == words


def test_bytes_and_counts():
    assert [about_bytes(n) for n in (1e6, 644e6, 0.999e9, 2.86e9, 28.3e9)] == [
        "10 MB",
        "640 MB",
        "1.0 GB",
        "2.9 GB",
        "28 GB",
    ]
    assert [about_count(n) for n in (960, 84_900, 134.5e6, 7.24e9, 999_900)] == [
        "960", "85 thousand", "134 million", "7.2 billion", "1.0 million",
    ]  # fmt: skip


def test_a_product_takes_its_operations_over_the_measured_rate():
    fast, slow = machine_of(200e9), machine_of(100e9)
    work = Work(dense=1e12)
    start = seconds(Work(), fast)
    assert seconds(work, slow) - start == pytest.approx(2 * (seconds(work, fast) - start))
    assert seconds(Work(bfloat16=1e12), fast) < seconds(work, fast)
    assert seconds(work, fast, "bfloat16") < seconds(work, fast)


def test_programs_that_are_kept_take_no_time():
    work = Work(programs=20.0)
    for slowness in (1.0, 3.0):
        there = machine_of(190e9, slowness)
        assert seconds(work, there) - seconds(work, there, compiled=True) == pytest.approx(20.0 * slowness)


def test_what_is_no_product_goes_by_the_processor():
    work = Work(searched=1e9, handled=1e9)
    assert seconds(work, machine_of(1e9)) == seconds(work, machine_of(1e12))  # fast products do not help
    assert seconds(work, machine_of(1e9, slowness=2)) == pytest.approx(2 * seconds(work, machine_of(1e9)))


def test_this_machine_is_measured_quickly_and_with_one_small_program(monkeypatch):
    monkeypatch.setattr(machine, "_SIZES", {"cpu": 32, "other": 32})
    machine.measure_machine.cache_clear()
    machine.multiply.clear_cache()
    try:
        measured = machine.measure_machine(("float32",))
        assert machine.multiply._cache_size() == 1
        assert machine.measure_machine(("float32",)) is measured  # once a process
    finally:
        machine.measure_machine.cache_clear()
    assert measured.rates["float32"] > 0
    assert measured.slowness > 0
    assert measured.cores >= 1
    assert measured.name == f"cpu, {measured.cores} core{'s' * (measured.cores > 1)}"


def test_free_memory_is_read_where_the_system_tells_it(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal:  4000 kB\nMemAvailable:    2000 kB\n")
    assert machine._free_of_machine(tmp_path / "meminfo") == 2000 * 1024
    assert machine._free_of_machine(tmp_path / "none") is None
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("300\n")
    assert machine._free_of_container(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    assert machine._free_of_container(tmp_path) == 700
    assert machine._free_of_container(tmp_path / "none") is None


def test_a_run_that_ended_well_is_remembered_by_what_its_programs_depend_on(tmp_path, monkeypatch):
    monkeypatch.setattr(kept_programs, "_folder", lambda: str(tmp_path))

    def key(config):
        return kept_programs.run_key("quantize", kept_programs.program_settings(config), 1024)

    first = key(SpQRConfig(bits=3, damping=0.1))
    assert not kept_programs.are_kept(first)
    kept_programs.note_kept(first)
    assert kept_programs.are_kept(first)
    assert key(SpQRConfig(bits=4, damping=0.2, outlier_threshold=0.5)) == first  # data to the same programs
    assert key(SpQRConfig(group_size=32)) != first
    monkeypatch.setattr(kept_programs, "_folder", lambda: None)
    assert not kept_programs.are_kept(first)
    kept_programs.note_kept(first)  # nowhere to write: says nothing
