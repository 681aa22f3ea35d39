"""Kernels compile to machine code for every target, and stay within what they took when last looked at."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aot.cases import BUDGETS, CASES, budget, compiled_all
from aot.targets import GPUS

GOLDEN = json.loads(BUDGETS.read_text())["cases"]
ONE_LAUNCH = "mosaic_gpu --out 11008 --inner 4096"
ASKED = {  # what the kernels were built for, whatever the golden numbers are: a case's start, the measure, the bound
    (f"h100 {ONE_LAUNCH} --batch 1", "instructions_per_weight"): 1.9,
    (f"a100 {ONE_LAUNCH} --batch 1", "instructions_per_weight"): 1.9,
    (f"h100 {ONE_LAUNCH} --batch 8", "instructions_per_weight"): 2.5,
    (f"h100 {ONE_LAUNCH} --batch 16", "instructions_per_weight"): 3.3,
    ("h100 triton", "instructions_per_weight"): 4.0,
    ("a100 triton", "instructions_per_weight"): 4.9,
    ("v5e tpu --batch 8", "weights_per_bundle"): 550,
    ("v5e tpu --batch 16", "weights_per_bundle"): 550,
}


@pytest.fixture(scope="session")
def results():
    return compiled_all(CASES)


def worsened(name: str, got: dict, golden: dict) -> list[str]:
    """What is worse than the golden numbers, and by how much."""
    found = []
    for key, old in golden.items():
        new = got[key]
        if key == "wide_loads":
            found += [f"{name}: {old[op]} {op} became {new.get(op, 0)}" for op in old if new.get(op, 0) < old[op]]
        elif (new < old) if key == "weights_per_bundle" else (new > old):
            found.append(f"{name}: {key} {old} became {new} ({new / old - 1:+.1%})")
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_within_budget(results, case):
    result = results[case.name]
    if isinstance(result, Exception):
        pytest.fail(str(result))
    assert not worsened(case.name, budget(result), GOLDEN[case.name])
    assert result.get("spills", 0) == 0
    if case.kernel == "xla":
        assert result["temporary_bytes"] < 2 * result["dense_bytes"], "more than one dense copy of the matrix is made"
    elif case.kernel != "tpu":
        assert result["wide_loads"], "codes are not loaded 128 bits at a time"
        assert result["shared_bytes"] <= GPUS[case.target].shared_block
    if case.kernel == "mosaic_gpu":
        assert result["temporary_bytes"] == 0, "something of W or x is copied"


@pytest.mark.parametrize(("name", "measure"), ASKED, ids=str)
def test_asked_for(results, name, measure):
    bound = ASKED[name, measure]
    for case in CASES:
        if case.name.startswith(name) and "--bits" not in case.name:
            value = results[case.name][measure]
            assert value >= bound if measure == "weights_per_bundle" else value <= bound, (case.name, value)
            break
    else:
        pytest.fail(f"no case {name}")


def test_a_worse_number_is_told():
    got = {"registers": 80, "weights_per_bundle": 500.0, "wide_loads": {"LDS.128": 1}}
    golden = {"registers": 72, "weights_per_bundle": 550.0, "wide_loads": {"LDS.128": 2}}
    assert worsened("k", got, golden) == [
        "k: registers 72 became 80 (+11.1%)",
        "k: weights_per_bundle 550.0 became 500.0 (-9.1%)",
        "k: 2 LDS.128 became 1",
    ]
    assert not worsened("k", golden, golden)
    assert not worsened("k", {**golden, "registers": 60}, golden)


def test_every_case_has_a_budget():
    assert set(GOLDEN) == {case.name for case in CASES}
    assert Path(BUDGETS).stat().st_size < 100_000
