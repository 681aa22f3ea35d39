"""A model quantized on several devices, or by several processes, has the bytes of one device."""

from __future__ import annotations

import numpy as np
import pytest
from support import mesh_runs

CASES = ["plain", "target and tied head", "experts"]


@pytest.fixture(scope="module")
def runs():
    """One process on meshes of several sizes; and what two processes with four devices each print and say.

    The second of the two fails in the end.
    """
    alone = mesh_runs.begin(devices=8, meshes=[0, 3, 8], cases=CASES)
    pair = [mesh_runs.begin(devices=4, meshes=[8], cases=["plain"], hosts=h, fail=1) for h in mesh_runs.hosts(2)]
    ended = [(*process.communicate(timeout=300), process.returncode) for process in pair]
    return mesh_runs.result(alone), [(mesh_runs.printed(out), errors, status) for out, errors, status in ended]


@pytest.fixture(scope="module")
def pair(runs):
    return runs[1]


@pytest.mark.parametrize("case", CASES)
def test_any_number_of_devices_gives_the_bytes_of_one(runs, case):
    """Drift correction included."""
    alone, pair = runs
    digests = alone[case] | {
        f"process {i}": printed[case]["8"] for i, (printed, *_) in enumerate(pair) if case in printed
    }
    assert len(digests) >= 3
    assert len({digest["bytes"] for digest in digests.values()}) == 1, digests
    for digest in digests.values():
        np.testing.assert_allclose(digest["errors"], digests["0"]["errors"], rtol=1e-6)


def test_what_the_first_process_reads_reaches_the_others(pair):
    first, second = (printed["from first"] for printed, _, _ in pair)
    assert first == second
    assert first["error"] == "refused"


def test_an_error_of_one_process_ends_all(pair):
    (_, errors, _), _ = pair
    assert all(status for _, _, status in pair)
    assert "process 1 failed: RuntimeError: on purpose" in errors or "another process has ended" in errors


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
