"""The outliers of a stack in the "fragments" layout.

  entries  int32 [count, capacity]: the low 16 bits are the *place* of a packed column, the
           high 16 the float16 value. Sorted by row, then by column.
  starts   int32 [count, 4 * rows + 1], rows padded to whole tiles: the entries of row r in
           quarter q are starts[4 r + q] to starts[4 r + q + 1] - 1.

A *quarter* is ceil(steps / 4) steps: columns q * 256 * ceil(steps / 4) and up. Blocks of a
cluster share the columns so. Behind the last entry follow zeros: place 0, value 0.

The place of column j = 256 step + 16 block + 8 v + 2 c + e is
256 step + 32 (block & 7) + 8 c + 4 (block >> 3) + 2 v + e: where the kernel
keeps that column of x in shared memory, in half-words, for one row of x.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

MAX_COLUMNS = 1 << 16
"""Columns that a place can tell apart."""

QUARTERS = 4
LEAST_CAPACITY = 64


def place(column: Any) -> Any:
    """The place of packed columns (integers, NumPy or JAX)."""
    block, v, c, e = column >> 4 & 15, column >> 3 & 1, column >> 1 & 3, column & 1
    return (column & ~255) | (block & 7) << 5 | c << 3 | (block >> 3) << 2 | v << 1 | e


def column_at(place: Any) -> Any:
    """The packed column at a place: the inverse of :func:`place`."""
    low, c, high, v, e = place >> 5 & 7, place >> 3 & 3, place >> 2 & 1, place >> 1 & 1, place & 1
    return (place & ~255) | high << 7 | low << 4 | v << 3 | c << 1 | e


def quarter_steps(steps: int) -> int:
    """Steps of a quarter."""
    return -(-steps // QUARTERS)


def quarter_columns(columns: int) -> int:
    """Columns of a quarter."""
    return 256 * quarter_steps(-(-columns // 256))


def capacity(entries: int) -> int:
    """Length of the array for so many entries: at most 1/16 more, so that few lengths occur."""
    unit = max(1 << max(int(entries - 1).bit_length() - 5, 0), LEAST_CAPACITY)
    return max(-(-entries // unit) * unit, LEAST_CAPACITY)


def pack(
    row_ptr: np.ndarray, columns: np.ndarray, values: np.ndarray, *, rows: int, inner: int
) -> tuple[np.ndarray, np.ndarray]:
    """The entries of a matrix, on the host.

    Args:
      row_ptr: int [at most rows + 1], outliers before each row.
      columns: integers, at least row_ptr[-1]: packed columns, rising within a row.
      values: float16, as many.
      rows: of the matrix, padded.
      inner: columns of the matrix.

    Returns:
      uint32 [entries], not padded, and int32 [4 * rows + 1].
    """
    counts = np.diff(row_ptr)
    total = int(row_ptr[-1])
    columns = columns[:total].astype(np.int32)
    packed = _places()[columns].astype(np.uint32) | values[:total].view(np.uint16).astype(np.uint32) << 16
    quarters = np.repeat(np.arange(len(counts), dtype=np.int32) * QUARTERS, counts)
    quarters += columns // quarter_columns(inner)
    starts = np.zeros(QUARTERS * rows + 1, np.int32)
    np.cumsum(np.bincount(quarters, minlength=QUARTERS * rows), out=starts[1:])
    return packed, starts


@functools.cache
def _places() -> np.ndarray:
    """The place of every column, uint16."""
    return place(np.arange(MAX_COLUMNS)).astype(np.uint16)


def rows_and_columns(entries: jax.Array, starts: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Where the entries of one matrix belong: int32 [capacity] rows and columns, float32 values.

    The rows of padding entries are different numbers, all past the last row.
    """
    number = jnp.arange(entries.shape[0], dtype=jnp.int32)
    edges = starts[::QUARTERS]
    row = jnp.searchsorted(edges, number, side="right", method="scan").astype(jnp.int32) - 1
    row = jnp.where(number < edges[-1], row, edges.shape[0] + number)
    return row, column_at(entries & 0xFFFF), _values(entries)


def add_to(dense: jax.Array, entries: jax.Array, starts: jax.Array, first: Any = 0) -> jax.Array:
    """Adds the outliers of one matrix to some of its rows.

    Args:
      dense: [some rows, columns], in the packed order.
      entries, starts: int32 [capacity], [4 * rows + 1].
      first: the matrix's row that is row 0 of `dense`.
    """
    row, column, values = rows_and_columns(entries, starts)
    row -= first
    row = jnp.where(row < 0, row + jnp.iinfo(jnp.int32).max // 2, row)  # negative ones would count from the end
    return dense.at[row, column].add(values.astype(dense.dtype), mode="drop", unique_indices=True)


def rows_of(entries: jax.Array, starts: jax.Array, rows: jax.Array, columns: int) -> jax.Array:
    """The outliers of some rows of one matrix, zeros elsewhere.

    A binary search finds each column among its row's entries. So the number of outliers of
    a row need not be known when the program is compiled.

    Args:
      entries, starts: int32 [capacity], [4 * rows + 1].
      rows: int32 [n], inside of the matrix.
      columns: of the result.

    Returns:
      float32 [n, columns], in the packed order.
    """
    wanted = jnp.arange(columns, dtype=jnp.int32)
    low = jnp.broadcast_to(starts[QUARTERS * rows][:, None], (rows.shape[0], columns))
    end = starts[QUARTERS * (rows + 1)][:, None]
    high = jnp.broadcast_to(end, low.shape)
    for _ in range(columns.bit_length()):
        middle = (low + high) >> 1
        below = (middle < high) & (column_at(_take(entries, middle) & 0xFFFF) < wanted)
        low, high = jnp.where(below, middle + 1, low), jnp.where(below, high, middle)
    word = _take(entries, low)
    return jnp.where((low < end) & (column_at(word & 0xFFFF) == wanted), _values(word), 0.0)


def _take(entries: jax.Array, index: jax.Array) -> jax.Array:
    return entries.at[jnp.minimum(index, entries.shape[0] - 1)].get(mode="promise_in_bounds")


def _values(entries: jax.Array) -> jax.Array:
    """The float16 of each entry, as float32."""
    halves = lax.shift_right_logical(entries, 16).astype(jnp.uint16)
    return lax.bitcast_convert_type(halves, jnp.float16).astype(jnp.float32)
