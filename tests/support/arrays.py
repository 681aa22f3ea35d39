"""Random matrices in any format, without a solver, and what they stand for, in NumPy."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import numpy as np

from spqr_jax import Decoder
from spqr_jax.array import SpQRArray
from spqr_jax.layout import array_layout, column_dtype, entry_capacity, leaf_specs
from spqr_jax.packing import pack_codes, unpack_codes


def random_array(
    shape, *, bits=3, group_size=16, tile=16, stats_bits: int | None = 3, outliers=0.02, permuted=True, seed=0
) -> SpQRArray:
    """Random codes, statistics and outliers: any format, without a solver. Made in NumPy: nothing is compiled."""
    rng = np.random.default_rng(seed)
    out, inner = shape
    layout = array_layout(shape, group_size, tile if stats_bits else None)
    mask = rng.random(shape) < outliers
    rows, cols = np.nonzero(mask)
    nnz = len(rows)
    levels = (stats_bits, stats_bits) if stats_bits else None
    specs = leaf_specs(
        shape,
        bits=bits,
        group_size=layout.group_size,
        stats_group_size=tile,
        stats_bits=levels,
        entries=entry_capacity(nnz),
        permuted=permuted,
    )
    codes = np.zeros((out, layout.padded_in), np.uint8)
    codes[:] = rng.integers(0, 1 << bits, codes.shape)
    groups = layout.groups
    scale_codes = zero_codes = None
    if stats_bits:
        draw = partial(rng.integers, 0, 1 << stats_bits, (groups, layout.padded_out))
        scale_codes, zero_codes = (pack_codes(draw().astype(np.uint16), stats_bits) for _ in range(2))
        tiles = layout.padded_out // tile
        low, high = (0.002, -9.0, 0.2, -9.0), (0.02, -1.0, 0.6, -1.0)
        stats = rng.uniform(low, high, (tiles, groups, 4))
    else:
        stats = rng.uniform((0.01, 0.0), (0.1, 7.0), (out, groups, 2))
    entries = entry_capacity(nnz)
    array = SpQRArray(
        codes=pack_codes(codes, bits),
        scale_codes=scale_codes,
        zero_codes=zero_codes,
        tile_stats=stats.astype(np.float16),
        outlier_cols=np.pad(cols, (0, entries - nnz)).astype(column_dtype(inner)),
        outlier_values=np.pad(rng.standard_normal(nnz), (0, entries - nnz)).astype(np.float16),
        outlier_row_ptr=np.searchsorted(rows, np.arange(out + 1)).astype(np.int32),
        perm=rng.permutation(inner).astype(column_dtype(inner)) if permuted else None,
        shape=shape,
        bits=bits,
        group_size=layout.group_size,
        stats_group_size=tile,
        scale_bits=stats_bits or 16,
        zero_bits=stats_bits or 16,
    )
    assert {name: None if s is None else s[0] for name, s in specs.items()} == {
        name: None if getattr(array, name) is None else getattr(array, name).shape for name in specs
    }
    return jax.device_put(array.validate())


def dense(array: SpQRArray, dtype=np.float64) -> np.ndarray:
    """The matrix by the formula, computed in NumPy in this type."""
    inner = array.shape[1]
    codes = unpack_codes(np.asarray(array.codes), array.bits)[:, :inner].astype(dtype)
    scale, zero = (np.repeat(part, array.group_size, axis=1)[:, :inner] for part in _statistics(array, dtype))
    permuted = scale * (codes - zero)
    matrix = np.empty_like(permuted)
    matrix[:, slice(None) if array.perm is None else np.asarray(array.perm)] = permuted
    rows, cols, values = array.to_coo()
    matrix[rows, cols] += values.astype(dtype)
    return matrix


def _statistics(array: SpQRArray, dtype) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point of each row's groups."""
    stats = np.asarray(array.tile_stats).astype(dtype)
    if array.scale_codes is None:
        return stats[..., 0], stats[..., 1]
    step, origin, zero_step, zero_origin = np.moveaxis(np.repeat(stats, array.stats_group_size, axis=0), -1, 0)
    scale_codes = unpack_codes(np.asarray(array.scale_codes), array.scale_bits).T.astype(dtype)
    zero_codes = unpack_codes(np.asarray(array.zero_codes), array.zero_bits).T.astype(dtype)
    out = array.shape[0]
    return (step * (scale_codes - origin))[:out], (zero_step * (zero_codes - zero_origin))[:out]


def random_quantized(model: Decoder, outer: bool = False, **form) -> Decoder:
    """The model with random matrices in its blocks; those of one block that are as wide share a permutation.

    Args:
      outer: whether embedding and head are such, too.
      form: of every matrix, as `random_array` takes it.
    """
    seeds = iter(range(10_000))

    def replaced(tree):
        perms: dict[int, jax.Array] = {}

        def random_like(w):
            if w.ndim != 2:
                return w
            array = random_array(w.shape, seed=next(seeds), **form)
            return dataclasses.replace(array, perm=perms.setdefault(w.shape[1], array.perm))

        return jax.tree.map(random_like, tree)

    layers = tuple(replaced(block) for block in model.layers)
    return dataclasses.replace(model, layers=layers, outer=replaced(model.outer) if outer else model.outer)


def dense_model(model: Decoder) -> Decoder:
    """The model with each quantized matrix as `dense` has it, in float32."""

    def by_formula(w):
        return jax.device_put(dense(w, np.float32)) if isinstance(w, SpQRArray) else w

    return jax.tree.map(by_formula, model, is_leaf=lambda w: isinstance(w, SpQRArray))
