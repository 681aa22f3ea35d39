"""The native CPU kernels against the formula, under JAX's transformations, and against damage."""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import ROOT
from support.arrays import dense, random_array, random_quantized
from support.problems import correlated_problem

import cpu_kernels
import spqr_jax
from cpu_kernels import build
from spqr_jax import SpQRConfig, SpQRError, linear, prepare, quantize_weight
from spqr_jax.checkpoint.description import DATA_FIELDS
from spqr_jax.products import linear_all, take_rows
from spqr_jax.products.cpu import CpuBackend, CpuMatrix, pack_for_cpu

needs_library = pytest.mark.skipif(
    not cpu_kernels.kernel_names(), reason="the native CPU kernels are not built (python -m cpu_kernels)"
)
pytestmark = needs_library


FORMATS = {
    "3 bits": {},
    "4 bits": {"bits": 4},
    "2 bits": {"bits": 2},
    "8 bits, 16-bit statistics": {"bits": 8, "stats_bits": None},
    "5 bits": {"bits": 5},
    "groups of 8": {"group_size": 8},
    "groups of 24": {"group_size": 24},
    "groups of 32": {"group_size": 32},
    "groups of 128": {"group_size": 128},
    "one group a row": {"group_size": None, "stats_bits": None},
    "tiles of 32": {"tile": 32},
    "tiles of 8": {"tile": 8},
    "statistics of 2 bits": {"stats_bits": 2},
    "statistics of 6 bits": {"stats_bits": 6},
    "no outliers": {"outliers": 0.0},
    "many outliers": {"outliers": 0.3},
    "identity order": {"permuted": False},
}


def error(got, want) -> float:
    return float(np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want))


def activations(*shape) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def products(packed, x, counts) -> dict[tuple[int, str], jax.Array]:
    """By the first rows of x, for each of these counts of them and for all kernels: in one program."""
    cases = list(itertools.product(counts, cpu_kernels.kernel_names()))

    @jax.jit
    def multiply(packed, x):
        return [cpu_kernels.matmul(x[:rows], packed, kernels=name) for rows, name in cases]

    return dict(zip(cases, multiply(packed, x), strict=True))


@pytest.mark.parametrize("shape", [(48, 96), (37, 200), (1, 8)], ids=str)
@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS.keys())
def test_every_kernel_multiplies_by_the_dense_matrix(form, shape):
    array = random_array(shape, **form)
    packed, w = pack_for_cpu(array), dense(array)
    assert error(cpu_kernels.to_dense(packed), w) < 1e-6
    x = activations(40, shape[1])
    for (rows, kernels), y in products(packed, x, (1, 2, 3, 5, 8, 13, 16, 17, 40)).items():
        assert error(y, x[:rows] @ w.T) < 5e-6, (rows, kernels)


def test_the_formula_in_numpy_is_that_of_the_arrays():
    """Which other tests here compare with, in every format."""
    arrays = [random_array((37, 200), **form) for form in FORMATS.values()]
    by_array = jax.jit(lambda arrays: [array.to_dense() for array in arrays])(arrays)
    for name, array, w in zip(FORMATS, arrays, by_array, strict=True):
        assert error(w, dense(array)) < 1e-6, name


@pytest.mark.parametrize("outliers", [0.01, 0.3])
def test_more_rows_and_columns_than_a_panel_has(outliers):
    """Panels take outliers up where the last one left off; of some rows only, so that lanes are at different places."""
    array = random_array((70, 1400), outliers=outliers)
    packed, w = pack_for_cpu(array), dense(array)
    x = activations(203, 1400)
    for (rows, kernels), y in products(packed, x, (7, 16, 97, 203)).items():
        assert error(y, x[:rows] @ w.T) < 5e-6, (rows, kernels)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_change_a_bit(threads):
    packed = pack_for_cpu(random_array((600, 640)))
    x = activations(33, 640)
    for rows in (1, 12, 33):
        np.testing.assert_array_equal(
            cpu_kernels.matmul(x[:rows], packed, threads=threads), cpu_kernels.matmul(x[:rows], packed)
        )


