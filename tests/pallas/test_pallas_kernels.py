"""The Pallas kernels against the formula, in interpreters; which kernel is chosen, and what they refuse."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.arrays import dense, random_array
from support.parts import prepared

from pallas_kernels import spqr_matmul
from pallas_kernels.spqr_matmul import api, fragments, lanes, outliers, rows
from pallas_kernels.spqr_matmul.formats import Format

LAYOUTS = {"triton": "rows", "tpu": "lanes"}
# float32 less the 12 bits that a code's offset takes; bfloat16
MAX_ERROR = {"triton": 2.0**-12, "tpu": 4e-3}

SLOW = pytest.mark.slow
MORE_FORMATS = ["2 bits", "groups of 64, 2 bits", "groups of 32, 4 bits"]

kernels = pytest.mark.parametrize("kernel", LAYOUTS)


def error(got, want) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def reference(array, x) -> np.ndarray:
    """The product by the formula, in float64."""
    return np.asarray(x, np.float64) @ dense(array).T


def activations(shape, dtype=np.float32, seed=1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def run(kernel, array, x, careful=False):
    """A kernel in its interpreter; with care, that of a TPU looks for races and for reads of what was never written."""
    return np.asarray(interpreted(kernel, careful)(x, prepared(LAYOUTS[kernel], array)), np.float32)


@functools.cache
def interpreted(kernel, careful):
    """The product as one program."""
    interpret = True
    if kernel == "tpu" and careful:
        from jax.experimental.pallas import tpu as pltpu

        interpret = pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True)
    return jax.jit(lambda x, w: spqr_matmul.matmul(x, w, implementation=kernel, interpret=interpret))


FORMATS = {
    "3 bits": {},
    "2 bits": {"bits": 2},
    "4 bits": {"bits": 4},
    "groups of 32": {"group_size": 32},
    "groups of 64, 2 bits": {"group_size": 64, "bits": 2},
    "groups of 32, 4 bits": {"group_size": 32, "bits": 4},
}


@kernels
@pytest.mark.parametrize(
    "form",  # what is not here, packing takes care of
    ["3 bits", "4 bits", "groups of 32", *(pytest.param(form, marks=SLOW) for form in MORE_FORMATS)],
)
def test_formats(kernel, form):
    array = random_array((96, 320), **FORMATS[form])
    x = activations((2, 320))
    assert error(run(kernel, array, x), reference(array, x)) < MAX_ERROR[kernel]


@kernels
@pytest.mark.parametrize("batch", [1, 2, 8, 16, 17])
def test_batches(kernel, batch):
    if kernel == "triton" and batch > 2:
        pytest.skip("for one and two rows")
    array = random_array((80, 600))  # two column blocks on a TPU, three on a GPU, the last one padded
    x = activations((batch, 600))
    assert error(run(kernel, array, x, careful=batch in (1, 16)), reference(array, x)) < MAX_ERROR[kernel]


@kernels
@pytest.mark.parametrize("shape", [(1152, 512), (24, 2200), (7, 16), (130, 33)])
def test_shapes(kernel, shape):
    array = random_array(shape, outliers=0.01)
    x = activations((1, shape[1]))
    assert error(run(kernel, array, x), reference(array, x)) < MAX_ERROR[kernel]


@SLOW
@kernels
@pytest.mark.parametrize("shape", [(576, 576), (192, 576), (1536, 576), (576, 1536), (2048, 2048)])
@pytest.mark.parametrize("form", ["3 bits", "4 bits", "groups of 32"])
def test_real_shapes(kernel, shape, form):
    """A whole small model's, and one as large as an interpreter can take."""
    array = random_array(shape, outliers=0.01, **FORMATS[form])
    x = activations((1, shape[1]))
    assert error(run(kernel, array, x, careful=True), reference(array, x)) < MAX_ERROR[kernel]


