"""Attention at one position, compiled for GPUs that are not there: numbers, the cache in place, registers."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from support.attention import Form, arrays_of, bits, error, expected
from support.ptx import emulator

from pallas_kernels.attention import Plan, choose_plan
from pallas_kernels.attention.xla import combine

HERE = Path(__file__).resolve().parent
CORES = {"a100": 108, "h100": 132}


@dataclasses.dataclass(frozen=True)
class Case:
    """A form, a GPU, and the plan where it is not the one chosen."""

    form: Form
    target: str = "h100"
    plan: Plan | None = None

    @property
    def cut(self) -> Plan:
        form = self.form
        itemsize = jnp.dtype(form.cache_dtype).itemsize
        sizes = (form.batch, form.heads, form.kv_heads, form.head_dim, form.length, itemsize)
        return self.plan or choose_plan(*sizes, CORES[self.target], self.target == "h100")

    @property
    def options(self) -> list[str]:
        form = self.form
        options = {"--rotated": form.turned, "--length": form.length, "--dtype": form.dtype, "--batch": form.batch}
        options |= {"--cache-dtype": form.cache_dtype, "--heads": form.heads, "--kv-heads": form.kv_heads}
        options |= {
            "--head-dim": form.head_dim,
            "--scale": form.scale,
            "--plan": json.dumps(dataclasses.asdict(self.cut)),
        }
        if form.softcap is not None:
            options["--softcap"] = form.softcap
        return [self.target, *(str(word) for pair in options.items() for word in pair)]


CASES = {
    "one KV head for two, two splits": Case(Form()),
    "a100, three splits, one of them without keys, two texts": Case(
        Form(batch=2, kv_heads=2, head_dim=128, length=192, start=90, first=(100, 88)),
        "a100",
        Plan(3, 1, 1, 8, 8, 2, 2),
    ),
    "softcap, four heads share": Case(
        Form(batch=2, heads=4, head_dim=128, start=90, first=(5, 60), softcap=3.0, scale=0.4)
    ),
    "80 dimensions, 32 rotated": Case(Form(kv_heads=2, head_dim=80, start=127, rotated=32, scale=0.1)),
    "float16, idle lanes, no rotary embedding": Case(
        Form(heads=8, head_dim=96, start=64, rotated=0, dtype="float16", cache_dtype="float16")
    ),
    "float32, 256 dimensions": Case(Form(head_dim=256, start=50, dtype="float32", cache_dtype="float32")),
    "one split, parts of uneven size, other dtypes": Case(
        Form(heads=7, start=100, first=(-3,), dtype="float32"), plan=Plan(1, 2, 4, 4, 4, 2, 2)
    ),
    "clusters of two, three sums, the last without keys": Case(
        Form(batch=2, heads=6, head_dim=96, length=192, start=40, first=(38, 30)), plan=Plan(6, 2, 3, 4, 16, 1, 2, 2)
    ),
    "a cluster of four writes the output": Case(Form(heads=3, dtype="float32"), plan=Plan(4, 1, 3, 4, 8, 1, 2, 4)),
    "an empty cache": Case(Form(heads=16, start=0, cache_dtype="float16")),
}
LIMIT = 3e-6
"""Relative error of float32 arithmetic, with exact approximations of exp2."""


def compiled(lists: list[list[str]]) -> list[dict]:
    """Runs compile_attention.py: a process for each target, as most of the time is its start."""
    results: dict[int, dict] = {}
    for target in dict.fromkeys(words[0] for words in lists):
        places = [i for i, words in enumerate(lists) if words[0] == target]
        command = [sys.executable, str(HERE / "compile_attention.py"), "-"]
        given = json.dumps([lists[i] for i in places])
        done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=900)
        if done.returncode:
            pytest.fail(f"{target}: exit {done.returncode}\n{done.stderr[-1500:]}")
        results |= zip(places, json.loads(done.stdout.strip().splitlines()[-1]), strict=True)
    return [results[i] for i in range(len(lists))]


@pytest.fixture(scope="session")
def programs(tmp_path_factory) -> dict[str, str]:
    """The PTX of each case."""
    folder = tmp_path_factory.mktemp("ptx")
    paths = [folder / f"{i}.ptx" for i in range(len(CASES))]
    results = compiled([[*case.options, "--keep", str(path)] for case, path in zip(CASES.values(), paths, strict=True)])
    assert all(result["spills"] == 0 for result in results)
    return {name: path.read_text() for name, path in zip(CASES, paths, strict=True)}


def run(case: Case, ptx: str) -> tuple[float, bool]:
    """Relative error of the output, and whether the cache has the bits that it should have."""
    form, plan, given = case.form, case.cut, arrays_of(case.form)
    tables = [given.cos, given.sin] if form.turned else []
    scalars = [given.layer.reshape(1), given.start.reshape(1), given.first]
    parameters = [*scalars, bits(given.qkv), *tables, bits(given.keys), bits(given.values)]
    outputs = len(parameters)
    by_sum = (form.batch, form.heads, plan.sums)
    if plan.sums == 1:
        parameters.append(np.zeros((form.batch, form.heads * form.head_dim), bits(given.qkv).dtype))
    else:
        parameters += [np.full(shape, np.nan, np.float32) for shape in ((*by_sum, form.head_dim), by_sum, by_sum)]
    blocks = form.batch * form.kv_heads * plan.parts * plan.splits
    results, _ = emulator.launch(
        emulator.parse(ptx), parameters, grid=blocks, threads=plan.threads, cluster=plan.cluster
    )
    out = results[outputs].view(given.qkv.dtype) if plan.sums == 1 else combine(*map(jnp.asarray, results[outputs:]))
    wanted, keys, values = expected(form, given)
    cache = [np.array_equal(a, bits(b)) for a, b in zip(results[outputs - 2 : outputs], (keys, values), strict=True)]
    return error(out, wanted), all(cache)


@pytest.mark.parametrize("name", CASES)
def test_the_compiled_program_attends_and_updates_the_cache(programs, name):
    difference, cache_is_right = run(CASES[name], programs[name])
    assert difference < LIMIT
    assert cache_is_right


@pytest.mark.parametrize(
    ("old", "new", "which"),  # of the places where it stands; None for all
    [
        ("ex2.approx.ftz.f32", "mov.b32", 0),
        ("shfl.sync.bfly.b32", "// shfl.sync.bfly.b32", 2),
        ("mul.rn.f32", "add.rn.f32", 0),
        ("setp.lt.s32", "setp.le.s32", None),
        ("bar.sync", "// bar.sync", -1),
        ("st.global.b16", "// st.global.b16", 0),
        ("max.f32", "min.f32", 0),
    ],
)
def test_a_damaged_program_is_seen(programs, old, new, which):
    """Without a barrier there is a race, which the emulator tells; the others are wrong numbers."""
    name = "one KV head for two, two splits"
    lines = programs[name].splitlines()
    places = [i for i, line in enumerate(lines) if old in line]
    for place in places if which is None else [places[which]]:
        lines[place] = lines[place].replace(old, new)
    try:
        difference, cache_is_right = run(CASES[name], "\n".join(lines))
    except emulator.PtxError:
        return
    assert not (difference < LIMIT and cache_is_right)


SHAPES = {
    "Llama 7B": (["h100"], 128),
    "Llama 3 8B": (["h100", "--kv-heads", "8"], 236),
    "Llama 3 8B, 16 texts": (["h100", "--kv-heads", "8", "--batch", "16"], 236),
    "Llama 3 70B": (["h100", "--kv-heads", "8", "--heads", "64"], 255),
    "Llama 7B on a100": (["a100"], 128),
    "Gemma 2 2B on rtx4090": (
        ["rtx4090", "--heads", "8", "--kv-heads", "4", "--head-dim", "256", "--softcap", "50"],
        255,
    ),
    "Phi 3 mini on b200": (["b200", "--head-dim", "96"], 128),
}
"""Options of compile_attention.py, and the registers that a thread may need."""


@pytest.fixture(scope="session")
def loops() -> dict[str, dict]:
    """Four layers in a loop, of each shape; and by XLA's formula."""
    lists = [[*options, "--layers", "4"] for options, _ in SHAPES.values()]
    results = compiled([*lists, ["h100", "--layers", "2", "--implementation", "xla"]])
    return dict(zip([*SHAPES, "xla"], results, strict=True))


@pytest.mark.parametrize("name", SHAPES)
def test_in_a_loop_over_layers_the_cache_is_not_copied(loops, name):
    result = loops[name]
    assert result["cache_copies"] == []
    assert result["temporary_bytes"] < result["cache_bytes"] / 4 / 4, "a fourth of one layer's keys"
    assert result["aliased_bytes"] >= 2 * result["cache_bytes"]
    assert result["calls"] == 1


@pytest.mark.parametrize("name", SHAPES)
def test_registers_and_loads(loops, name):
    result = loops[name]
    assert result["spills"] == 0
    assert result["registers"] <= SHAPES[name][1]
    assert result["wide_loads"] >= 8, "16-byte loads of keys and values in a turn"


def test_a_copy_of_the_cache_would_be_seen(loops):
    """XLA's formula has one: products of one row as a multiplication, whose result is as large as a layer's cache."""
    assert loops["xla"]["cache_copies"]
