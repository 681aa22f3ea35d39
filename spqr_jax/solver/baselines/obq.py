"""Optimal Brain Quantizer (Frantar and Alistarh, "Optimal Brain Compression", arXiv 2208.11580, algorithm 3).

Each row by itself: of the weights not yet rounded, round the one that costs least,
(w_p - round(w_p))² / [H⁻¹]_pp; move the others to make up for it; take p out of H⁻¹.
GPTQ is this with one order for all rows, which is what makes it fast. An error of more
than half a step, a weight that was pushed off its grid, is rounded at once, as the paper does.

Letters: A = H⁻¹ (damped). Taking p out, A ← A - A_:p A_p: / A_pp, would rewrite A for each
weight of each row. Here A stays, and the columns taken out are kept as V with
A_now = A - VᵀV, so a step reads V once and writes one row of it.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spqr_jax.array import SpQRArray
from spqr_jax.config import SpQRConfig
from spqr_jax.solver.baselines.grid import WeightGrid, weight_grid, with_codes
from spqr_jax.solver.hessian import factorize

LARGEST = 1024
"""Inputs that a row may have: it reads half their cube of numbers, so that one layer of 4096 would take a day."""
_STAGES = 4  # V grows in as many steps, so that its empty rows are not read
_AT_ONCE = 4  # rows side by side


def solve_obq(w: jax.Array, h: jax.Array, rounded: SpQRArray, config: SpQRConfig) -> SpQRArray:
    """Rounds W [out, in] greedily; `in` at most `LARGEST`."""
    out, inner = w.shape
    u = factorize(h, config.damping).u
    grid = weight_grid(rounded)
    padding = -out % _AT_ONCE

    def rows(a: jax.Array) -> jax.Array:
        return jnp.pad(a, ((0, padding), (0, 0)), mode="edge").reshape(-1, _AT_ONCE, inner)

    codes = _greedy(u, rows(w), rows(grid.scale), rows(grid.zero), jnp.float32(grid.maxq))
    return with_codes(rounded, codes.reshape(-1, inner)[:out])


@jax.jit
def _greedy(u: jax.Array, w: jax.Array, scale: jax.Array, zero: jax.Array, maxq: jax.Array) -> jax.Array:
    inverse = lax.dot_general(u, u, (((0,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)
    each = jax.vmap(partial(_greedy_row, inverse), in_axes=(0, WeightGrid(0, 0, None)))
    return lax.map(lambda part: each(part[0], WeightGrid(part[1], part[2], maxq)), (w, scale, zero))


def _greedy_row(inverse: jax.Array, w: jax.Array, grid: WeightGrid) -> jax.Array:
    """One row w [in] -> codes [in]."""
    inner = w.shape[0]

    def step(removed: int, k: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        w, codes, diagonal, left, taken = carry
        q = grid.codes(w)
        miss = w - grid.values(q)
        cost = jnp.where(jnp.abs(miss) > 0.5 * jnp.abs(grid.scale), 0.0, jnp.square(miss) / diagonal)
        p = jnp.argmin(jnp.where(left, cost, jnp.inf))
        # Column p of A as it is now. What is taken out already comes to zero there.
        column = inverse[p] - jnp.sum(taken[:removed, p][:, None] * taken[:removed], axis=0)
        column = jnp.where(left, column, 0.0) * lax.rsqrt(diagonal[p])
        w = w - miss[p] * lax.rsqrt(diagonal[p]) * column
        codes = codes.at[p].set(q[p])
        left = left.at[p].set(False)
        diagonal = jnp.where(left, jnp.maximum(diagonal - jnp.square(column), 1e-12), 1.0)
        return w, codes, diagonal, left, taken.at[k].set(column)

    carry = (w, jnp.zeros_like(w), jnp.diagonal(inverse), jnp.ones(inner, bool), jnp.zeros((inner, inner), w.dtype))
    bounds = np.linspace(0, inner, _STAGES + 1).astype(int).tolist()
    for first, last in pairwise(bounds):
        carry = lax.fori_loop(first, last, partial(step, last), carry)
    return carry[1]
