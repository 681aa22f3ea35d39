"""The benchmarks for GPUs and TPUs, as far as they go without one."""

from __future__ import annotations

import importlib
import json
import sys
import time

import jax
import pytest
from support import ROOT

BENCHMARKS = ROOT / "benchmarks"

# The shape of what XLA writes for: while steps remain { 32 layers in a loop { a kernel, a copy } ; head }
HLO = """HloModule jit_f, is_scheduled=true

%fused_add (p.1: s32[]) -> s32[] {
  %p.1 = s32[] parameter(0)
  ROOT %add.9 = s32[] add(%p.1, %p.1)
}

%layer (arg: (s32[], bf16[1,64])) -> (s32[], bf16[1,64]) {
  %arg = (s32[], bf16[1,64]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %x = bf16[1,64]{1,0} get-tuple-element(%arg), index=1
  %start = ((s32[4]{0}), s32[4]{0}, u32[]) copy-start(%x)
  %copy = s32[4]{0} copy-done(%start)
  %y = bf16[1,64]{1,0} custom-call(%x, %copy), custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(f)/product"}
  %next = s32[] fusion(%i), kind=kLoop, calls=%fused_add
  ROOT %t = (s32[], bf16[1,64]{1,0}) tuple(%next, %y)
}

%layer_condition (arg: (s32[], bf16[1,64])) -> pred[] {
  %arg = (s32[], bf16[1,64]{1,0}) parameter(0)
  ROOT %less = pred[] fusion(%arg), kind=kLoop, calls=%fused_add
}

%step (arg: (s32[], bf16[1,64])) -> (s32[], bf16[1,64]) {
  %arg = (s32[], bf16[1,64]{1,0}) parameter(0)
  %all = (s32[], /*index=1*/bf16[1,64]{1,0}) while(%arg), condition=%layer_condition, body=%layer, \
backend_config={"known_trip_count":{"n":"32"},"known_init_step":{"init":"0","step":"1"}}
  ROOT %head = (s32[], bf16[1,64]{1,0}) fusion(%all), kind=kLoop, calls=%fused_add
}

%step_condition (arg: (s32[], bf16[1,64])) -> pred[] {
  %arg = (s32[], bf16[1,64]{1,0}) parameter(0)
  ROOT %more = pred[] fusion(%arg), kind=kLoop, calls=%fused_add
}

ENTRY %main (x: bf16[1,64]) -> (s32[], bf16[1,64]) {
  %x = bf16[1,64]{1,0:T(8,128)} parameter(0)
  %zero = s32[] constant(0)
  %kept = bf16[1,64]{1,0} copy(%x)
  %begin = (s32[], bf16[1,64]{1,0}) tuple(%zero, %kept)
  ROOT %end = (s32[], bf16[1,64]{1,0}) while(%begin), condition=%step_condition, body=%step
}
""".replace("\\\n", "")


