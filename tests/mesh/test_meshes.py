"""A model quantized on several devices, or by several processes, has the bytes of one device."""

from __future__ import annotations

import socket
import time

import pytest
from support import mesh_runs

CASES = ["plain", "target and tied head", "experts"]


def _hosts(count: int) -> list[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return [f"127.0.0.1:{free.getsockname()[1]},{count},{index}" for index in range(count)]


@pytest.fixture(scope="module")
def digests() -> dict[str, dict[str, str]]:
    """Of one process, and (as ``2x4``) of two processes with four devices each."""
    first = mesh_runs.begin(devices=8, meshes=[0, 1, 2, 4, 8], cases=["plain"])
    found = mesh_runs.result(first)
    found |= mesh_runs.result(mesh_runs.begin(devices=8, meshes=[0, 8], cases=CASES[1:]))
    hosts = [mesh_runs.begin(devices=4, meshes=[8], cases=["plain"], hosts=text) for text in _hosts(2)]
    for index, process in enumerate(hosts):
        found["plain"][f"2x4, process {index}"] = mesh_runs.result(process)["plain"]["8"]
    return found


@pytest.mark.parametrize("case", CASES)
def test_any_number_of_devices_gives_the_bytes_of_one(digests, case):
    assert len(digests[case]) >= 2
    assert len(set(digests[case].values())) == 1, digests[case]


def test_an_error_of_one_process_ends_all():
    """Well before a collective operation would give up."""
    begun = time.monotonic()
    processes = [mesh_runs.begin(devices=1, meshes=[2], cases=["plain"], hosts=text, fail=1) for text in _hosts(2)]
    errors = [process.communicate(timeout=200)[1] for process in processes]
    assert all(process.returncode for process in processes)
    assert "process 1 failed: RuntimeError: on purpose" in errors[0]
    assert time.monotonic() - begun < 200


def test_eight_devices_hold_a_sixth_each_of_what_one_holds():
    """From shapes alone: activations, a Hessian while it is summed, a block, and weights while they are solved."""
    held = mesh_runs.result(mesh_runs.begin(devices=8, memory=[1, 8]))
    for part, alone in held["1"].items():
        assert 6 * held["8"][part] <= alone, (part, held)


def test_accelerators_of_a_mesh_solve_rows_panel_by_panel():
    """As programs that CPUs can run too; a weight at the middle between two codes may fall to either side."""
    same, is_finite = mesh_runs.result(mesh_runs.begin(devices=8, panels=8))
    assert same > 0.99
    assert is_finite
