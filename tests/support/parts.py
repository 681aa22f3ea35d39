"""Quantized matrices as the Pallas kernels' packing takes them."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from pallas_kernels import spqr_matmul
from spqr_jax.array import SpQRArray
from spqr_jax.packing import unpack_codes


def part(array: SpQRArray) -> spqr_matmul.Part:
    """The arrays of a matrix; statistics that four bits cannot hold as floats."""
    array = jax.tree.map(np.asarray, array)  # nothing is compiled
    form: dict[str, Any] = dict.fromkeys(("scale_codes", "zero_codes", "tile_stats", "scale", "zero"))
    tile, stats = array.stats_group_size, array.tile_stats
    if array.scale_codes is None:
        form |= {"scale": stats[..., 0], "zero": stats[..., 1]}
    elif max(array.scale_bits, array.zero_bits) <= 4 and tile % spqr_matmul.TILE == 0:
        form |= {
            "scale_codes": unpack_codes(array.scale_codes, array.scale_bits).T,
            "zero_codes": unpack_codes(array.zero_codes, array.zero_bits).T,
            "tile_stats": np.repeat(stats, tile // spqr_matmul.TILE, axis=0),
        }
    else:
        form["scale"], form["zero"] = array.statistics()
    return spqr_matmul.Part(
        shape=array.shape,
        bits=array.bits,
        group_size=array.group_size,
        codes=array.codes,
        row_ptr=array.outlier_row_ptr,
        cols=array.outlier_cols,
        values=array.outlier_values,
        **form,
    )


def prepared(layout: spqr_matmul.Layout, *arrays: SpQRArray) -> spqr_matmul.Prepared:
    """Matrices that share the order of the first, joined."""
    return spqr_matmul.prepare(layout, [part(array) for array in arrays], arrays[0].perm)