@pytest.fixture(autouse=True)
def _scripts_can_be_imported(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_launches_are_counted_loop_by_loop():
    launches = importlib.import_module("launches")
    program = launches.program(HLO)
    assert launches.kinds(program.entry) == {"copy": 1}
    steps, layers = program.all_loops()
    assert (steps.name, steps.trips) == ("step", None)
    assert launches.kinds(steps.body) == {"fusion": 2}, "the head and the condition, but not the layers"
    assert program.loop_of(32) == layers
    assert launches.kinds(layers.body) == {"copy-start": 1, "mosaic_gpu_v2": 1, "fusion": 1}, "and no condition"
    [kernel] = [launch for launch in layers.body if launch.is_kernel]
    assert (kernel.shape, kernel.meaning) == ("bf16[1,64]", "jit(f)/product")
    assert program.loop_of(31) is None
    with pytest.raises(ValueError, match="no ENTRY"):
        launches.program("HloModule empty")


def test_shapes_of_a_model_are_those_of_a_model():
    generate_program = importlib.import_module("generate_program")
    config = generate_program.shape("small", 2, 64)
    for form in ("3 bits", "mixed"):
        shapes = generate_program.abstract_model(config, form)
        model = generate_program.random_model(config, form, "xla")
        leaves, tree = jax.tree.flatten_with_path(shapes)
        assert tree == jax.tree.structure(model)
        for (path, shape), array in zip(leaves, jax.tree.leaves(model), strict=True):
            if ".entries" not in jax.tree_util.keystr(path):  # a random matrix has about as many outliers
                assert (shape.shape, shape.dtype) == (array.shape, array.dtype), jax.tree_util.keystr(path)


def test_a_loop_multiplies_by_each_matrix_in_turn():
    """Times are not looked at; the loop must compute what it says."""
    device_loop = importlib.import_module("device_loop")
    accelerator = importlib.import_module("accelerator")
    order: list[int] = []

    def multiply(x, matrices, index):
        jax.debug.callback(lambda i: order.append(int(i)), index, ordered=True)
        return x + matrices[index].astype(x.dtype)

    rival = device_loop.Rival("sum", multiply, jax.numpy.zeros(4), 4, 4)
    loop = device_loop.Looped(rival, accelerator.activations(1, 8), 3)
    loop.compile()
    loop.run()
    jax.effects_barrier()
    assert order == [0, 1, 2, 3] * 3
    assert loop.products == 12


def test_the_check_runs_on_a_cpu_and_reports_what_fails(tmp_path, monkeypatch, capsys):
    check = importlib.import_module("accelerator_check")
    monkeypatch.setitem(check.PARTS, "solver", ("no_such_part", 1, {}))
    out, table = tmp_path / "report.jsonl", tmp_path / "accelerator.csv"
    command = ["accelerator_check.py", "--dry-run", "--parts", "solver", "card", "products", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [*command, "--csv", str(table)])
    assert check.main() == 1
    assert "parts that failed: solver" in capsys.readouterr().out
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["part"] for line in lines if "failed" in line] == ["solver"]
    assert {line["rival"] for line in lines if "rival" in line} == {"xla", "dense bfloat16"}
    assert len(table.read_text().splitlines()) == 3


def test_a_part_that_hangs_is_stopped():
    check = importlib.import_module("accelerator_check")
    begun = time.monotonic()
    assert check.run([sys.executable, "-c", "import time; time.sleep(60)"], {}, 1) == "stopped after 1 s"
    assert time.monotonic() - begun < 30
    assert check.run([sys.executable, "-c", "raise SystemExit(3)"], {}, 30) == "exit status 3"
    assert check.run([sys.executable, "-c", ""], {}, 30) == ""


def test_a_prediction_takes_the_longest_term():
    gpu_model = importlib.import_module("gpu_model")
    work = gpu_model.Work(bytes=3.1e6, launches=2)  # a microsecond of an H100's memory
    assert gpu_model.predict("h100", work).total == pytest.approx(2 * 2.2e-6 + 0.7e-6 + 1e-6 + 0.4e-6)
    busy = gpu_model.Work(bytes=3.1e6, launches=2, multiprocessor=10e-6)
    assert gpu_model.predict("h100", busy).total == pytest.approx(2 * 2.2e-6 + 10e-6 + 0.4e-6)
    assert 4.0 < gpu_model.bits_a_weight() < 4.2


def test_predictions_stand_beside_measurements():
    gpu_model = importlib.import_module("gpu_model")
    rows = {(row[0], row[1]): row for row in gpu_model.products_of_h100()}
    assert rows["4096 × 4096", "1"][gpu_model.PRODUCTS_HEADER.index("spqr_quant: measured")] == "15.0"
    for header, table in (
        (gpu_model.HEADER, gpu_model.rows_of_table()),
        (gpu_model.PRODUCTS_HEADER, gpu_model.products_of_h100()),
        (gpu_model.CHECK_HEADER, gpu_model.check()),
    ):
        assert {len(row) for row in table} == {len(header)}
    ratios = [float(row[-1]) for row in gpu_model.check()]
    assert len(ratios) >= 9
    assert all(1 <= ratio < 2 for ratio in ratios), "the model is optimistic, by less than two"


@pytest.mark.slow
def test_every_part_of_the_check_runs_on_a_cpu(tmp_path, monkeypatch):
    check = importlib.import_module("accelerator_check")
    others = [part for part in check.PARTS if part.startswith("steps") and part != "steps_2_layers"]
    parts = [part for part in check.PARTS if part not in ("demo", *others)]  # demo needs a model
    monkeypatch.setattr(
        sys, "argv", ["accelerator_check.py", "--dry-run", "--out", str(tmp_path / "report"), "--parts", *parts]
    )
    assert check.main() == 0