@kernels
def test_activation_types_and_leading_axes(kernel):
    array = random_array((64, 256))
    for dtype in (jnp.bfloat16, np.float16):
        x = activations((1, 2, 256), dtype)
        got = run(kernel, array, x)
        assert got.shape == (1, 2, 64)
        assert error(got, reference(array, x)) < 8e-3  # the result is rounded to the type of x


@kernels
@pytest.mark.parametrize("size", [1e-20, 1e20])
def test_activations_of_any_size(kernel, size):
    """float16 would overflow, or lose everything: rows are scaled."""
    array = random_array((64, 256))
    x = activations((2, 256)) * np.array([[size], [1.0]], np.float32)
    got, want = run(kernel, array, x), reference(array, x)
    for row in range(2):
        assert error(got[row], want[row]) < MAX_ERROR[kernel]
    assert not np.any(run(kernel, array, np.zeros_like(x)))


@kernels
def test_what_is_not_finite_shows(kernel):
    array = random_array((64, 256))
    x = activations((2, 256))
    x[0, 3] = np.nan
    got = run(kernel, array, x)
    assert np.all(np.isnan(got[0]))
    assert np.all(np.isfinite(got[1]))


# ---- packing and outliers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", spqr_matmul.LAYOUTS)
def test_packing_makes_no_dense_copy(layout):
    """What packing keeps on the side is less than the matrix in 8 bits."""
    shape = (4096, 8192)
    codes = jax.ShapeDtypeStruct((shape[0], shape[1] // 16 * 3), jnp.uint16)
    statistics = (
        jax.ShapeDtypeStruct((shape[0], shape[1] // 16), jnp.uint8),
        jax.ShapeDtypeStruct((shape[0], shape[1] // 16), jnp.uint8),
        jax.ShapeDtypeStruct((shape[0] // 16, shape[1] // 16, 4), jnp.float16),
    )
    if layout == "fragments":
        form = Format(3, 16, "nibbles")
        lowered = fragments.pack.lower(codes, statistics, shape=shape, bits=3, group_size=16, form=form)
    elif layout == "rows":
        lowered = rows.pack.lower(codes, *statistics, bits=3, group_size=16)
    else:
        lowered = lanes.pack.lower(codes, *statistics, bits=3, group_size=16, block=1024)
    assert lowered.compile().memory_analysis().temp_size_in_bytes < shape[0] * shape[1]


@pytest.mark.parametrize("fullest", [0, 1, 20, 130, 4096])
def test_outliers_of_rows_that_differ(fullest):
    """A row may have none, a few or all of its weights as outliers, and costs accordingly."""
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 5, 200)
    counts[7] = fullest
    inner = 4096
    columns = np.concatenate([np.sort(rng.choice(inner, n, replace=False)) for n in counts]).astype(np.uint16)
    values = rng.standard_normal(counts.sum()).astype(np.float16)
    row_ptr = np.concatenate([[0], np.cumsum(counts)])
    sparse = outliers.pack(row_ptr, columns, values)
    assert sparse.columns.size <= 17 / 16 * (counts.sum() + 3 * np.count_nonzero(counts)) + 256
    assert sparse.widest <= outliers.FAN
    assert {sparse.widest, sparse.row_chunks} <= {1 << i for i in range(11)}  # few values, so few programs
    want = np.zeros((200, inner), np.float32)
    want[np.repeat(np.arange(200), counts), columns] = values
    x = activations((3, inner))

    @jax.jit
    def uses(sparse, x, first, index):
        tile = outliers.add_to(sparse, jnp.zeros((208, inner)), first)
        return outliers.multiply(sparse, x), tile, outliers.row(sparse, index, inner)

    product, tile, row = uses(sparse, x, np.int32(0), np.int32(7))
    np.testing.assert_array_equal(uses(sparse, x, np.int32(16), np.int32(7))[1][:184], want[16:])
    np.testing.assert_allclose(product, x @ want.T, atol=1e-3, rtol=1e-4)
    np.testing.assert_array_equal(tile[:200], want)
    assert not np.any(np.asarray(tile[200:]))
    np.testing.assert_array_equal(row, want[7])


# ---- what is taken and what is refused ------------------------------------------------------------------------------


def test_a_named_implementation_runs_or_says_why():
    array = random_array((64, 256))
    packed = prepared("lanes", array)
    x = jnp.asarray(activations((1, 256)))
    with pytest.raises(NotImplementedError, match="prepared as 'lanes', but 'rows' is needed"):
        spqr_matmul.matmul(x, packed, implementation="triton")
    with pytest.raises(NotImplementedError, match="tpu: 65 rows of activations, but this kernel takes at most 64"):
        spqr_matmul.matmul(jnp.ones((65, 256)), packed, implementation="tpu", interpret=True)
    with jax.default_matmul_precision("highest"):
        assert error(spqr_matmul.matmul(x, packed), reference(array, x)) < 1e-6  # xla, since this is a CPU
    with pytest.raises(ValueError, match="implementation must be one of mosaic_gpu, triton, tpu, xla, got 'cuda'"):
        spqr_matmul.matmul(x, packed, implementation="cuda")
    with pytest.raises(ValueError, match="activations must be float32"):
        spqr_matmul.matmul(x.astype(jnp.int32), packed)
    with pytest.raises(ValueError, match=r"activations \(1, 200\) do not fit"):
        spqr_matmul.matmul(x[:, :200], packed)


H100 = spqr_matmul.Target("gpu", "H100", (9, 0), 132)


@pytest.mark.parametrize(
    ("layout", "batch", "target", "wanted"),
    [
        ("fragments", 64, H100, "mosaic_gpu"),
        ("fragments", 65, H100, "xla"),
        ("fragments", 1, spqr_matmul.Target("gpu", "V100", (7, 0), 80), "xla"),
        ("rows", 2, H100, "triton"),
        ("rows", 3, H100, "xla"),
        ("lanes", 64, spqr_matmul.Target("tpu", "TPU v5 lite", (0, 0), 1), "tpu"),
        ("lanes", 1, H100, "xla"),
    ],
)
def test_the_kernel_that_is_chosen(monkeypatch, layout, batch, target, wanted):
    packed = prepared(layout, random_array((16, 32)))
    monkeypatch.setattr(api, "why_no_mosaic", lambda _: "")
    monkeypatch.setattr(api, "why_no_triton", lambda: "")
    assert api._chosen(packed, batch, target, None) == wanted
    if wanted == "mosaic_gpu":
        monkeypatch.setattr(api, "why_no_mosaic", lambda _: "too old")
        assert api._chosen(packed, batch, target, None) == "xla"
        with pytest.raises(NotImplementedError, match="mosaic_gpu: too old"):
            api._chosen(packed, batch, target, "mosaic_gpu")


@pytest.mark.parametrize(
    ("name", "target", "why"),
    [
        ("tpu", H100, "tpu needs a TPU, but this device is a gpu"),
        ("triton", spqr_matmul.Target("gpu", "V100", (7, 0), 80), r"V100 has compute capability \(7, 0\)"),
        ("mosaic_gpu", spqr_matmul.Target("cpu", "cpu", (0, 0), 1), "mosaic_gpu needs a GPU, but this device is a cpu"),
        ("xla", H100, "^$"),
    ],
)
def test_why_a_kernel_cannot_run(name, target, why):
    assert re.search(why, spqr_matmul.why_no_kernel(name, target))


def test_a_jax_without_triton_is_told(monkeypatch):
    packed = prepared("rows", random_array((64, 256)))
    monkeypatch.setattr(api.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NotImplementedError, match="no longer has Pallas's Triton backend: use the mosaic_gpu kernel"):
        spqr_matmul.matmul(jnp.ones((1, 256)), packed, implementation="triton", interpret=True)
