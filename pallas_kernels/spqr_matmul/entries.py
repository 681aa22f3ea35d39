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

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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


def capacity(entries: int) -> int:
    """Length of the array for so many entries: at most 1/16 more, so that few lengths occur."""
    unit = max(1 << max(entries - 1, 1).bit_length() - 5, LEAST_CAPACITY)
    return max(-(-entries // unit) * unit, LEAST_CAPACITY)
