"""Random matrices in any format, without a solver."""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
import numpy as np

from spqr_jax.array import SpQRArray
from spqr_jax.layout import array_layout, column_dtype, leaf_specs
from spqr_jax.packing import pack_codes


def random_array(
    shape, *, bits=3, group_size=16, tile=16, stats_bits: int | None = 3, outliers=0.02, permuted=True, seed=0
) -> SpQRArray:
    """Random codes, statistics and outliers: any format, without a solver."""
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
        entries=max(nnz, 1),
        permuted=permuted,
    )
    codes = np.zeros((out, layout.padded_in), np.uint8)
    codes[:] = rng.integers(0, 1 << bits, codes.shape)
    groups = layout.groups
    scale_codes = zero_codes = None
    if stats_bits:
        draw = partial(rng.integers, 0, 1 << stats_bits, (groups, layout.padded_out))
        scale_codes, zero_codes = (jnp.asarray(pack_codes(draw().astype(np.uint16), stats_bits)) for _ in range(2))
        tiles = layout.padded_out // tile
        low, high = (0.002, -9.0, 0.2, -9.0), (0.02, -1.0, 0.6, -1.0)
        stats = rng.uniform(low, high, (tiles, groups, 4))
    else:
        stats = rng.uniform((0.01, 0.0), (0.1, 7.0), (out, groups, 2))
    array = SpQRArray(
        codes=jnp.asarray(pack_codes(codes, bits)),
        scale_codes=scale_codes,
        zero_codes=zero_codes,
        tile_stats=jnp.asarray(stats, jnp.float16),
        outlier_cols=jnp.asarray((cols if nnz else np.zeros(1)).astype(column_dtype(inner))),
        outlier_values=jnp.asarray(rng.standard_normal(nnz) if nnz else np.zeros(1), jnp.float16),
        outlier_row_ptr=jnp.asarray(np.searchsorted(rows, np.arange(out + 1)), jnp.int32),
        perm=jnp.asarray(rng.permutation(inner).astype(column_dtype(inner))) if permuted else None,
        shape=shape,
        bits=bits,
        group_size=layout.group_size,
        stats_group_size=tile,
        scale_bits=stats_bits or 16,
        zero_bits=stats_bits or 16,
        nnz=nnz,
    )
    assert {name: None if s is None else s[0] for name, s in specs.items()} == {
        name: None if getattr(array, name) is None else getattr(array, name).shape for name in specs
    }
    return array.validate()
