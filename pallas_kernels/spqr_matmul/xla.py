"""The same product in plain XLA, from every layout: for many rows of activations, and where no kernel fits.

Some hundred rows of the matrix are dequantized at a time and multiplied, so that a dense
copy of the whole never exists.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.spqr_matmul import fragments, lanes, outliers, rows
from pallas_kernels.spqr_matmul.outliers import TILE_ROWS
from pallas_kernels.spqr_matmul.prepared import Prepared


def multiply(prepared: Prepared, x: jax.Array) -> jax.Array:
    """x W' for x [batch, in] in the packed order; float32 [batch, out]."""
    return _multiply(dataclasses.replace(prepared, order=None, order_key=""), x)  # what no program depends on


@functools.partial(jax.jit, inline=True)  # outside of other programs, one instead of dozens
def _multiply(prepared: Prepared, x: jax.Array) -> jax.Array:
    out = prepared.shape[0]
    whole = out // TILE_ROWS

    def tile(first: jax.Array, count: int) -> jax.Array:
        dense = dequantize(prepared, first, count)
        # a tile is added to in full; past the matrix there is nothing to add
        dense = jnp.pad(dense, ((0, TILE_ROWS - count), (0, 0)))
        dense = outliers.add_to_tile(prepared.sparse, dense, first)[:count].astype(x.dtype)
        return lax.dot_general(x, dense, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)

    pieces = []
    if whole:
        tiles = lax.map(lambda i: tile(i * TILE_ROWS, TILE_ROWS), jnp.arange(whole, dtype=jnp.int32))
        pieces.append(tiles.transpose(1, 0, 2).reshape(x.shape[0], -1))
    if rest := out - whole * TILE_ROWS:
        pieces.append(tile(jnp.int32(whole * TILE_ROWS), rest))
    return jnp.concatenate(pieces, axis=1)


def dequantize(prepared: Prepared, first: jax.Array, count: int) -> jax.Array:
    """The dense part of some rows.

    Args:
      prepared: any layout.
      first: a multiple of 64.
      count: rows; they must be there.

    Returns:
      float32 [count, in], in the packed order.
    """
    form: dict[str, Any] = {"bits": prepared.bits, "group_size": prepared.group_size}
    rounded = -(-count // fragments.ROWS) * fragments.ROWS

    def cut(array: jax.Array, rows_each: int, axis: int) -> jax.Array:
        return lax.dynamic_slice_in_dim(array, first // rows_each, rounded // rows_each, axis)

    if prepared.layout == "fragments":
        dense = fragments.dequantize(*(cut(array, fragments.ROWS, 0) for array in prepared.arrays), **form)
    else:
        codes, statistics, tiles = prepared.arrays
        if prepared.layout == "lanes":
            tiles = lanes.second_level(tiles, prepared.block)
        module = rows if prepared.layout == "rows" else lanes
        dense = module.dequantize(
            cut(codes, 1, codes.ndim - 1), cut(statistics, 1, 1), cut(tiles, rows.TILE, 2), **form
        )
    return dense[:count, : prepared.shape[1]]


def take_rows(prepared: Prepared, index: jax.Array) -> jax.Array:
    """Rows of the matrix with their columns in order, float32 [..., in]; indices are clipped."""
    out, inner = prepared.shape

    def one(i: jax.Array) -> jax.Array:
        tile = dequantize(
            prepared, i // fragments.ROWS * fragments.ROWS, fragments.ROWS if out >= fragments.ROWS else out
        )
        dense = lax.dynamic_index_in_dim(tile, i % fragments.ROWS, keepdims=False)
        return dense + outliers.row(prepared.sparse, i, inner)

    found = lax.map(one, jnp.clip(index.reshape(-1), 0, out - 1).astype(jnp.int32))
    if prepared.order is not None:
        found = jnp.zeros_like(found).at[:, prepared.order].set(found, unique_indices=True)
    return found.reshape(*index.shape, inner)
