"""What several choices of bits and outlier threshold would cost a matrix, without making any of them.

Only some tiles of rows are solved, and all choices at once: rows are independent
of each other outside their tile, and bits and thresholds are data of the loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spqr_jax.config import SpQRConfig
from spqr_jax.solver.columns import RowChoices, SolvedColumns
from spqr_jax.solver.hessian import Hessian
from spqr_jax.solver.outliers import outlier_threshold
from spqr_jax.solver.panels import solve_columns
from spqr_jax.solver.solve import column_spec, factor_hessian, pad_factor, weight_layout


class Trial(NamedTuple):
    """The result for one matrix.

    Attributes:
      loss: f64 [choices], Σ_r weight_r (w_r-ŵ_r) H (w_r-ŵ_r)ᵀ, scaled up to all rows.
      outliers: f64 [choices], share of weights kept apart.
      threshold_scale: T / τ of this matrix.
      held_out: f64 [choices], the loss with another H that nothing was made for; None without one.
    """

    loss: np.ndarray
    outliers: np.ndarray
    threshold_scale: float
    held_out: np.ndarray | None = None


def try_choices(
    weights: Sequence[jax.Array],
    hessian: Hessian,
    row_weights: Sequence[Any],
    choices: Sequence[Sequence[tuple[int, float]]],
    config: SpQRConfig,
    solved_rows: Sequence[int] = (),
    held_out: Hessian | None = None,
) -> list[Trial]:
    """Tries choices on matrices that read one input.

    Args:
      weights: [out_k, in] each.
      hessian: of their input.
      row_weights: f32 [out_k] each, what a row's loss counts.
      choices: for each matrix (bits, T), equally many; T in units of the loss.
      config: everything else; it must compensate errors.
      solved_rows: numbers of rows that matrices of this width are solved in, padded. The trials are padded to the
        smallest that is enough, because a program for it will be there.
      held_out: of the same input on other text, to see the loss there.
    """
    factor = factor_hessian(hessian.matrix(), config)
    layouts = [weight_layout(w, config) for w in weights]
    tile = config.stats_group_size if config.quantized_stats else 16
    spec = column_spec(config, layouts[0].group_size, outliers=True)
    times = len(choices[0])
    rows = [_some_rows(w.shape[0], tile, times) for w in weights]
    flat = [(len(chosen), each) for chosen, own in zip(rows, choices, strict=True) for each in own]
    tried = sum(count for count, _ in flat)
    padded = spec.padded(layouts[0].padded_in, min((rows for rows in solved_rows if rows >= tried), default=tried))
    padding = padded[1] - tried
    thresholds = np.concatenate([np.full(count, t) for count, (_, t) in flat] + [np.full(padding, np.inf)])
    maxq = np.concatenate([np.full(count, 2.0**bits - 1) for count, (bits, _) in flat] + [np.ones(padding)])
    stacked, scales = _stack(tuple(weights), tuple(rows), factor.perm, factor.u, times, padded)
    valid = np.arange(padded[0]) < weights[0].shape[1]
    rows_of = RowChoices(*(jax.device_put(a.astype(np.float32)) for a in (thresholds, maxq)))
    solved = solve_columns(stacked, pad_factor(factor.u, padded[0]), valid, rows_of, spec)
    loss, outliers = (np.asarray(a, np.float64) for a in _by_row(solved, stacked, factor.shift, factor.perm, valid))
    unseen = None
    if held_out is not None:
        unseen = np.asarray(_loss_with(solved, stacked, held_out.matrix(), factor.perm), np.float64)
    trials, first = [], 0
    for w, chosen, row_weight, scale in zip(weights, rows, row_weights, scales, strict=True):
        part = slice(first, first + times * len(chosen))
        first = part.stop
        # As a share of the chosen rows' weight: rows differ in weight more than in loss.
        row_weight = np.asarray(row_weight, np.float64)
        share_of_row = row_weight[chosen] * (row_weight.sum() / row_weight[chosen].sum())
        of_matrix, elsewhere = (
            None if of_rows is None else of_rows[part].reshape(times, -1) @ share_of_row for of_rows in (loss, unseen)
        )
        share = outliers[part].reshape(times, -1).mean(axis=1) / w.shape[1]
        assert of_matrix is not None
        trials.append(Trial(of_matrix, share, float(scale), elsewhere))
    return trials


def _some_rows(out: int, tile: int, times: int) -> np.ndarray:
    """Rows of evenly spread whole tiles; a last row is repeated to fill its tile.

    Tried so many `times`, they are a quarter of all rows. With all of them a plan was no better
    (docs/explanation/quality.md).
    """
    tiles = -(-out // tile)
    picked = np.linspace(0, tiles - 1, max(tiles // (4 * times), 1)).round().astype(int)
    return np.minimum((picked[:, None] * tile + np.arange(tile)).reshape(-1), out - 1)


@partial(jax.jit, static_argnums=(4, 5))
def _stack(
    weights: tuple[jax.Array, ...],
    rows: tuple[np.ndarray, ...],
    perm: np.ndarray | None,
    u: jax.Array,
    times: int,
    padded: tuple[int, int],
) -> tuple[jax.Array, list[jax.Array]]:
    """Wᵀ of some rows of all matrices, repeated for their choices, `padded` [columns, rows]; T / τ of each matrix."""
    stacked, scales = [], []
    for w, chosen in zip(weights, rows, strict=True):
        w_t = w.astype(jnp.float32).T
        if perm is not None:
            w_t = w_t[perm]
        scales.append(outlier_threshold(w_t, jnp.diagonal(u), jnp.float32(1)))
        stacked.append(jnp.tile(w_t[:, chosen], (1, times)))
    together = jnp.concatenate(stacked, axis=1)
    extra = [(0, size - present) for size, present in zip(padded, together.shape, strict=True)]
    return jnp.pad(together, extra), scales


@jax.jit
def _by_row(
    solved: SolvedColumns, w: jax.Array, shift: jax.Array, perm: np.ndarray | None, valid: np.ndarray
) -> tuple[jax.Array, jax.Array]:
    """Loss with the undamped H, and number of outliers, of each row."""
    shift = shift if perm is None else shift[perm]
    shift = jnp.pad(shift, (0, w.shape[0] - shift.shape[0]))
    loss = solved.loss - jnp.sum(jnp.square(w - solved.dequantized()) * shift[:, None], axis=0)
    return jnp.maximum(loss, 0.0), jnp.sum(solved.outliers & valid[:, None], axis=0)


@jax.jit
def _loss_with(solved: SolvedColumns, w: jax.Array, h: jax.Array, perm: np.ndarray | None) -> jax.Array:
    """(w-ŵ) H (w-ŵ)ᵀ of each row, f32 [rows], for an H [in, in] in the inputs' own order."""
    miss = w - solved.dequantized()
    if perm is not None:
        h = h[perm][:, perm]
    inner = h.shape[0]
    product = jnp.matmul(h, miss[:inner], precision=jax.lax.Precision.HIGHEST)
    return jnp.maximum(jnp.sum(product * miss[:inner], axis=0), 0.0)