@pytest.mark.parametrize("form", [{}, {"bits": 4}, {"bits": 8, "stats_bits": None}, {"group_size": 32}], ids=str)
def test_int8_activations_round_as_said(form):
    """The error is that of rounding x to 8 bits by 32 columns, worked out in NumPy."""
    array = random_array((64, 256), **form)
    w = dense(array)
    x = activations(16, 256)
    perm = np.arange(256) if array.perm is None else np.asarray(array.perm)
    blocks = x[:, perm].reshape(16, -1, 32)
    scale = np.abs(blocks).max(axis=-1, keepdims=True) / 127
    by_codes = np.zeros_like(x)
    by_codes[:, perm] = (np.rint(blocks / scale) * scale).reshape(16, -1)
    rows, cols, values = array.to_coo()
    outliers = np.zeros_like(w)
    outliers[rows, cols] = values
    want = by_codes @ (w - outliers).T + x @ outliers.T  # outliers meet x itself
    assert 1e-3 < error(want, x @ w.T) < 2e-2
    packed = pack_for_cpu(array, int8_activations=True)
    for (count, kernels), y in products(packed, x, (1, 2, 16)).items():
        assert error(y, want[:count]) < 1e-4, kernels  # a value at half a step may round either way


def test_shapes_and_types_of_activations():
    array = random_array((40, 64))
    packed, w = CpuBackend().prepare(array), dense(array)
    x = activations(2, 3, 64)
    assert linear(packed, x).shape == (2, 3, 40)
    np.testing.assert_allclose(linear(packed, x[0, 0]), w @ x[0, 0], rtol=1e-4, atol=1e-4)
    half = linear(packed, x.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    assert error(half, x @ w.T) < 1e-2
    assert linear(packed, jnp.zeros((0, 64))).shape == (0, 40)
    with pytest.raises(SpQRError, match="do not fit"):
        linear(packed, jnp.zeros((2, 63)))


def test_rows_are_gathered_and_clipped():
    array = random_array((40, 64))
    packed = CpuBackend().prepare(array)
    index = np.array([[0, 39], [17, 100]], np.int32)
    expected = dense(array)[np.clip(index, 0, 39)]
    np.testing.assert_allclose(take_rows(packed, index), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.vmap(lambda i: take_rows(packed, i))(index), expected, rtol=1e-5, atol=1e-6)


def test_transformations():
    array = random_array((40, 64))
    packed, w = CpuBackend().prepare(array), dense(array)
    x = activations(5, 3, 64)
    want = x @ w.T
    np.testing.assert_allclose(jax.jit(linear)(packed, x), want, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(jax.vmap(lambda x: linear(packed, x))(x), want, rtol=1e-4, atol=1e-4)
    over_middle = jax.vmap(lambda x: linear(packed, x), in_axes=1, out_axes=1)(x)
    np.testing.assert_allclose(over_middle, want, rtol=1e-4, atol=1e-4)
    several = jax.tree.map(lambda *leaves: jnp.stack(leaves), packed, packed, packed, packed, packed)
    np.testing.assert_allclose(jax.vmap(linear)(several, x), want, rtol=1e-4, atol=1e-4)
    one_x = jax.vmap(linear, in_axes=(0, None))(several, x[0])
    np.testing.assert_allclose(one_x, np.broadcast_to(want[0], one_x.shape), rtol=1e-4, atol=1e-4)
    rows = jax.vmap(take_rows, in_axes=(0, None))(several, jnp.array([3], jnp.int32))
    np.testing.assert_allclose(rows, np.broadcast_to(w[3], rows.shape), rtol=1e-5, atol=1e-6)

    def loss(x):
        return jnp.sum(jnp.sin(linear(packed, x)))

    np.testing.assert_allclose(jax.grad(loss)(x), np.cos(want) @ w, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(jax.vmap(jax.grad(loss))(x), np.cos(want) @ w, rtol=1e-3, atol=1e-3)

    mesh = jax.make_mesh((1,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    sharded = jax.shard_map(
        lambda x, w: linear(w, x), mesh=mesh, in_specs=(spec("batch"), spec()), out_specs=spec("batch"), check_vma=False
    )
    np.testing.assert_allclose(sharded(x, packed), want, rtol=1e-4, atol=1e-4)


def test_calls_at_the_same_time_do_not_wait_for_each_other():
    """Many independent products in one program, which XLA may run from its own pool's threads."""
    arrays = [random_array((512, 512), seed=seed) for seed in range(8)]
    packed = [CpuBackend().prepare(array) for array in arrays]
    x = activations(2, 512)
    wants = [x @ dense(array).T for array in arrays]
    together = jax.jit(lambda x: [linear(w, x) for w in packed for _ in range(4)])
    for _ in range(5):
        for index, y in enumerate(together(x)):
            assert error(y, wants[index // 4]) < 5e-6


@pytest.mark.parametrize("rows", [1, 6, 20])
def test_several_matrices_at_once(rows):
    """With the same permutation and format, and with others."""
    forms = ({}, {"bits": 4}, {"bits": 2, "permuted": False}, {"bits": 8, "group_size": 32}, {"seed": 5})
    shapes = [(40, 96), (64, 96), (8, 96), (33, 96), (16, 96)]
    arrays = [random_array(shape, **form) for shape, form in zip(shapes, forms, strict=True)]
    arrays[1] = dataclasses.replace(arrays[1], perm=arrays[0].perm)
    ws = [pack_for_cpu(array) for array in arrays]
    x = activations(rows, 96)
    singly = jax.jit(lambda x, ws: [cpu_kernels.matmul(x, w) for w in ws])(x, ws)
    for y, want in zip(jax.jit(cpu_kernels.matmul_all)(x, ws), singly, strict=True):
        np.testing.assert_array_equal(y, want)

    @jax.jit
    def gradient(x, ws):
        return jax.grad(lambda x: sum(jnp.sum(y**2) for y in cpu_kernels.matmul_all(x, ws)))(x)

    assert error(gradient(x, ws), sum(2 * x @ w.T @ w for w in map(dense, arrays))) < 1e-5
    with pytest.raises(ValueError, match="either all matrices must round activations, or none"):
        cpu_kernels.matmul_all(x, [ws[0], dataclasses.replace(ws[0], int8_activations=True)])
    with pytest.raises(SpQRError, match="do not fit"):
        linear_all([CpuBackend().prepare(random_array(shape)) for shape in ((8, 96), (8, 64))], x)


@pytest.mark.parametrize("bad", [np.nan, np.inf], ids=str)
@pytest.mark.parametrize("kernels", cpu_kernels.kernel_names())
def test_what_is_not_finite_stays_so(bad, kernels):
    """And what is tiny or huge comes out right."""
    array = random_array((40, 96))
    packed, w = pack_for_cpu(array), dense(array)
    x = activations(1, 96)
    for scale in (1e-20, 1.0, 1e30):
        got = cpu_kernels.matmul(jnp.asarray(x * np.float32(scale)), packed, kernels=kernels)
        assert error(np.asarray(got, np.float64) / np.float64(np.float32(scale)), x @ w.T) < 5e-6
    assert not np.any(np.asarray(cpu_kernels.matmul(jnp.zeros((1, 96)), packed, kernels=kernels)))
    x[0, 5] = bad
    assert np.all(np.isnan(cpu_kernels.matmul(jnp.asarray(x), packed, kernels=kernels)))


# ---- a whole model ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def quantized(tiny_model):
    return random_quantized(tiny_model, outliers=0.05)


def test_a_model_computes_the_same(quantized, tiny_batches):
    tokens = jnp.asarray(tiny_batches[0])
    native, xla = (prepare(quantized, implementation=name) for name in ("cpu", "xla"))
    np.testing.assert_allclose(spqr_jax.forward(native, tokens), spqr_jax.forward(xla, tokens), rtol=1e-4, atol=1e-4)
    by_kernel = spqr_jax.perplexity(native, np.asarray(tokens)).perplexity
    assert by_kernel == pytest.approx(spqr_jax.perplexity(xla, np.asarray(tokens)).perplexity, rel=1e-4)
    prompts = [[5, 6, 7], [8]]
    made = [spqr_jax.Generator(model)(prompts, max_new_tokens=8).tokens for model in (quantized, xla)]
    assert made[0] == made[1]


def test_preparing_keeps_the_size(quantized):
    prepared = prepare(quantized, implementation="cpu")
    for block, before in zip(prepared.layers, quantized.layers, strict=True):
        for name in ("q_proj", "down_proj"):
            new, old = getattr(block, name), getattr(before, name)
            assert isinstance(new, CpuMatrix)
            # 4 bits for a 3-bit statistics code; paddings of small matrices
            assert new.nbytes < 1.3 * old.nbytes
    big = random_array((512, 1024))
    assert pack_for_cpu(big).nbytes < 1.04 * big.nbytes


def test_a_step_holds_no_dense_copy(tiny_model):
    """Neither of a weight nor of packed leaves, by the compiler's own account."""
    array = random_array((1024, 1024))
    packed = CpuBackend().prepare(array)
    step = jax.jit(lambda w, x: linear(w, jnp.tanh(linear(w, x)))).lower(packed, jnp.zeros((1, 1024))).compile()
    assert step.memory_analysis().temp_size_in_bytes < 64 * 1024


# ---- choice of kernels ------------------------------------------------------------------


def test_the_environment_chooses(monkeypatch):
    packed = pack_for_cpu(random_array((40, 64)))
    for name in cpu_kernels.kernel_names():
        monkeypatch.setenv(cpu_kernels.KERNELS_VARIABLE, name)
        assert cpu_kernels.chosen_kernels() == name
    monkeypatch.setenv(cpu_kernels.KERNELS_VARIABLE, "none")
    assert "none" in cpu_kernels.why_unavailable()
    assert isinstance(prepare(random_array((40, 64))), jax.Array)
    monkeypatch.setenv(cpu_kernels.KERNELS_VARIABLE, "sse9")
    with pytest.raises(cpu_kernels.LibraryError, match="sse9"):
        cpu_kernels.matmul(jnp.zeros((1, 64)), packed)


def test_without_the_library_xla_takes_over():
    """And says what to do about it."""
    code = (
        "import cpu_kernels.library as library; library._library_file = lambda: None\n"
        "import jax, spqr_jax, jax.numpy as jnp, cpu_kernels\n"
        "array = spqr_jax.quantize_weight(jnp.eye(32), None, spqr_jax.SpQRConfig.rtn(4, 16))\n"
        "assert isinstance(spqr_jax.prepare(array), jax.Array)\n"
        "print(cpu_kernels.why_unavailable())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "python -m cpu_kernels" in done.stdout
    with pytest.raises(SpQRError, match="implementation must be"):
        prepare(random_array((40, 64)), implementation="gpu")
    with pytest.raises(SpQRError, match="int8"):
        prepare(random_array((40, 64)), implementation="xla", int8_activations=True)


# ---- damage -----------------------------------------------------------------------------

DAMAGE = {
    "column past the end": ("outlier_cols", lambda a: a.at[0].set(60000)),
    "row pointers that fall": ("outlier_row_ptr", lambda a: a.at[3].set(10**6)),
    "row pointers whose differences overflow": (
        "outlier_row_ptr",
        lambda a: a.at[1:4].set(jnp.array([2**31 - 1, -(2**31), -1])),
    ),
    "row pointers past the entries": ("outlier_row_ptr", lambda a: a.at[-1].add(5)),
    "columns out of order": ("outlier_cols", lambda a: a[::-1]),
    "permutation past the end": ("perm", lambda a: a.at[0].set(65535)),
    "permutation too short": ("perm", lambda a: a[:-1]),
    "codes missing": ("codes", lambda a: a[:, :-1]),
    "rows of codes missing": ("codes", lambda a: a[:-1]),
    "statistics missing": ("tile_stats", lambda a: a[:, :-1]),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_array_is_not_packed(damage):
    name, change = damage
    array = random_array((40, 64), outliers=0.1)
    with pytest.raises(SpQRError, match="cannot be prepared"):
        pack_for_cpu(dataclasses.replace(array, **{name: change(getattr(array, name))}))


def damaged(array, rng):
    """One to three numbers of one leaf are others, from a small step to what its type can hold."""
    name = rng.choice([field for field in DATA_FIELDS if getattr(array, field) is not None])
    leaf = np.array(getattr(array, name))
    numbers = leaf.reshape(-1)
    for at in rng.integers(0, numbers.size, rng.integers(1, 4)):
        if leaf.dtype.kind == "f":
            numbers[at] = rng.choice([np.inf, np.nan, 0.0, -0.0, 65504.0, -65504.0, 6e-8])
        else:
            low, high = np.iinfo(leaf.dtype).min, np.iinfo(leaf.dtype).max
            near = int(numbers[at]) + int(rng.integers(-2, 3))
            numbers[at] = min(max(int(rng.choice([low, high, 0, array.shape[0], array.shape[1], near])), low), high)
    return dataclasses.replace(array, **{name: leaf})


def test_what_validation_accepts_is_safe_to_multiply():
    """Of arrays that a damaged file could hold: refused by name, or the kernels compute what the formula says.

    What lies behind it is tested in `test_fuzzed_under_sanitizers`: the library checks the packed
    arrays itself (`csrc/problem.cc`), and with any that it accepts no kernel leaves its buffers.
    """
    rng = np.random.default_rng(0)
    arrays = [jax.tree.map(np.asarray, random_array((32, 64), outliers=0.05, seed=seed)) for seed in range(3)]
    multiply = jax.jit(lambda x, packed: cpu_kernels.matmul(x, packed))
    x = activations(4, 64)
    accepted = refused = 0
    for index in range(600):
        array = damaged(arrays[index % 3], rng)
        try:
            array.validate()
        except SpQRError:
            refused += 1
            continue
        accepted += 1
        w = dense(array)
        with np.errstate(all="ignore"):
            assert error(multiply(x, pack_for_cpu(array)), x @ w.T) < 1e-5
    assert accepted > 100
    assert refused > 100


HEADER_DAMAGE = {
    "another kind of data": (0, 7),
    "more rows": (1, 400),
    "negative rows": (1, -40),
    "a huge number of columns": (2, 1 << 40),
    "bits that there are not": (3, 5),
    "groups that there are not": (4, 12),
    "statistics that there are not": (5, 9),
    "more outliers": (6, 10**6),
    "columns of three bytes": (7, 3),
    "half a permutation": (8, 2),
}


@pytest.mark.parametrize("change", [None, *HEADER_DAMAGE.values()], ids=["too short", *HEADER_DAMAGE])
def test_damaged_bytes_are_refused(change):
    """By the library itself, before it reads anything."""
    packed = pack_for_cpu(random_array((40, 64), outliers=0.1))
    data = np.array(packed.data)
    if change is None:
        data = data[:-200]
    else:
        data[: 8 * 16].view(np.int64)[change[0]] = change[1]
    wrong = dataclasses.replace(packed, data=jnp.asarray(data))
    with pytest.raises(Exception, match="spqr: "):
        jax.block_until_ready(cpu_kernels.matmul(jnp.zeros((1, 64)), wrong))
    with pytest.raises(Exception, match="spqr: "):
        jax.block_until_ready(cpu_kernels.take_rows(wrong, jnp.zeros(1, jnp.int32)))


@pytest.mark.slow
@pytest.mark.landing
def test_fuzzed_under_sanitizers(tmp_path):
    """Address and undefined-behaviour sanitizers over random and damaged matrices in buffers of the exact size."""
    sources = [path for path in build.SOURCES.glob("*.cc") if path.name != "ffi.cc"]
    flags = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    program = tmp_path / "fuzz"
    build.build(program, [*sources, Path(__file__).with_name("cpu_kernels_fuzz.cc")], flags, shared=False)
    done = subprocess.run([program, "20", str(os.getpid())], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "refused" in done.stdout


def test_a_solved_weight():
    """What the solver makes, not only what a test makes up."""
    w, x = correlated_problem(40, 72)
    array = quantize_weight(w, spqr_jax.accumulate_hessian(spqr_jax.empty_hessian(72), x), SpQRConfig())
    assert error(linear(prepare(array), x), np.asarray(x) @ dense(array).T) < 5e-6
