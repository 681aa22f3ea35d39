"""A matrix's statistics in the forms that kernels' packing takes."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from spqr_jax.array import SpQRArray
from spqr_jax.packing import unpack_codes

KERNEL_TILE = 16
"""Rows of a kernel's tile; second-level tiles must be a multiple of it."""

_MOST_BITS = 4  # of a statistics code: kernels hold two in a byte


def packed_statistics(array: SpQRArray) -> dict[str, Any]:
    """Statistics as codes with a second level where a kernel can hold these, else as floats.

    Args:
      array: the quantized matrix [out, in].

    Returns:
      NumPy arrays by name; those of the other form are None. ``scale_codes`` and ``zero_codes``, uint8 [rows, groups],
      with ``tile_stats``, float16 [tiles of 16 rows, groups, 4]. Or ``scale`` and ``zero``, float16 without a second
      level and float32 otherwise, [out, groups].
    """
    forms: dict[str, Any] = dict.fromkeys(("scale_codes", "zero_codes", "tile_stats", "scale", "zero"))
    stats, tile = np.asarray(array.tile_stats), array.stats_group_size
    if not array.quantized_stats:
        return forms | {"scale": stats[..., 0], "zero": stats[..., 1]}
    scale_codes, zero_codes = np.asarray(array.scale_codes), np.asarray(array.zero_codes)
    if max(array.scale_bits, array.zero_bits) <= _MOST_BITS and tile % KERNEL_TILE == 0:
        return forms | {
            "scale_codes": unpack_codes(scale_codes, array.scale_bits).T,
            "zero_codes": unpack_codes(zero_codes, array.zero_bits).T,
            "tile_stats": np.repeat(stats, tile // KERNEL_TILE, axis=0),
        }
    on_host = dataclasses.replace(array, scale_codes=scale_codes, zero_codes=zero_codes, tile_stats=stats)
    scale, zero = on_host.statistics()
    return forms | {"scale": scale, "zero": zero}
