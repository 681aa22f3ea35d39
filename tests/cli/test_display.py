"""The view of long work, with a clock that the test sets."""

from __future__ import annotations

import signal

import pytest

from spqr_jax import Event, LayerReport
from spqr_jax.cli.display import EventView
from spqr_jax.events import Remark, SafePoint
from spqr_jax.solver import LayerStats
from spqr_jax.terminal import interrupt


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def layer(path: str) -> LayerReport:
    stats = LayerStats(
        output_error=0.125, outlier_share=0.01, ideal_bits=3.9, stored_bits=4.1, damping=0.1, outlier_threshold=0.2
    )
    return LayerReport(path, (64, 32), 3, stats, 1.0)


@pytest.fixture
def clock():
    return Clock()


def lines(capsys) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_without_a_terminal_a_phase_is_a_line_and_then_one_each_30_seconds(clock, capsys):
    view = EventView(clock)
    for block in range(8):
        view(Event("measuring", block, 8, f"forward through block {block}"))
        clock.now += 10
    assert lines(capsys) == [
        "measuring 0 of 8, forward through block 0",
        "measuring 3 of 8, forward through block 3, about 50 s left",
        "measuring 6 of 8, forward through block 6, about 20 s left",
    ]
    view(Event("quantizing", 0, 210))
    clock.now += 240
    view(Event("quantizing", 41, 210, "layers.5.q_proj", layer("layers.5.q_proj")))
    assert lines(capsys) == [
        "quantizing 0 of 210",
        "quantizing 41 of 210, layers.5.q_proj, error 0.125, about 16 min left",
    ]


def test_a_line_comes_where_no_event_does(clock, capsys):
    view = EventView(clock)
    view(Event("quantizing", 0, 2))
    view(Event("quantizing", 1, 2, "layers.0.q_proj"))
    capsys.readouterr()
    clock.now = 29
    view.tick()
    assert lines(capsys) == []
    clock.now = 31
    view.tick()
    view.tick()
    assert lines(capsys) == ["quantizing 1 of 2, layers.0.q_proj, about 31 s left"]


def test_time_left_leaves_out_what_an_earlier_run_did(clock, capsys):
    view = EventView(clock)
    view(Event("quantizing", 100, 200))
    clock.now = 60
    view(Event("quantizing", 110, 200, "layers.9.q_proj"))
    assert lines(capsys)[-1] == "quantizing 110 of 200, layers.9.q_proj, about 9 min left"


def test_blocks_are_rows_and_remarks_are_lines(clock, capsys):
    with EventView(clock) as view:
        view(Event("quantizing", 1, 2, "layers.0.q_proj", layer("layers.0.q_proj")))
        view(Event("quantizing", 0, 0, detail=Remark("activations are saved")))
        view(Event("quantizing", 2, 2, "layers.1.q_proj", layer("layers.1.q_proj")))
    written = lines(capsys)
    assert "activations are saved" in written
    assert [line.split()[0] for line in written if "q_proj  0.125" in line] == ["layers.0", "layers.1"]


def test_the_first_signal_waits_for_a_safe_point_and_the_second_does_not(clock, capsys, monkeypatch):
    monkeypatch.setattr(interrupt, "_received", [])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    interrupt.install()
    try:
        view = EventView(clock)
        with interrupt.at_safe_points():
            signal.raise_signal(signal.SIGTERM)
            view(Event("quantizing", 1, 4, "layers.0.q_proj"))
            with pytest.raises(KeyboardInterrupt):
                view(Event("quantizing", 1, 4, "block 0", SafePoint()))
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert "stopping once the work so far is saved" in capsys.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            view(Event("quantizing", 2, 4))
    finally:
        interrupt._received.clear()
        for number, handler in handlers.items():
            signal.signal(number, handler)
