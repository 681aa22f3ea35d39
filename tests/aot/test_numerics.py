"""The compiled PTX, executed: it computes the product, and if it is damaged it does not."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from executed import measured, run
from product import FORMS
from support.ptx import emulator

from aot.cases import BUDGETS, Case, compiled, form_programs
from pallas_kernels.spqr_matmul import rows, triton
from spqr_jax.packing import pack_codes

EMULATED = json.loads(BUDGETS.read_text())["emulated"]


@pytest.fixture(scope="session")
def programs():
    """The PTX of each form of the tensor-core kernel."""
    return form_programs()


@pytest.mark.parametrize("name", FORMS)
def test_the_compiled_program_computes_the_product(programs, name):
    error, costs = run(FORMS[name], programs[name])
    assert error < FORMS[name].error
    assert not worsened(measured(costs), EMULATED[name])


def worsened(got: dict[str, list[int]], golden: dict[str, list[int]]) -> list[str]:
    """Which phases take more instructions, or wavefronts of shared memory, than when last looked at."""
    found = [f"{len(got[key])} phases, not {len(old)}" for key, old in golden.items() if len(got[key]) != len(old)]
    for key in ("instructions", "wavefronts"):
        pairs = enumerate(zip(golden[key], got[key], strict=False))
        found += [f"{key} of phase {phase}: {old} became {new}" for phase, (old, new) in pairs if new > old]
    return found


def test_a_worse_phase_is_told():
    golden = {"instructions": [10, 20], "wavefronts": [0, 4], "least_wavefronts": [0, 4]}
    got = {"instructions": [9, 21], "wavefronts": [0, 5], "least_wavefronts": [0, 4]}
    assert worsened(got, golden) == ["instructions of phase 1: 20 became 21", "wavefronts of phase 1: 4 became 5"]
    assert not worsened(golden, golden)


def test_every_form_has_a_budget():
    assert set(EMULATED) == set(FORMS)


# ---- damage ----


def changed(ptx: str, old: str, new: str, which: float = 0.5) -> str:
    """The PTX with the text of one line replaced, of those that have it; it must be there."""
    lines = ptx.splitlines()
    at = [i for i, line in enumerate(lines) if old in line]
    assert at, f"no {old!r} in the PTX"
    place = at[int(which * len(at))]
    lines[place] = lines[place].replace(old, new)
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("16 rows", "458759", "458755"),  # the mask of a field: one bit less in the low half
        ("16 rows", "mma.sync", "// mma.sync"),
        ("16 rows", "fma.rn.f32", "sub.f32"),
        ("one row", "mma.sync", "// mma.sync"),
        ("one row", "shfl.sync.bfly.b32", "shfl.sync.idx.b32"),
        ("8 rows, clusters", "mapa.u64", "mov.u64"),
    ],
)
def test_a_damaged_program_does_not(programs, name, old, new):
    try:
        error, _ = run(FORMS[name], changed(programs[name], old, new))
    except emulator.PtxError:
        return
    assert not error < FORMS[name].error


@pytest.mark.parametrize(
    ("name", "spare"), [("one row", 2), ("16 rows", 2), ("20 rows, chunks", 3), ("8 rows, clusters", 2)]
)
def test_barriers_are_needed(programs, name, spare):
    """Without one, a race is seen, or warps are out of step.

    Spare are Pallas's own two at the start, and the one before the first chunk, which nothing read before.
    """
    ptx = programs[name]
    barriers = [i for i, line in enumerate(ptx.splitlines()) if "bar.sync" in line]
    silent = []
    for i in barriers:
        lines = ptx.splitlines()
        lines[i] = lines[i].replace("bar.sync", "// bar.sync")
        try:
            run(FORMS[name], "\n".join(lines))
            silent.append(i)
        except emulator.PtxError:
            pass
    assert len(silent) <= spare < len(barriers)


@pytest.mark.parametrize("array", ["words", "entries", "starts", "x"])
def test_a_read_past_a_buffer_is_seen(programs, array):
    with pytest.raises(emulator.PtxError, match="outside every buffer"):
        run(FORMS["16 rows"], programs["16 rows"], shorten=array)


# ---- triton ----

OUT, INNER = 128, 1024


@dataclasses.dataclass(frozen=True)
class Triton:
    """A tiny product with ordinary cores."""

    batch: int = 1
    bits: int = 3
    group_size: int = 16
    splits: int = 1

    @property
    def case(self) -> Case:
        options = {"--batch": self.batch, "--bits": self.bits, "--group-size": self.group_size, "--out": OUT}
        options |= {"--inner": INNER, "--blocks": 1, "--splits": self.splits}
        return Case("a100", "triton", tuple(str(word) for pair in options.items() for word in pair))


TRITON = {
    "one row": Triton(),
    "two rows, three splits": Triton(batch=2, splits=3),
    "2 bits": Triton(bits=2),
    "4 bits, groups of 32": Triton(bits=4, group_size=32),
}
TRITON_ERROR = 1e-4


def triton_program(form: Triton, folder) -> str:
    compiled(form.case, "--keep", str(folder / "kernel.ptx"))
    return (folder / "kernel.ptx").read_text()


def run_triton(form: Triton, ptx: str) -> float:
    """Relative error of what the PTX computes."""
    rng = np.random.default_rng(0)
    groups = INNER // form.group_size
    codes = rng.integers(0, 1 << form.bits, (OUT, INNER)).astype(np.uint8)
    scales, zeros = (rng.integers(0, 8, (OUT, groups)).astype(np.uint8) for _ in range(2))
    tiles = rng.uniform((0.001, -2, 0.3, -2), (0.002, -0.5, 0.5, -1), (OUT // 16, groups, 4)).astype(np.float16)
    spread = np.repeat(tiles.astype(np.float64), 16, axis=0)
    scale, zero = spread[..., 0] * (scales - spread[..., 1]), spread[..., 2] * (zeros - spread[..., 3])
    scale, zero = (np.repeat(v, form.group_size, axis=1) for v in (scale, zero))
    x = rng.standard_normal((form.batch, INNER)).astype(np.float32)
    parts = {"codes": pack_codes(codes, form.bits), "scales": scales, "zeros": zeros, "tiles": tiles}
    static = {"bits": form.bits, "group_size": form.group_size}
    packed = rows.pack(**{name: jnp.asarray(part) for name, part in parts.items()}, **static)
    out = np.zeros((form.splits, form.batch, OUT), np.float32)
    given = [*packed, x, triton.sums(jnp.asarray(x), form.bits, form.group_size), out]
    program = emulator.parse(ptx)
    grid = (OUT // rows.BLOCK, form.splits, 1)
    results, _ = emulator.launch(program, [np.asarray(a) for a in given], grid=grid, threads=32)
    want = x.astype(np.float64) @ (scale * (codes - zero)).T
    return float(np.linalg.norm(results[-1].astype(np.float64).sum(axis=0) - want) / np.linalg.norm(want))


@pytest.mark.parametrize("name", TRITON)
def test_triton(tmp_path, name):
    ptx = triton_program(TRITON[name], tmp_path)
    assert run_triton(TRITON[name], ptx) < TRITON_ERROR
    if name == "one row":
        for old, new in (("lop3.b32 ", "// lop3.b32 "), ("fma.rn.f32", "sub.rn.f32")):
            try:
                error = run_triton(TRITON[name], changed(ptx, old, new))
            except emulator.PtxError:
                continue
            assert not error < TRITON_ERROR


def test_jax_here_is_the_pinned_one():
    """Else the budgets beside this say nothing."""
    from pathlib import Path

    wanted = (Path(__file__).parent / "requirements.txt").read_text()
    assert f"jax=={jax.__version__}" in wanted
