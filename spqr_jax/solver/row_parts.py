"""A large matrix that is rounded to nearest on a CPU: some rows at a time, so that the loop's arrays are small."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from spqr_jax.layout import round_up
from spqr_jax.solver import columns
from spqr_jax.solver.columns import ColumnSpec, RowChoices
from spqr_jax.solver.pieces import Figures, Piece
from spqr_jax.solver.row_pieces import Cutting, joined

ROWS = 4096  # that are rounded together, whole tiles


def padded_rows(rows: int) -> int:
    """Rows with padding, so that all parts have one shape."""
    return round_up(rows, ROWS)


def round_columns(
    w: np.ndarray, valid: np.ndarray, choices: RowChoices, spec: ColumnSpec, cutting: Cutting
) -> tuple[Piece, Figures]:
    """`columns.solve_columns` without a Hessian, and `pieces.cut`.

    Args:
      w: f32 [in, rows] in host memory, `rows` as `padded_rows` gives them.
      valid, choices, spec: as `columns.solve_columns` takes them.
      cutting: how results become pieces.

    Returns:
      All rows, in host memory.
    """
    parts = []
    for first in range(0, w.shape[1], ROWS):
        rows = slice(first, first + ROWS)
        of_rows = RowChoices(*(choice[rows] for choice in choices))
        solved = columns.solve_columns(jnp.asarray(w[:, rows]), None, valid, of_rows, spec)
        parts.append(cutting.first(cutting.cut(solved, ROWS), ROWS))
    return joined(parts)
