"""Which weights to leave out of a group's fit (paper, section 4.2 and algorithm 1).

Letters: w [g, rows]; importance_j = 1/U_jj²; E = Σ_j importance_j (w_j - ŵ_j)².
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from spqr_jax.solver.grid import dequantize, range_to_grid, round_to_grid


def leave_one_out_gain(w: jax.Array, importance: jax.Array, maxq: float) -> jax.Array:
    """How much E falls when one weight is left out of the min-max fit and of the sum.

    Leaving a weight out changes a min-max fit only if that weight is the group's
    minimum or maximum. So three fits a row (all, all but the minimum, all but the
    maximum) give the exact answer for each of its g weights.

    Args:
      w: f32 [g, rows].
      importance: f32 [g, rows]; 0 for padding.
      maxq: largest code.

    Returns:
      f32 [g, rows], the fall of E for each weight.
    """
    index = jnp.arange(w.shape[0])[:, None]
    is_min = index == jnp.argmin(w, axis=0)
    is_max = index == jnp.argmax(w, axis=0)
    low, high = jnp.min(w, axis=0), jnp.max(w, axis=0)
    next_low = jnp.min(jnp.where(is_min, jnp.inf, w), axis=0)
    next_high = jnp.max(jnp.where(is_max, -jnp.inf, w), axis=0)

    def errors(low: jax.Array, high: jax.Array) -> jax.Array:
        scale, zero = range_to_grid(low, high, maxq)
        return importance * jnp.square(w - dequantize(round_to_grid(w, scale, zero, maxq), scale, zero))

    all_in = errors(low, high)
    total = jnp.sum(all_in, axis=0)
    without_min = jnp.sum(jnp.where(is_min, 0.0, errors(next_low, high)), axis=0)
    without_max = jnp.sum(jnp.where(is_max, 0.0, errors(low, next_high)), axis=0)
    return jnp.where(is_min, total - without_min, jnp.where(is_max, total - without_max, all_in))


def outlier_threshold(w: jax.Array, u_diagonal: jax.Array, tau: jax.Array) -> jax.Array:
    """T = τ · mean_j( var_i(W_ij) / U_jj² ).

    Args:
      w: [in, out] (transposed, as the solver holds it).
      u_diagonal: [in].
      tau: relative threshold; infinite for no outliers.
    """
    return tau * jnp.mean(jnp.var(w, axis=1, ddof=1 if w.shape[1] > 1 else 0) / jnp.square(u_diagonal))
