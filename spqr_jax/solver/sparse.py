"""Outliers of a solved matrix as a list: row by row, each with its column and value."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spqr_jax.solver.panels import by_panels

_LARGE = 2**22  # weights from which an accelerator makes the list; fewer reach the host sooner than a program compiles


class OutlierList(NamedTuple):
    """Outliers, sorted by row, then by column. NumPy arrays."""

    row_ptr: np.ndarray  # int32 [out + 1], outliers before each row
    cols: np.ndarray  # integers [nnz]
    values: np.ndarray  # float16 [nnz]


def outlier_list(residual: jax.Array, outliers: jax.Array, counts: np.ndarray) -> OutlierList:
    """Reads the outliers of a matrix.

    Args:
      residual: float16 [out, in], what an outlier adds.
      outliers: bool [out, in], where they are.
      counts: int32 [out], outliers of each row.
    """
    row_ptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    nnz = int(row_ptr[-1])
    if by_panels() and outliers.size >= _LARGE:
        # A power of two: matrices of one shape need one program or two.
        cols, values = jax.device_get(_listed(residual, outliers, row_ptr, 1 << max(nnz - 1, 0).bit_length()))
        return OutlierList(row_ptr, cols[:nnz], values[:nnz])
    rows, cols = np.nonzero(np.asarray(outliers))
    return OutlierList(row_ptr, cols, np.asarray(residual)[rows, cols])


@partial(jax.jit, static_argnums=3)
def _listed(residual: jax.Array, outliers: jax.Array, row_ptr: np.ndarray, length: int) -> tuple[jax.Array, jax.Array]:
    """Columns (int32) and values of the outliers, `length` each; zeros behind the last."""
    in_row = jnp.cumsum(outliers, axis=1, dtype=jnp.int32)  # outliers of its row up to a weight
    place = jnp.where(outliers, jnp.asarray(row_ptr)[:-1, None] + in_row - 1, length)
    cols = jnp.broadcast_to(jnp.arange(outliers.shape[1], dtype=jnp.int32), outliers.shape)

    def placed(entries: jax.Array) -> jax.Array:
        return jnp.zeros(length, entries.dtype).at[place].set(entries, mode="drop", unique_indices=True)

    return placed(cols), placed(residual)
