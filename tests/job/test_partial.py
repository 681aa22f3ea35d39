"""Runs that are stopped inside a block, the head or the measuring pass: nothing is done twice, and nothing differs."""

from __future__ import annotations

import dataclasses
import re

import pytest
from support.problems import TINY
from support.stops import Stop, StopAfter, report_of

from spqr_jax import LayerReport, SpQRConfig, quantize
from spqr_jax.events import Remark
from spqr_jax.job import kept, pace
from spqr_jax.models.decoder import random_decoder
from spqr_jax.planning import sensitivity
from spqr_jax.stream import activations
from spqr_jax.stream.stages import stage_parts

pytestmark = [
    pytest.mark.filterwarnings("ignore:what was finished"),
    pytest.mark.filterwarnings("ignore:.*these experts see few"),
]


def quantized_in_pieces(model, batches, config, out, steps, phase="quantizing", note=""):
    """Stops a run again and again, so many safe points after it went on. How often, and the weights of all reports."""
    paths, stops = [], 0
    for _ in range(100):
        stop = StopAfter(phase, steps, note)

        def told(event, stop=stop):
            if isinstance(event.detail, LayerReport):
                paths.append(event.detail.path)
            stop(event)

        try:
            quantize(model, batches, config, out=out, resume=stops > 0, events=told)
            return stops, paths
        except Stop:
            stops += 1
    raise AssertionError("the run does not come to an end")


def counted(monkeypatch, module, *names):
    """How often functions of a module are called from here on, in all."""
    calls = []
    for name in names:
        function = getattr(module, name)

        def note(*arguments, function=function, name=name):
            calls.append(name)
            return function(*arguments)

        monkeypatch.setattr(module, name, note)
    return calls


def two_experts_at_a_time(config, kind, stage, most_bytes):
    return stage_parts(config, kind, stage, 2 * 4 * config.hidden_size**2)


SPARSE = dataclasses.replace(TINY, num_experts=5, experts_per_token=2, expert_size=32)
CASES = {
    "target and head": (TINY, SpQRConfig(target_bits=4.5, head_bits=3), 5),
    "all at once": (TINY, SpQRConfig(sequential=False), 4),
    "experts that drift": (SPARSE, SpQRConfig(drift_correction=0.5), 13),
}


@pytest.mark.parametrize(("model", "config", "steps"), CASES.values(), ids=CASES.keys())
def test_a_run_that_is_stopped_inside_blocks_does_nothing_twice(
    tiny_batches, tmp_path, monkeypatch, model, config, steps
):
    model = random_decoder(model, seed=0)
    monkeypatch.setattr(activations, "stage_parts", two_experts_at_a_time)
    calls = counted(monkeypatch, activations, "accumulate_stage", "accumulate_drift", "accumulate_head")
    quantize(model, tiny_batches, config, out=tmp_path / "whole")
    needed = sorted(calls)
    calls.clear()
    stops, paths = quantized_in_pieces(model, tiny_batches, config, tmp_path / "parts", steps)
    assert stops > 4
    assert report_of(tmp_path / "parts") == report_of(tmp_path / "whole")
    assert sorted(calls) == needed
    assert len(paths) == len(set(paths))


def test_a_measuring_pass_that_is_stopped_does_nothing_twice(tiny_model, tiny_batches, tmp_path, monkeypatch):
    config = SpQRConfig(target_bits=4.5)
    calls = counted(monkeypatch, sensitivity, "run_stage", "_backward", "loss_gradient")
    quantize(tiny_model, tiny_batches, config, out=tmp_path / "whole")
    needed = sorted(calls)
    calls.clear()
    stops, _ = quantized_in_pieces(tiny_model, tiny_batches, config, tmp_path / "parts", 1, "measuring", "ward through")
    assert stops == 4  # two blocks there and back
    assert sorted(calls) == needed
    assert report_of(tmp_path / "parts") == report_of(tmp_path / "whole")


def test_what_is_too_large_for_the_disk_is_made_again(tiny_model, tiny_batches, tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "DISK_SHARE", 0.0)
    monkeypatch.setattr(pace, "SAVE_EVERY", 0.0)
    config = SpQRConfig(target_bits=4.5, head_bits=3)
    quantize(tiny_model, tiny_batches, config, out=tmp_path / "whole")
    stop, remarks = StopAfter("quantizing", 12), []

    def told(event):
        if isinstance(event.detail, Remark):
            remarks.append(event.detail.text)
        stop(event)

    for count, events in enumerate([StopAfter("measuring", 2, "backward"), told, StopAfter("quantizing", 20)]):
        with pytest.raises(Stop):
            quantize(tiny_model, tiny_batches, config, out=tmp_path / "parts", resume=count > 0, events=events)
    quantize(tiny_model, tiny_batches, config, out=tmp_path / "parts", resume=True)
    assert report_of(tmp_path / "parts") == report_of(tmp_path / "whole")
    (hessians,) = [text for text in remarks if "Hessians" in text]  # said once
    assert re.match(r"Hessians \(.* MB\) are not saved", hessians)


def test_saves_come_once_a_minute_or_take_a_tenth_of_the_time(monkeypatch):
    now, done = [0.0], []
    monkeypatch.setattr(pace.time, "perf_counter", lambda: now[0])
    steady = pace.Pace()
    for second in range(300):
        now[0] = float(second)
        steady.save_if_due(lambda: done.append(now[0]))
    assert done == [60, 120, 180, 240]
    now[0], done[:] = 0.0, []
    slow = pace.Pace()

    def save():
        done.append(now[0])
        now[0] += 30

    while now[0] < 1000:
        slow.save_if_due(save)
        now[0] += 1
    assert done == [60, 390, 720]
