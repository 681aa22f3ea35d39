"""Which weights to leave out of a group's fit (paper, section 4.2 and algorithm 1).

Letters: w [g, rows]; importance_j = 1/U_jj²; E = Σ_j importance_j (w_j - ŵ_j)².
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from spqr_jax.solver.grid import dequantize, over_columns, range_to_grid, round_to_grid


def leave_one_out_gain(
    w: jax.Array, importance: jax.Array, maxq: jax.Array | float, at_once: bool = False
) -> jax.Array:
    """How much E falls when one weight is left out of the min-max fit and of the sum.

    Leaving a weight out changes a min-max fit only if that weight is the group's
    minimum or maximum. So three fits a row (all, all but the minimum, all but the
    maximum) give the exact answer for each of its g weights.

    Args:
      w: f32 [g, rows].
      importance: f32 [g, rows] or [g, 1]; 0 for padding.
      maxq: largest code, a number or f32 [rows].
      at_once: as `GridSpec` has it.

    Returns:
      f32 [g, rows], the fall of E for each weight.
    """
    low, high = jnp.min(w, axis=0), jnp.max(w, axis=0)
    is_low, is_high = w == low, w == high
    # An end that several weights share stays where it is when one of them is left out.
    alone_low, alone_high = (jnp.sum(at_end, axis=0) == 1 for at_end in (is_low, is_high))
    next_low = jnp.where(alone_low, jnp.min(jnp.where(is_low, jnp.inf, w), axis=0), low)
    next_high = jnp.where(alone_high, jnp.max(jnp.where(is_high, -jnp.inf, w), axis=0), high)

    def error(w: jax.Array, importance: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
        scale, zero = range_to_grid(low, high, maxq)
        return importance * jnp.square(w - dequantize(round_to_grid(w, scale, zero, maxq), scale, zero))

    def total(fit: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        low, high, left_out = fit  # weights equal to `left_out` do not count
        return over_columns(
            lambda w, importance: jnp.where(w == left_out, 0.0, error(w, importance, low, high)),
            w,
            importance,
            at_once=at_once,
        )

    nothing = jnp.full_like(low, jnp.nan)
    fits = (jnp.stack([low, next_low, low]), jnp.stack([high, high, next_high]), jnp.stack([nothing, low, high]))
    everything, without_low, without_high = total(fits) if at_once else jax.lax.map(total, fits)
    gain = error(w, importance, low, high)
    gain = jnp.where(is_high & alone_high, everything - without_high, gain)
    return jnp.where(is_low & alone_low, everything - without_low, gain)


def outlier_threshold(w: jax.Array, u_diagonal: jax.Array, tau: jax.Array) -> jax.Array:
    """T = τ · mean_j( var_i(W_ij) / U_jj² ).

    Args:
      w: [in, out] (transposed, as the solver holds it).
      u_diagonal: [in].
      tau: relative threshold; infinite for no outliers.
    """
    return tau * jnp.mean(jnp.var(w, axis=1, ddof=1 if w.shape[1] > 1 else 0) / jnp.square(u_diagonal))
