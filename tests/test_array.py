from __future__ import annotations

import dataclasses
import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.arrays import dense, random_array
from support.problems import correlated_problem

from spqr_jax import (
    SpQRArray,
    SpQRConfig,
    SpQRError,
    accumulate_hessian,
    empty_hessian,
    linear,
    prepare,
    quantize_weight,
)
from spqr_jax.packing import unpack_codes


@cache
def make(shape=(40, 72), config=None):
    w, x = correlated_problem(*shape)
    return quantize_weight(w, accumulate_hessian(empty_hessian(shape[1]), x), config or SpQRConfig())


FORMATS = {
    "spqr": SpQRConfig(),
    "identity": SpQRConfig(order="identity", bits=4),
    "no outliers": SpQRConfig(outlier_threshold=math.inf, bits=2),
    "one level": SpQRConfig.gptq(3, 32),
    "per row": SpQRConfig.gptq(8, None),
}


@pytest.mark.parametrize("config", FORMATS.values(), ids=FORMATS.keys())
def test_to_dense_is_the_formula(config):
    """Written out in NumPy, weight by weight."""
    array = make(config=config)
    out, inner = array.shape
    codes = unpack_codes(np.asarray(array.codes), array.bits).astype(np.float32)
    stats = np.asarray(array.tile_stats, np.float32)
    if array.quantized_stats:
        scale_codes = unpack_codes(np.asarray(array.scale_codes), array.scale_bits).astype(np.float32)
        zero_codes = unpack_codes(np.asarray(array.zero_codes), array.zero_bits).astype(np.float32)
    dense = np.zeros((out, inner), np.float32)
    for i in range(out):
        for j in range(inner):
            g = j // array.group_size
            if array.quantized_stats:
                ss, sz, zs, zz = stats[i // array.stats_group_size, g]
                s, z = ss * (scale_codes[g, i] - sz), zs * (zero_codes[g, i] - zz)
            else:
                s, z = stats[i, g]
            dense[i, j] = s * (codes[i, j] - z)
    perm = np.arange(inner) if array.perm is None else np.asarray(array.perm)
    expected = np.zeros_like(dense)
    expected[:, perm] = dense
    rows, cols, values = array.to_coo()
    expected[rows, cols] += values.astype(np.float32)
    np.testing.assert_allclose(array.to_dense(), expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(jax.jit(lambda a: a.to_dense())(array), array.to_dense(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("config", FORMATS.values(), ids=FORMATS.keys())
def test_linear_multiplies_by_the_dense_matrix(config):
    array = make(config=config)
    x = np.random.default_rng(0).standard_normal((2, 3, 72)).astype(np.float32)
    expected = np.asarray(x, np.float64) @ np.asarray(array.to_dense(), np.float64).T
    for result in (linear(array, x), jax.jit(linear)(array, x), linear(prepare(array), x)):
        assert np.linalg.norm(result - expected) <= 1e-5 * np.linalg.norm(expected)
    half = linear(array, x.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    assert np.linalg.norm(half.astype(jnp.float32) - expected) <= 1e-2 * np.linalg.norm(expected)


def test_linear_refuses_activations_that_do_not_fit():
    with pytest.raises(SpQRError, match=r"\(2, 70\).*\(40, 72\)"):
        linear(make(), np.zeros((2, 70), np.float32))


def test_sizes_are_counted_honestly():
    array = make((64, 128))
    assert array.ideal_bits == pytest.approx(3 + 6 / 16 + 64 / 256 + 32 * array.nnz / array.size)
    bytes_held = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(array))
    assert array.nbytes == bytes_held
    unused = array.outlier_cols.shape[0] - array.nnz  # entries of 4 bytes that only fill up the list
    assert array.stored_bytes == bytes_held - 4 * unused == array.trimmed().nbytes
    assert array.stored_bits == pytest.approx(8 * array.stored_bytes / (64 * 128))
    # sizes that need no padding: codes and statistics at exactly their ideal bits,
    # then row pointers and permutation
    extra = (65 * 32 + 128 * 16) / (64 * 128)
    assert array.stored_bits == pytest.approx(array.ideal_bits + extra)
    assert np.asarray(array.codes).nbytes * 8 == 3 * array.size


def test_coo_is_sorted_and_complete():
    array = make((64, 128))
    rows, cols, values = array.to_coo()
    assert len(rows) == array.nnz > 0
    assert np.all(np.diff(rows.astype(np.int64) * 128 + cols) > 0)
    assert values.dtype == np.float16
    without = dataclasses.replace(array, outlier_values=np.zeros_like(array.outlier_values))
    difference = np.asarray(array.to_dense()) - np.asarray(without.to_dense())
    np.testing.assert_allclose(difference[rows, cols], values.astype(np.float32), atol=1e-6)
    assert np.count_nonzero(difference) <= array.nnz


def test_rows_property_matches_coo():
    array = make((64, 128))
    rows = jax.jit(lambda a: a.rows)(array)
    np.testing.assert_array_equal(np.asarray(rows)[: array.nnz], array.to_coo()[0])


def test_no_outliers_still_has_harmless_entries():
    array = make(config=FORMATS["no outliers"])
    assert array.nnz == 0
    assert array.outlier_values.shape == (16,)
    assert not np.any(array.outlier_values)
    assert array.trimmed().outlier_values.shape == (1,)
    assert [len(part) for part in array.to_coo()] == [0, 0, 0]


def test_it_is_a_pytree():
    array = make()
    leaves, tree = jax.tree.flatten(array)
    again = jax.tree.unflatten(tree, leaves)
    np.testing.assert_array_equal(again.to_dense(), array.to_dense())
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(array)[0]]
    assert ".codes" in paths


def test_structure_depends_on_shape_and_format_only():
    """Arrays with different outliers and permutations stack, and share one compiled program."""
    arrays = [random_array((48, 64), outliers=share, seed=seed) for seed, share in enumerate((0.0, 0.02, 0.05))]
    entries = max(array.outlier_cols.shape[0] for array in arrays)
    arrays = [array.with_capacity(entries) for array in arrays]
    assert len({jax.tree.structure(array) for array in arrays}) == 1
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *arrays)
    together = jax.jit(jax.vmap(lambda array: array.to_dense()))(stacked)
    program = jax.jit(lambda array: array.to_dense())
    for array, matrix in zip(arrays, together, strict=True):
        array.validate()
        np.testing.assert_allclose(matrix, dense(array), rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(program(array), matrix)
    assert program._cache_size() == 1
    with pytest.raises(SpQRError, match="cannot hold"):
        arrays[-1].with_capacity(16)


def test_it_multiplies_as_a_matrix():
    array = random_array((48, 64))
    matrix = dense(array, np.float32)
    x, rows = np.random.default_rng(0).standard_normal((2, 3, 64), np.float32), np.ones((5, 48), np.float32)
    np.testing.assert_allclose(jnp.asarray(x) @ array.T, x @ matrix.T, rtol=2e-4, atol=2e-4)
    np.testing.assert_allclose(x @ array.T, x @ matrix.T, rtol=2e-4, atol=2e-4)  # a NumPy array on the left
    np.testing.assert_allclose(array @ jnp.asarray(x[0, 0]), matrix @ x[0, 0], rtol=2e-4, atol=2e-4)
    np.testing.assert_allclose(array @ jnp.asarray(x[0].T), matrix @ x[0].T, rtol=2e-4, atol=2e-4)
    np.testing.assert_allclose(jnp.asarray(rows) @ array, rows @ matrix, rtol=2e-4, atol=2e-4)
    assert array.T.shape == (64, 48)
    assert array.T.T is array
    assert array.astype(jnp.bfloat16).dtype == jnp.bfloat16
    assert repr(array) == "SpQRArray((48, 64), bits=3, group_size=16, stats_bits=3)"
    np.testing.assert_allclose(array.T.to_dense(), matrix.T, rtol=1e-5, atol=1e-5)


def test_gradients_reach_the_float_leaves():
    array = random_array((32, 64))

    def loss(values):
        return jnp.sum(dataclasses.replace(array, outlier_values=values).to_dense() ** 2)

    gradient = jax.grad(loss)(array.outlier_values)
    rows, _, _ = array.to_coo()
    matrix = dense(array)
    place = np.argsort(np.asarray(array.perm))
    permuted = matrix[:, np.argsort(place)]
    want = 2 * permuted[np.asarray(array.rows)[: array.nnz], np.asarray(array.outlier_cols)[: array.nnz]]
    np.testing.assert_allclose(gradient[: array.nnz], want, rtol=2e-2, atol=2e-2)
    assert len(rows) == array.nnz


def test_specs_validate_like_arrays():
    array = make()
    jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), array).validate()
    wrong = dataclasses.replace(array, codes=jax.ShapeDtypeStruct((40, 3), jnp.uint16))
    with pytest.raises(SpQRError, match="codes should be uint16"):
        wrong.validate()


def broken(array: SpQRArray):
    perm = np.asarray(array.perm).copy()
    perm[0] = perm[1]
    cols = np.asarray(array.outlier_cols).copy()
    cols[0] = 60000
    pointers = np.asarray(array.outlier_row_ptr).copy()
    pointers[5] = -3
    around = np.asarray(array.outlier_row_ptr).copy()
    around[1:4] = 2**31 - 1, -(2**31), -1  # each differs from the next by what wraps to a positive number
    stats = np.asarray(array.tile_stats).copy()
    stats[0, 0, 0] = np.inf
    yield {"perm": perm}, "permutation"
    yield {"outlier_cols": cols}, "outlier_cols are not all in"
    yield {"outlier_row_ptr": pointers}, "outlier_row_ptr does not rise"
    yield {"outlier_row_ptr": around}, "outlier_row_ptr does not rise"
    yield {"tile_stats": stats}, "not finite"
    yield {"outlier_cols": np.zeros(0, np.uint16)}, "outlier_cols should have at least one entry"
    yield {"outlier_values": np.asarray(array.outlier_values)[:-1]}, "outlier_values should be"
    yield {"outlier_row_ptr": np.asarray(array.outlier_row_ptr) * 100}, "outlier_row_ptr does not rise"
    yield {"outlier_values": np.ones_like(array.outlier_values)}, "an outlier entry past nnz is not zero"
    yield {"tile_stats": np.asarray(array.tile_stats, np.float32)}, "tile_stats should be float16"
    yield {"bits": 4}, "codes should be"
    yield {"scale_codes": None}, "should be"
    yield {"group_size": 7}, "is not a supported format"


def test_each_broken_invariant_is_named():
    array = make()
    for changes, says in broken(array):
        with pytest.raises(SpQRError, match=says):
            dataclasses.replace(array, **changes).validate()
