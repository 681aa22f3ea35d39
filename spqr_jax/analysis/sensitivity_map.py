"""What rounding each weight alone would cost, and maps of it small enough to look at.

Letters: W [out, in]; H = (2/n) X Xᵀ, damped and factored as the solver does, UᵀU = H⁻¹.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from spqr_jax.config import SpQRConfig
from spqr_jax.solver.hessian import Factor
from spqr_jax.solver.solve import quantize_weights


def sensitivity_map(w: jax.Array, factor: Factor, config: SpQRConfig) -> np.ndarray:
    """s_ij = (w_ij - round(w_ij))² / (2 [H⁻¹]_jj), the paper's equation 2.

    That is what rounding this one weight costs once all others have made up for it as
    well as they can. Weights are rounded as the solver sees them: columns in its order,
    scales fitted by `config` over its groups, H damped as it damps it. No error is
    pushed on and none is kept apart.

    Args:
      w: [out, in].
      factor: of its inputs' Hessian, by `config`.
      config: how it would be quantized.

    Returns:
      float32 [out, in], columns in the order of `w`.
    """
    perm = None if factor.perm is None else np.asarray(factor.perm)
    ordered = np.asarray(w, np.float32) if perm is None else np.asarray(w, np.float32)[:, perm]
    plain = dataclasses.replace(
        config, compensate=False, sequential=False, outlier_threshold=float("inf"), order="identity",
        target_bits=None, rules=(), solver="columns", steps=None,
    )  # fmt: skip
    miss = ordered - np.asarray(quantize_weights([jax.device_put(ordered)], None, [plain])[0].dense)
    inverse_diagonal = np.asarray(_inverse_diagonal(factor.u))
    costs = np.square(miss) / (2 * inverse_diagonal)
    if perm is None:
        return costs
    found = np.empty_like(costs)
    found[:, perm] = costs
    return found


@jax.jit
def _inverse_diagonal(u: jax.Array) -> jax.Array:
    """[H⁻¹]_jj of each input, from its factor."""
    return jnp.sum(jnp.square(u), axis=0)


def line_pooled(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """Shrinks a map so that a thin row or column is as bright as it was, and single points are not.

    A cell is the larger of its brightest row's mean and its brightest column's mean. The mean
    alone would lose a line one weight thick, the maximum alone would light every cell up.

    Args:
      values: [out, in], not negative.
      height, width: at most this many cells.

    Returns:
      float32 [≤ height, ≤ width].
    """
    rows, columns = (np.linspace(0, n, min(n, cells) + 1).astype(int)
                     for n, cells in zip(values.shape, (height, width), strict=True))  # fmt: skip
    found = np.empty((len(rows) - 1, len(columns) - 1), np.float32)
    for i in range(len(rows) - 1):
        band = values[rows[i] : rows[i + 1]]
        along_rows = np.add.reduceat(band, columns[:-1], axis=1) / np.diff(columns)  # [rows of the band, width]
        along_columns = np.maximum.reduceat(band.mean(axis=0), columns[:-1])
        found[i] = np.maximum(along_rows.max(axis=0), along_columns)
    return found
