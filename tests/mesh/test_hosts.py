"""`spqr quantize --hosts` in two processes: stopped, killed, gone on with, and with tuning afterwards."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from support import mesh_runs
from support.command import spqr
from support.model_files import write_hf
from support.problems import TINY, random_tokens

from spqr_jax.checkpoint import CheckpointSource
from spqr_jax.models.decoder import random_decoder

OPTIONS = [
    "model", "--calib", "text.npy", "--nsamples", "6", "--seqlen", "24", "--bits", "3", "--tune", "blocks",
    "--tune-epochs", "1", "--calibration-dtype", "float32",
]  # fmt: skip


def begin(folder, *more):
    """Starts the two processes, with two devices each."""
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "2", "PYTHONPATH": str(mesh_runs.TESTS.parent)}
    command = [sys.executable, "-m", "spqr_jax", "quantize", *OPTIONS, "--out", "shared", *more, "--hosts"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [subprocess.Popen([*command, h], cwd=folder, env=environment, **pipes) for h in mesh_runs.hosts(2)]


def after_state(folder, number, act):
    """Calls `act` once the run has saved its state so often."""
    ends = time.monotonic() + 240
    while not any(int(path.stem[-8:]) >= number for path in folder.glob(".shared.run/state-*.json")):
        assert time.monotonic() < ends, "no state is saved"
        time.sleep(0.02)
    act()


def end(processes):
    """Exit statuses, and what the processes wrote to stderr."""
    written = [process.communicate(timeout=240)[1] for process in processes]
    return [process.returncode for process in processes], written


def content(path):
    source = CheckpointSource(path)
    parts = [source.block(index) for index in range(source.config.num_layers)] + [source.outer()]
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(parts)], source.layer_stats, source.quantization


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """Runs of one process, and of two: killed, gone on with, stopped by a signal, and gone on with to the end."""
    folder = tmp_path_factory.mktemp("hosts")
    write_hf(folder / "model", random_decoder(dataclasses.replace(TINY, num_layers=3), seed=0))
    np.save(folder / "text.npy", random_tokens((1000,), 0))
    killed = begin(folder)
    after_state(folder, 1, killed[1].kill)
    story = {"killed": end(killed)}
    number = max(int(path.stem[-8:]) for path in folder.glob(".shared.run/state-*.json"))
    stopped = begin(folder, "--resume")
    after_state(folder, number + 1, lambda: stopped[1].send_signal(signal.SIGTERM))
    story["stopped"] = end(stopped)
    ended = begin(folder, "--resume")
    alone = spqr("quantize", *OPTIONS, "--out", "alone", cwd=folder)
    assert alone.returncode == 0, alone.stderr
    story["ended"] = end(ended)
    return folder, story


SLOW_TO_LEAVE = """
import sys, time
import jax
from spqr_jax.stream.hosts import start_hosts

together = start_hosts(sys.argv[1])
leave = jax.distributed.shutdown
if jax.process_index():
    jax.distributed.shutdown = lambda: (time.sleep(3), leave())
with together.watched(lambda: False, lambda: None):
    pass
"""


def test_the_first_process_is_the_last_to_leave():
    """XLA aborts a process that leaves after the coordinator has gone."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(mesh_runs.TESTS.parent)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [
        subprocess.Popen([sys.executable, "-c", SLOW_TO_LEAVE, host], env=environment, **pipes)
        for host in mesh_runs.hosts(2)
    ]
    statuses, written = end(processes)
    assert statuses == [0, 0], written


def test_a_run_that_goes_on_ends_as_a_run_of_one_process(story):
    folder, steps = story
    assert steps["ended"][0] == [0, 0], steps["ended"][1]
    assert content(folder / "shared") == content(folder / "alone")


def test_a_process_that_is_killed_ends_the_other_one(story):
    (first, second), (words, _) = story[1]["killed"]
    assert first > 0
    assert second == -signal.SIGKILL
    assert "another process has ended" in words or "no sign of life" in words
    assert "--resume" in words


def test_a_signal_to_one_process_stops_all_at_a_safe_point(story):
    statuses, (words, _) = story[1]["stopped"]
    assert statuses == [130, 130]
    assert "--resume" in words
