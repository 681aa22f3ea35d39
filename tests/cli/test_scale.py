"""``spqr quantize --plan``, ``--machine`` and ``--max-memory``; and the memory that a run held beside its plan."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from support.command import QUICK, spqr, spqr_process
from support.family_files import VARIANTS, torch_config
from support.model_files import write_model_and_ids
from support.model_shapes import LARGE_MODELS

from spqr_jax import load_model
from spqr_jax.cli import scale
from spqr_jax.errors import SpQRError
from spqr_jax.forecast.memory_plan import Thrift


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    return write_model_and_ids(tmp_path_factory.mktemp("scale"), tiny_model)


def planned(folder, *arguments):
    result = spqr("quantize", *arguments, "--plan", "--json", "plan.json", cwd=folder)
    assert result.returncode == 0, result.stderr
    return result.stdout, json.loads((folder / "plan.json").read_text())


@pytest.mark.parametrize("name", LARGE_MODELS)
@pytest.mark.parametrize("machine", ["8xH100", "2x8xH100", "v5e-256"])
def test_a_large_model_needs_its_config_only(tmp_path, name, machine):
    (tmp_path / "config.json").write_text(json.dumps(LARGE_MODELS[name]))
    said, plan = planned(tmp_path, "config.json", "--machine", machine)
    assert plan["weights"] > 65e9
    assert plan["dense_bytes"] == 2 * plan["weights"]
    assert 0.2 * plan["dense_bytes"] < plan["result_bytes"] < 0.4 * plan["dense_bytes"]
    assert plan["memory"]["device_bytes"] == pytest.approx(sum(plan["memory"]["device"].values()))
    assert plan["seconds"] == pytest.approx(sum(plan["seconds_by_part"].values()))
    assert plan["seconds_per_block"] * plan["blocks"] < plan["seconds"]
    assert "nothing measured" in " ".join(said.split())
    assert plan["processes"] == {"8xH100": 1, "2x8xH100": 2, "v5e-256": 32}[machine]
    assert not list(tmp_path.glob("*spqr*"))


@pytest.mark.parametrize("variant", [name for name in VARIANTS if "," not in name and " with" not in name])
def test_all_families_are_planned_from_their_config(tmp_path, variant):
    (tmp_path / "config.json").write_text(json.dumps(torch_config(variant).to_dict()))
    said, plan = planned(tmp_path, ".", "--bits", 3, "--nsamples", 4, "--seqlen", 32, "--dtype", "bfloat16")
    assert plan["weights"] > 0
    assert plan["memory"]["host_bytes"] > 0.4e9
    assert plan["machine"] in said


def test_devices_share_the_text_and_not_the_factorization(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LARGE_MODELS["Llama 3 70B"]))
    plans = [
        planned(tmp_path, "config.json", "--machine", name, "--bits", 3, "--nsamples", 128)[1]
        for name in ("H100", "4xH100", "8xH100")
    ]
    parts = [plan["seconds_by_part"] for plan in plans]
    assert parts[0]["forward passes"] == pytest.approx(4 * parts[1]["forward passes"])
    assert parts[0]["forward passes"] == pytest.approx(8 * parts[2]["forward passes"])
    assert parts[0]["Hessians"] > parts[1]["Hessians"] > parts[2]["Hessians"]
    assert parts[0]["factorization"] == parts[2]["factorization"]
    assert parts[0]["between devices"] == 0 < parts[1]["between devices"]
    devices = [plan["memory"]["device"] for plan in plans]
    assert 4 * devices[1]["activations"] == 8 * devices[2]["activations"]
    assert devices[2]["activations"] < devices[0]["activations"] <= 8 * devices[2]["activations"]  # it makes some twice
    assert devices[0]["factorization"] == devices[2]["factorization"]  # every device does all of it


def test_70_billion_weights_fit_chips_of_16_gb(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LARGE_MODELS["Llama 3 70B"]))
    said, plan = planned(tmp_path, "config.json", "--machine", "v5e-256", "--bits", 3)
    assert "does not fit" not in said
    assert plan["memory"]["device_bytes"] < 0.9 * 16e9
    few = planned(tmp_path, "config.json", "--machine", "v5e-8", "--bits", 3)[1]["memory"]["device"]
    assert few["blocks"] == pytest.approx(32 * plan["memory"]["device"]["blocks"])  # a device has its rows only


def test_a_limit_puts_activations_on_disk(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LARGE_MODELS["Llama 3 70B"]))
    free = planned(tmp_path, "config.json", "--machine", "H100", "--bits", 3)[1]["memory"]
    said, plan = planned(tmp_path, "config.json", "--machine", "H100", "--bits", 3, "--max-memory", "40GiB")
    assert free["device_bytes"] > 40 * 2**30 > plan["memory"]["device_bytes"]
    assert plan["memory"]["activations_on_disk"]
    assert plan["memory"]["disk"]["activations"] > free["device"]["activations"]  # in memory, some are made twice
    assert "To keep to 40GiB: activations on disk." in said


def test_what_cannot_be_planned_is_one_message(folder):
    cases = {
        ("--plan", "--max-memory", "2G"): "expected a size with a unit",
        ("--plan", "--max-memory", "0GiB"): "above zero",
        ("--plan", "--max-memory", "100MB"): "need at least",
        ("--plan", "--machine", "abacus"): "no machine 'abacus'",
        ("--machine", "H100", "--out", "x"): "--machine goes with --plan",
        (): "--out",
    }
    for arguments, message in cases.items():
        result = spqr("quantize", "model", *arguments, cwd=folder)
        assert result.returncode == 2, arguments
        assert message in result.stderr, result.stderr
    assert not (folder / "x").exists()


@pytest.mark.parametrize(("mesh", "devices"), [("auto", None), ("data=8", 8), ("data=4,rows=2", 8)])
def test_devices_of_a_mesh(mesh, devices):
    assert scale.mesh_devices(mesh) == devices


@pytest.mark.parametrize("mesh", ["", "8", "data", "data=0", "data=x", "data=8;rows=2"])
def test_what_is_no_mesh(mesh):
    with pytest.raises(SpQRError, match="expected a mesh such as data=8"):
        scale.mesh_devices(mesh)


def test_a_run_with_activations_on_disk_writes_the_same_weights(folder, monkeypatch):
    """It says what it does to keep to the limit, and leaves no file of activations."""
    arguments = ["quantize", "model", "--bits", 3, "--calib", "ids.npy", *QUICK]
    assert spqr(*arguments, "--out", "full", cwd=folder).returncode == 0
    monkeypatch.setattr(scale, "ways_to_save", lambda *run: [Thrift(spill=True)])
    little = spqr(*arguments, "--out", "little", "--json", "little.json", "--max-memory", "20GiB", cwd=folder)
    assert little.returncode == 0, little.stderr
    assert "to keep to 20GiB of memory: activations on disk" in little.stderr
    memory = json.loads((folder / "little.json").read_text())["memory"]
    assert memory["activations_on_disk"]
    full, spilled = (load_model(str(folder / name))[0] for name in ("full", "little"))
    assert jax.tree.structure(full) == jax.tree.structure(spilled)
    for one, other in zip(jax.tree.leaves(full), jax.tree.leaves(spilled), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    assert not list(folder.glob(".little.*"))


def test_the_plan_is_an_upper_bound_of_what_a_run_holds(folder):
    """Of the tiny model, nearly all of it is programs and libraries: the plan may be up to 2.5 times the peak."""
    result = spqr_process(
        "quantize",
        "model",
        "--bits",
        3,
        "--calib",
        "ids.npy",
        *QUICK,
        "--out",
        "watched",
        "--json",
        "w.json",
        cwd=folder,
    )
    assert result.returncode == 0, result.stderr
    memory = json.loads((folder / "w.json").read_text())["memory"]
    assert memory["host_peak_bytes"] < memory["host_bytes"] < 2.5 * memory["host_peak_bytes"]
    assert "peak memory" in result.stdout.replace("\n", " ")
    assert "memory: " in result.stderr
