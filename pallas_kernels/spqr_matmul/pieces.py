"""`Piece`: one matrix in the layout of the `triton` or the `tpu` kernel, and how XLA reads it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.spqr_matmul import lanes, outliers, rows


@dataclasses.dataclass(frozen=True)
class Piece:
    """One matrix of a `Prepared` whose layout is "rows" or "lanes".

    Attributes:
      arrays: codes, statistics, second level: int32, see `rows` and `lanes`.
      sparse: the outliers.
      shape: (out, in).
      bits: of a code.
      group_size: columns a group.
      block: rows of a block, to whole ones of which rows are padded.
      layout: whose arrays these are.
    """

    arrays: tuple[Any, ...]
    sparse: outliers.Outliers
    shape: tuple[int, int]
    bits: int
    group_size: int
    block: int
    layout: str

    @property
    def padded_inner(self) -> int:
        """Columns that the arrays hold."""
        return (rows if self.layout == "rows" else lanes).padded_inner(self.shape[1], self.group_size)


jax.tree_util.register_dataclass(
    Piece, data_fields=["arrays", "sparse"], meta_fields=["shape", "bits", "group_size", "block", "layout"]
)


def pack(
    layout: str,
    *,
    shape: tuple[int, int],
    bits: int,
    group_size: int,
    codes: Any,
    statistics: tuple[Any, ...],
    row_ptr: np.ndarray,
    columns: np.ndarray,
    values: np.ndarray,
) -> Piece:
    """A matrix's canonical parts in this layout; arguments as `Part` and `fragments.pack` have them."""
    block = rows.BLOCK if layout == "rows" else lanes.choose_block(shape[0])
    arrays = _pack(codes, *statistics, layout=layout, shape=shape, bits=bits, group_size=group_size, block=block)
    sparse = outliers.pack(row_ptr, columns, values)
    return Piece(arrays, sparse, shape, bits, group_size, block, layout)


@functools.partial(jax.jit, static_argnames=("layout", "shape", "bits", "group_size", "block"))
def _pack(
    codes: jax.Array,
    scales: jax.Array,
    zeros: jax.Array,
    tiles: jax.Array,
    *,
    layout: str,
    shape: tuple[int, int],
    bits: int,
    group_size: int,
    block: int,
) -> tuple[jax.Array, ...]:
    """The arrays, without rows or groups past the matrix."""
    out, groups = shape[0], -(-shape[1] // group_size)
    arguments = {
        "codes": codes[:out, : groups * group_size // rows.TILE * bits],
        "scales": scales[:out, :groups],
        "zeros": zeros[:out, :groups],
        "tiles": tiles[: -(-out // rows.TILE), :groups],
    }
    if layout == "rows":
        return rows.pack(**arguments, bits=bits, group_size=group_size)
    return lanes.pack(**arguments, bits=bits, group_size=group_size, block=block)


def dense_rows(piece: Piece, first: Any, count: int) -> jax.Array:
    """Some rows without their outliers, in the packed order.

    Args:
      first: a multiple of 16, may be traced.
      count: of rows, a multiple of 16 (of padded rows there are enough).

    Returns:
      float32 [count, in].
    """
    codes, statistics, tiles = piece.arrays
    if piece.layout == "lanes":
        tiles = lanes.second_level(tiles, piece.block)
    module = rows if piece.layout == "rows" else lanes
    dense = module.dequantize(
        lax.dynamic_slice_in_dim(codes, first, count, codes.ndim - 1),
        lax.dynamic_slice_in_dim(statistics, first, count, 1),
        lax.dynamic_slice_in_dim(tiles, first // rows.TILE, count // rows.TILE, 2),
        bits=piece.bits,
        group_size=piece.group_size,
    )
    return dense[:, : piece.shape[1]]


def take_rows(piece: Piece, index: jax.Array) -> jax.Array:
    """Rows with their outliers, float32 [n, in], in the packed order; index int32 [n], inside of the matrix."""

    def take(number: jax.Array) -> jax.Array:
        tile = dense_rows(piece, number // rows.TILE * rows.TILE, rows.TILE)
        dense = lax.dynamic_index_in_dim(tile, number % rows.TILE, keepdims=False)
        return dense + outliers.row(piece.sparse, number, piece.shape[1])

    return lax.map(take, index)


def dense_with_outliers(piece: Piece, first: Any, count: int, dtype: Any) -> jax.Array:
    """Some rows as `dense_rows`, with their outliers: `dtype` [count, in]."""
    dense = dense_rows(piece, first, count).astype(dtype)
    return outliers.add_to(piece.sparse, dense, jnp.asarray(first, jnp.int32))
