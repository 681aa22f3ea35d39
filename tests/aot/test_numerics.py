"""The compiled PTX, executed: it computes the product, and if it is damaged it does not."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.ptx import emulator

from aot.cases import Case, compiled
from pallas_kernels.spqr_matmul import fragments, rows, triton
from spqr_jax.packing import pack_codes

OUT, INNER = 128, 1024


@dataclasses.dataclass(frozen=True)
class Form:
    """A tiny product; `cut` is row blocks (or blocks) and splits."""

    kernel: str
    batch: int = 1
    bits: int = 3
    group_size: int = 16
    cut: tuple[int, int] = (1, 1)

    @property
    def case(self) -> Case:
        blocks = "--row-blocks" if self.kernel == "mosaic_gpu" else "--blocks"
        options = {"--batch": self.batch, "--bits": self.bits, "--group-size": self.group_size, "--out": OUT}
        options |= {"--inner": INNER, blocks: self.cut[0], "--splits": self.cut[1], "--stages": 2}
        # compute capability 8.0: TMA, which later GPUs copy with, is not emulated
        return Case("a100", self.kernel, tuple(str(word) for pair in options.items() for word in pair))


FORMS = {
    "mosaic": Form("mosaic_gpu", batch=8),
    "mosaic, one row, two splits": Form("mosaic_gpu", cut=(1, 2)),
    "mosaic, 16 rows, two blocks": Form("mosaic_gpu", batch=16, cut=(2, 1)),
    "mosaic, 2 bits": Form("mosaic_gpu", batch=3, bits=2),
    "mosaic, 4 bits, groups of 32": Form("mosaic_gpu", batch=2, bits=4, group_size=32),
    "triton": Form("triton"),
    "triton, two rows, three splits": Form("triton", batch=2, cut=(1, 3)),
    "triton, 2 bits": Form("triton", bits=2),
    "triton, 4 bits, groups of 32": Form("triton", bits=4, group_size=32),
}
ERROR = {"mosaic_gpu": 1e-3, "triton": 1e-4}


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
    """The PTX of each form."""
    folder = tmp_path_factory.mktemp("ptx")
    paths = {name: folder / f"{i}.ptx" for i, name in enumerate(FORMS)}
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        done = {name: pool.submit(compiled, form.case, "--keep", str(paths[name])) for name, form in FORMS.items()}
    for future in done.values():
        future.result()
    return {name: path.read_text() for name, path in paths.items()}


def problem(form: Form):
    """Parts of a matrix in the canonical form, the dense matrix in float64, and activations."""
    rng = np.random.default_rng(0)
    groups = INNER // form.group_size
    codes = rng.integers(0, 1 << form.bits, (OUT, INNER)).astype(np.uint8)
    scales, zeros = (rng.integers(0, 8, (OUT, groups)).astype(np.uint8) for _ in range(2))
    tiles = rng.uniform((0.001, -2, 0.3, -2), (0.002, -0.5, 0.5, -1), (OUT // 16, groups, 4)).astype(np.float16)
    each = np.repeat(tiles.astype(np.float64), 16, axis=0)
    scale, zero = each[..., 0] * (scales - each[..., 1]), each[..., 2] * (zeros - each[..., 3])
    spread = [np.repeat(v, form.group_size, axis=1) for v in (scale, zero)]
    parts = {"codes": pack_codes(codes, form.bits), "scales": scales, "zeros": zeros, "tiles": tiles}
    x = rng.standard_normal((form.batch, INNER)).astype(np.float16)
    x /= np.abs(x).max(axis=1, keepdims=True)
    return {k: jnp.asarray(v) for k, v in parts.items()}, spread[0] * (codes - spread[1]), x


def run(form: Form, ptx: str) -> float:
    """Relative error of what the PTX computes."""
    parts, dense, x = problem(form)
    static = {"bits": form.bits, "group_size": form.group_size}
    program = emulator.parse(ptx)
    blocks, splits = form.cut
    if form.kernel == "mosaic_gpu":
        from pallas_kernels.spqr_matmul import mosaic_gpu  # needs a newer JAX than the oldest supported

        codes, statistics = fragments.pack(**parts, **static)
        words = mosaic_gpu.fragment_x(jnp.asarray(x), form.group_size, splits * -(-codes.shape[1] // splits))
        tiles = -(-form.batch // 8)
        columns = min(1 << (form.batch - 1).bit_length(), 8)
        out = np.zeros((splits, tiles, OUT, columns), np.float32)
        given = [words, codes, statistics, out]
        grid, threads = (splits, OUT // fragments.ROWS // blocks, 1), 128
    else:
        packed = rows.pack(**parts, **static)
        values = jnp.asarray(x, jnp.float32)
        out = np.zeros((splits, form.batch, OUT), np.float32)
        given = [*packed, values, triton.sums(values, form.bits, form.group_size), out]
        grid, threads = (OUT // rows.BLOCK // blocks, splits, 1), 32
    results, _ = emulator.launch(program, [np.asarray(a) for a in given], grid=grid, threads=threads)
    total = results[len(given) - 1].astype(np.float64).sum(axis=0)
    if form.kernel == "mosaic_gpu":
        total = total.transpose(0, 2, 1).reshape(-1, OUT)[: form.batch]
    want = x.astype(np.float64) @ dense.T
    return float(np.linalg.norm(total - want) / np.linalg.norm(want))


@pytest.mark.parametrize("name", FORMS)
def test_the_compiled_program_computes_the_product(programs, name):
    form = FORMS[name]
    assert run(form, programs[name]) < ERROR[form.kernel]


def changed(ptx: str, old: str, new: str, which: int = 0) -> str:
    """The PTX with one line's text replaced; it must be there."""
    lines = ptx.splitlines()
    at = [i for i, line in enumerate(lines) if old in line]
    assert len(at) > which, f"no {old!r} in the PTX"
    lines[at[which]] = lines[at[which]].replace(old, new)
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("mosaic", ", 458759, ", ", 458755, "),  # the mask of a field: one bit less in the low half
        ("mosaic", "add.rn.f16x2", "sub.rn.f16x2"),
        ("mosaic", "mma.sync", "// mma.sync"),
        ("triton", "lop3.b32 ", "// lop3.b32 "),
        ("triton", "fma.rn.f32", "sub.rn.f32"),
    ],
)
def test_a_damaged_program_does_not(programs, name, old, new):
    form = FORMS[name]
    try:
        error = run(form, changed(programs[name], old, new))
    except (emulator.PtxError, ValueError, TypeError, KeyError):
        return
    assert not error < ERROR[form.kernel]


def test_a_copy_that_is_not_awaited_is_seen(programs):
    ptx = programs["mosaic"].replace("cp.async.wait_group", "// cp.async.wait_group")
    assert not run(FORMS["mosaic"], ptx) < ERROR["mosaic_gpu"]


def test_a_read_past_a_buffer_is_seen(programs):
    """The second block of rows reads codes that are not there."""
    from pallas_kernels.spqr_matmul import mosaic_gpu

    form = FORMS["mosaic"]
    parts, _, x = problem(form)
    codes, statistics = fragments.pack(**parts, bits=3, group_size=16)
    words = mosaic_gpu.fragment_x(jnp.asarray(x), 16, codes.shape[1])
    given = [words, codes[:1], statistics, np.zeros((1, 1, OUT, 8), np.float32)]
    with pytest.raises(emulator.PtxError, match="outside every buffer"):
        emulator.launch(emulator.parse(programs["mosaic"]), [np.asarray(a) for a in given], grid=(1, 2, 1), threads=128)


def test_jax_here_is_the_pinned_one():
    """Else the budgets beside this say nothing."""
    from pathlib import Path

    wanted = (Path(__file__).parent / "requirements.txt").read_text()
    assert f"jax=={jax.__version__}" in wanted
