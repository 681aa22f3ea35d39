"""Several devices and hosts generate what one device does. They are virtual CPU devices of other processes."""

from __future__ import annotations

import json
import shutil
import socket

import pytest
from support.shared_models import processes, shared_model

import spqr_jax
from spqr_jax.checkpoint import content_digest

# Of the largest logit, in float32: devices sum a row's products in another order than one device.
MOST_ERROR = 1e-5


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return processes("on_eight_devices.py", 8, tmp_path_factory.mktemp("models"))[0]


def test_devices_generate_the_same_text_as_one(report):
    assert [case for case in report["cases"] if not case["same"]] == []
    assert {case["devices"] for case in report["cases"]} == {2, 4, 8}
    assert report["xla"]
    assert report["drawn"]


def test_layers_in_a_loop_are_shared_alike(report):
    assert report["in_loop"]


def test_logits_differ_by_the_order_of_sums_only(report):
    assert [case for case in report["cases"] if not case["error"] <= MOST_ERROR] == []


def test_a_checkpoint_is_read_in_pieces_and_written_whole(report):
    assert report["files"]
    assert report["loaded"]


def test_two_hosts_read_generate_write_and_find_damage_together(tmp_path):
    model = shared_model("llama", 8)
    spqr_jax.save(tmp_path / "model", model)
    shutil.copytree(tmp_path / "model", tmp_path / "damaged")
    header = tmp_path / "damaged" / "layers" / "00000" / "config" / "data.json"
    values = json.loads(header.read_text())
    values["weights"]["down_proj"]["leaves"]["tile_stats"]["sha256"] = 64 * "0"
    header.write_text(json.dumps(values))
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    reports = processes("on_two_hosts.py", 4, tmp_path, port, count=2)
    expected = spqr_jax.generate(model, [[1, 5, 9], [7]], max_new_tokens=8, stop_tokens=()).tokens
    for found in reports:
        assert found["same"]
        assert found["tokens"] == expected
    # one of them verified the leaf, and both fail
    named = ["down_proj.tile_stats does not match its checksum" in found["damage"] for found in reports]
    assert sorted(named) == [False, True]
    assert "could not be read or verified by process" in reports[named.index(False)]["damage"]
    assert content_digest(tmp_path / "saved") == content_digest(tmp_path / "model")
