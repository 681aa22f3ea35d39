"""Plans in files: the same choices again, choices for other targets, and files that are no plan for a run."""

from __future__ import annotations

import dataclasses
import json

import pytest
from support.command import QUICK, spqr
from support.model_files import write_model_and_ids
from support.stops import Stop, StopAfter

from spqr_jax import CheckpointError, LayerRule, SpQRConfig, SpQRError, quantize
from spqr_jax.checkpoint import CheckpointSource
from spqr_jax.planning.budget import Plan, plan_budget
from spqr_jax.planning.curves import PRICES
from spqr_jax.planning.plan_file import read_plan, write_plan
from spqr_jax.stream.blocks import TreeSource

CONFIG = SpQRConfig(target_bits=5.0)


@pytest.fixture(scope="module")
def plan(tiny_model, tiny_batches):
    return plan_budget(TreeSource(tiny_model), tiny_batches, CONFIG)


@pytest.fixture
def file(plan, tmp_path):
    write_plan(tmp_path / "plan.json", plan, CONFIG)
    return tmp_path / "plan.json"


def chosen(plan):
    return {path: (choice.bits, choice.outlier_threshold) for path, choice in plan.choices.items()}


def test_a_plan_comes_back_as_it_was_and_serves_other_targets(plan, file, tiny_model, tiny_batches):
    assert chosen(read_plan(file, tiny_model.config, CONFIG)) == chosen(plan)
    other = dataclasses.replace(CONFIG, target_bits=4.6)
    smaller = read_plan(file, tiny_model.config, other)
    assert abs(smaller.stored_bits - 4.6) < 0.05 < abs(plan.stored_bits - smaller.stored_bits)
    assert chosen(smaller) == chosen(plan_budget(TreeSource(tiny_model), tiny_batches, other))
    fewer = dataclasses.replace(CONFIG, bit_choices=(3, 4), rules=(LayerRule(r"^layers\.0\.", skip=True),))
    rest = read_plan(file, tiny_model.config, fewer)
    assert {path.split(".")[1] for path in rest.choices} == {"1"}
    assert {choice.bits for choice in rest.choices.values()} <= {3, 4}


def test_a_loss_that_could_not_be_measured_is_kept(plan, file, tiny_model):
    values = json.loads(file.read_text())
    values["weights"][0]["candidates"][0]["loss"][0] = None
    file.write_text(json.dumps(values))
    again = read_plan(file, tiny_model.config, CONFIG)
    write_plan(file, again, CONFIG)
    assert json.loads(file.read_text()) == values


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"group_size": 32}, "measured with group_size 16, now 32: give the same settings"),
        ({"bit_choices": (3, 5)}, r"knows layers\.0\.q_proj with 2, 3, 4 bits, not with all of 3, 5"),
        ({"target_bits": 15.0}, "out of reach"),
    ],
)
def test_other_settings_are_refused(file, tiny_model, changes, says):
    with pytest.raises(SpQRError, match=says):
        read_plan(file, tiny_model.config, dataclasses.replace(CONFIG, **changes))


def test_another_model_is_refused(file, tiny_model):
    wider = dataclasses.replace(tiny_model.config, intermediate_size=tiny_model.config.intermediate_size + 16)
    with pytest.raises(SpQRError, match=r"no plan for layers\.0\.gate_proj .* but one of shape"):
        read_plan(file, wider, CONFIG)
    deeper = dataclasses.replace(tiny_model.config, num_layers=tiny_model.config.num_layers + 1)
    with pytest.raises(SpQRError, match=r"no plan for layers\.2\.q_proj .* but no such weight"):
        read_plan(file, deeper, CONFIG)


def damaged(entry, value):
    def damage(values):
        place = values
        for name in entry[:-1]:
            place = place[name]
        place[entry[-1]] = value
        return values

    return damage


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (damaged(["format"], "another"), "format is 'another'"),
        (damaged(["prices", 0], 0.5), "those of this version"),
        (damaged(["weights"], {}), "weights is .* expected a list of objects"),
        (damaged(["weights", 0, "path"], 3), "path is 3"),
        (damaged(["weights", 0, "shape"], [3]), "two numbers"),
        (damaged(["weights", 0, "tau_per_price"], -1), "at least 0"),
        (damaged(["weights", 0, "candidates"], []), "an entry for each width"),
        (damaged(["weights", 0, "candidates", 0], 7), "lacks layers.0.q_proj: loss|loss is None"),
        (damaged(["weights", 0, "candidates", 0, "bits"], 99), "bits is 99"),
        (damaged(["weights", 0, "candidates", 0, "loss"], [1.0]), f"{len(PRICES)} numbers"),
        (damaged(["weights", 0, "candidates", 0, "outliers", 0], "x"), "at least 0, or null"),
    ],
)
def test_damaged_files_are_named(file, tiny_model, damage, says):
    file.write_text(json.dumps(damage(json.loads(file.read_text()))))
    with pytest.raises(SpQRError, match=says) as caught:
        read_plan(file, tiny_model.config, CONFIG)
    assert str(file) in str(caught.value)


@pytest.mark.filterwarnings("ignore:what was finished")
def test_a_run_goes_on_only_with_the_plan_that_it_began_with(plan, tiny_model, tiny_batches, tmp_path):
    given = {"plan": plan, "out": tmp_path / "out"}
    with pytest.raises(Stop):
        quantize(tiny_model, tiny_batches, CONFIG, **given, events=StopAfter("quantizing", 1, "^block 0"))
    with pytest.raises(CheckpointError, match="the plan it was given"):
        quantize(tiny_model, tiny_batches, CONFIG, out=tmp_path / "out", resume=True)
    seen = []
    quantize(tiny_model, tiny_batches, CONFIG, **given, resume=True, events=seen.append)
    assert [event.detail for event in seen if isinstance(event.detail, Plan)] == [plan]


def test_the_command_saves_a_plan_and_uses_it(tiny_model, tmp_path):
    folder = write_model_and_ids(tmp_path, tiny_model)
    command = ["quantize", "model", *QUICK, "--head-bits", "none"]
    saved = spqr(*command, "--out", "a", "--target-bits", "5", "--save-plan", "plan.json", cwd=folder)
    assert "plan.json: the plan; use it again with --use-plan" in saved.stderr
    used = spqr(*command, "--out", "b", "--target-bits", "5", "--use-plan", "plan.json", cwd=folder)
    assert "measuring 1 " not in used.stderr
    a, b = (CheckpointSource(folder / name) for name in "ab")
    assert len(a.quantization.rules) == 14
    assert (a.quantization, a.layer_stats) == (b.quantization, b.layer_stats)
    for option in ("--use-plan", "--save-plan"):
        refused = spqr(*command, "--out", "c", "--bits", "3", option, "plan.json", cwd=folder)
        assert refused.returncode == 2
        assert f"{option} works with a target only" in refused.stderr
