"""Joined matrices and stacks: products, rows and dense copies by XLA, what is static, and what is refused."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.arrays import dense, random_array
from support.parts import part, prepared

from pallas_kernels import spqr_matmul
from pallas_kernels.spqr_matmul import xla
from pallas_kernels.spqr_matmul.formats import Format

layouts = pytest.mark.parametrize("layout", spqr_matmul.LAYOUTS)
others = pytest.mark.parametrize("layout", ["rows", "lanes"])


def error(got, want) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def activations(shape, dtype=np.float32, seed=1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def arrays_of(sizes, inner, forms, seed=0):
    """Matrices that read one input in one order."""
    arrays = [
        random_array((out, inner), seed=100 * seed + i, **form)
        for i, (out, form) in enumerate(zip(sizes, forms, strict=True))
    ]
    return [dataclasses.replace(array, perm=arrays[0].perm) for array in arrays]


def joined_dense(arrays) -> np.ndarray:
    return np.concatenate([dense(array) for array in arrays])


@jax.jit
def read(x, half, rows, matrix, index):
    """Everything that XLA does with a matrix, in one program."""
    with jax.default_matmul_precision("highest"):
        parts = spqr_matmul.matmul_parts(x, matrix, index, implementation="xla")
    return (
        parts,
        spqr_matmul.matmul(half, matrix, index, implementation="xla"),
        spqr_matmul.take_rows(matrix, rows, index),
        spqr_matmul.dequantize(matrix, index),
        spqr_matmul.dequantize(matrix, index, jnp.bfloat16),
    )


def check(arrays, matrix, index=None, rows=(), tolerance=2e-6):
    want = joined_dense(arrays)
    x = activations((2, want.shape[1]))
    half = x.astype(jnp.bfloat16)
    rows = np.asarray(rows, np.int32)
    parts, product, taken, whole, rounded = read(x, half, rows, matrix, index)
    assert [p.shape for p in parts] == [(2, array.shape[0]) for array in arrays]
    assert error(np.concatenate(parts, axis=1), x @ want.T) < tolerance
    assert product.dtype == rounded.dtype == jnp.bfloat16
    assert error(product, half.astype(np.float64) @ want.T) < 4e-3
    assert error(taken, want[rows]) < tolerance
    assert error(whole, want) < tolerance
    assert error(rounded, want) < 4e-3


MIXED = [{}, {"bits": 4, "group_size": 32}, {"bits": 2, "stats_bits": None}]


def test_joined_matrices_of_one_format():
    arrays = arrays_of((40, 16, 7), 300, [{}] * 3)
    matrix = prepared("fragments", *arrays)
    assert matrix.spans is None
    assert matrix.words.shape == (1, 3 + 1 + 1, 2, 480)
    assert (matrix.shape, matrix.rows) == ((63, 300), 80)
    check(arrays, matrix, rows=[[0, 39], [40, 55], [56, 62]])


def test_joined_matrices_of_several_formats():
    arrays = arrays_of((40, 16, 7), 300, MIXED)
    matrix = prepared("fragments", *arrays)
    kinds = np.asarray(matrix.spans)[0, :, 1]
    held = [matrix.formats[kind] for kind in kinds]
    assert held == [Format(3, 16, "nibbles")] * 3 + [Format(4, 8, "nibbles"), Format(2, 16, "halves")]
    sizes = [2 * form.step_words // 16 for form in held]
    np.testing.assert_array_equal(np.asarray(matrix.spans)[0, :, 0], np.cumsum([0, *sizes])[:-1])
    assert matrix.words.shape == (16 * sum(sizes),)
    check(arrays, matrix, rows=[0, 39, 40, 55, 56, 62])


@others
def test_joined_matrices_in_other_layouts(layout):
    arrays = arrays_of((130, 16, 7), 300, [{}, {"bits": 4, "group_size": 32}, {"bits": 2}])
    matrix = prepared(layout, *arrays)
    assert (matrix.count, matrix.parts, matrix.shape) == (1, (130, 16, 7), (153, 300))
    check(arrays, matrix, rows=[[0, 129], [130, 145], [146, 152]])


@pytest.mark.parametrize("forms", [[{}, {}], MIXED[:2]], ids=["one format", "formats that differ between layers"])
def test_a_stack_in_a_loop(forms):
    """Layers of one shape, with a traced number, in one program."""
    layers = [arrays_of((24, 16), 272, forms if i else forms[::-1], seed=i) for i in range(3)]
    layers[1] = [dataclasses.replace(array, perm=None) for array in layers[1]]
    matrix = spqr_matmul.stack([prepared("fragments", *arrays) for arrays in layers])
    assert matrix.count == 3
    assert (matrix.spans is None) == (forms[0] == forms[1])
    for i, arrays in enumerate(layers):
        check(arrays, matrix, np.int32(i), rows=[0, 23, 24, 39])

    @jax.jit
    def chain(x, matrix):
        def layer(i, x):
            with jax.default_matmul_precision("highest"):
                y = spqr_matmul.matmul(x, matrix, i)
            return jnp.tanh(jnp.pad(y, ((0, 0), (0, 272 - 40))))

        return jax.lax.fori_loop(0, matrix.count, layer, x)

    x = activations((2, 272))
    want = x.astype(np.float64)
    for arrays in layers:
        want = np.tanh(np.pad(want @ joined_dense(arrays).T, ((0, 0), (0, 272 - 40))))
    assert error(chain(x, matrix), want) < 1e-5


def test_stacks_of_stacks():
    layers = [arrays_of((16,), 96, [MIXED[i % 3]], seed=i) for i in range(4)]
    single = [prepared("fragments", *arrays) for arrays in layers]
    whole, halves = spqr_matmul.stack(single), [spqr_matmul.stack(single[:2]), spqr_matmul.stack(single[2:])]
    again = spqr_matmul.stack(halves)
    assert jax.tree.structure(whole) == jax.tree.structure(again)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


@layouts
def test_programs_depend_on_shapes_and_formats_only(layout):
    first, second = (prepared(layout, random_array((32, 96), outliers=0.01, seed=seed)) for seed in (0, 1))
    assert np.any(np.asarray(first.order) != np.asarray(second.order))
    assert jax.tree.structure(first) == jax.tree.structure(second)
    assert jax.tree.map(jnp.shape, first) == jax.tree.map(jnp.shape, second)


def test_gradients_and_batches():
    """By the activations, through an axis that vmap adds."""
    arrays = arrays_of((24, 16), 96, [{}, {}])
    matrix = prepared("fragments", *arrays)
    x, want = activations((3, 2, 96)), joined_dense(arrays)

    @jax.jit
    def both(x, matrix):
        with jax.default_matmul_precision("highest"):
            multiply = jax.vmap(lambda row: spqr_matmul.matmul(row, matrix))
            return multiply(x), jax.grad(lambda x: (multiply(x) ** 2).sum())(x)

    product, gradient = both(x, matrix)
    assert error(product, x @ want.T) < 2e-6
    assert error(gradient, 2 * x @ want.T @ want) < 5e-6


@layouts
def test_a_large_matrix_is_dequantized_in_blocks(layout, monkeypatch):
    """Five tiles in at most two each: the last block is cut."""
    array = random_array((78, 160), outliers=0.1)
    for limit in ("DENSE_BYTES", "PIECE_BYTES"):
        monkeypatch.setattr(xla, limit, 80 * 160 * 4 // 4)
    x = activations((3, 160))
    program = jax.jit(lambda x, w: spqr_matmul.matmul(x, w, implementation="xla"))
    matrix = prepared(layout, array)
    assert "[32,160]" in str(jax.make_jaxpr(program)(x, matrix))
    with jax.default_matmul_precision("highest"):
        assert error(program(x, matrix), x @ dense(array).T) < 2e-6


@layouts
def test_memory_of_a_layout(layout):
    """At 1% outliers a large matrix takes at most 4.15 bits a weight; the permutation is another 32/out."""
    array = random_array((1024, 4096), outliers=0.01)
    matrix = prepared(layout, array)
    assert 8 * (matrix.nbytes - matrix.order.nbytes) / (1024 * 4096) <= 4.15


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "form", "why"),
    [
        ("fragments", {"bits": 9}, "codes of 9 bits"),
        ("fragments", {"group_size": 24}, "groups of 24"),
        ("fragments", {"inner": 65537}, "65537 columns"),
        ("rows", {"bits": 8}, "codes of 8 bits"),
        ("rows", {"group_size": 144}, "groups of 144"),
        ("lanes", {"statistics_bits": None}, "without a second level"),
        ("lanes", {"statistics_bits": 6}, "codes of 6 bits"),
        ("lanes", {"tile_rows": 8}, "second-level groups of 8 rows"),
    ],
)
def test_formats_that_a_layout_cannot_hold(layout, form, why):
    fine = {"bits": 3, "group_size": 16, "inner": 96, "statistics_bits": 3, "tile_rows": 16}
    assert not spqr_matmul.why_unsupported(layout, **fine)
    assert why in spqr_matmul.why_unsupported(layout, **fine | form)


def test_a_format_that_cannot_be_prepared():
    with pytest.raises(NotImplementedError, match="groups of 24"):
        prepared("fragments", random_array((64, 96), group_size=24))
    with pytest.raises(NotImplementedError, match="without a second level"):
        prepared("rows", random_array((64, 96), stats_bits=None))


def test_parts_that_do_not_fit():
    array = random_array((64, 96))
    fine = part(array)
    columns = np.asarray(fine.cols)
    damages = {
        "codes of shape": {"codes": fine.codes[:, :9]},
        "scale_codes of shape": {"scale_codes": np.zeros((64, 5), np.uint8)},
        "tile_stats of shape": {"tile_stats": fine.tile_stats[:3]},
        "zero_codes is missing": {"zero_codes": None},
        r"scale of shape \(64, 5\)": {"scale": np.ones((64, 5)), "zero": np.ones((64, 6))},
        "does not rise": {"row_ptr": np.asarray(fine.row_ptr)[::-1]},
        "outliers, but 3 columns": {"cols": columns[:3]},
        "outside 0..95": {"cols": columns + np.uint16(96)},
        "do not rise within a row": {"cols": columns[::-1]},
    }
    for message, damage in damages.items():
        with pytest.raises(ValueError, match=message):
            spqr_matmul.prepare("fragments", [dataclasses.replace(fine, **damage)])
    with pytest.raises(ValueError, match="not a permutation of 96 columns"):
        spqr_matmul.prepare("fragments", [fine], np.zeros(96, np.uint16))
    with pytest.raises(ValueError, match="layout must be one of fragments, rows, lanes, got 'columns'"):
        spqr_matmul.prepare("columns", [fine])
    with pytest.raises(ValueError, match=r"one number of columns, got \[96, 112\]"):
        spqr_matmul.prepare("fragments", [fine, part(random_array((16, 112)))])
    with pytest.raises(ValueError, match="at least one part"):
        spqr_matmul.prepare("fragments", [])


def test_matrices_that_cannot_be_stacked():
    matrix = prepared("fragments", random_array((64, 96)))
    with pytest.raises(ValueError, match=r"parts of \(64,\) rows x 96 and of \(64,\) rows x 112"):
        spqr_matmul.stack([matrix, prepared("fragments", random_array((64, 112)))])
    with pytest.raises(ValueError, match="at least one matrix"):
        spqr_matmul.stack([])
    with pytest.raises(NotImplementedError, match="only the fragments layout can be stacked, not rows"):
        spqr_matmul.stack([prepared("rows", random_array((64, 96)))])
    with pytest.raises(ValueError, match="a stack of 2 matrices needs an index"):
        spqr_matmul.matmul(jnp.ones((1, 96)), spqr_matmul.stack([matrix, matrix]))
