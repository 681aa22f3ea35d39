"""Optimal Brain Quantizer (Frantar and Alistarh, "Optimal Brain Compression", arXiv 2208.11580, algorithm 3).

Each row by itself: of the weights not yet rounded, round the one that costs least,
(w_p - round(w_p))² / [H⁻¹]_pp; move the others to make up for it; take p out of H⁻¹.
GPTQ is this with one order for all rows, which is what makes it fast. An error of more
than half a step, a weight that was pushed off its grid, is rounded at once, as the paper does.

Letters: A = H⁻¹ (damped). Taking p out, A ← A - A_:p A_p: / A_pp, would rewrite A for each
weight of each row. Here A stays, and the columns taken out are kept as V with
A_now = A - VᵀV, so a step reads V once and writes one row of it; columns of weights that
are rounded are dropped from time to time.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spqr_jax.array import SpQRArray
from spqr_jax.config import SpQRConfig
from spqr_jax.methods.grid import WeightGrid, weight_grid, with_codes
from spqr_jax.solver.hessian import factorize

LARGEST = 1024
"""Inputs that a row may have: it reads a quarter of their cube of numbers, and one layer of 4096 would take hours."""
_STAGES = 8  # V gains rows and loses the columns of rounded weights in so many steps: it is what takes the time
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


class _Row(NamedTuple):
    """One row, of whose weights m are left at the beginning of a stage."""

    w: jax.Array  # f32 [m], as it is now
    scale: jax.Array  # f32 [m]
    zero: jax.Array  # f32 [m]
    diagonal: jax.Array  # f32 [m], of A as it is now
    taken: jax.Array  # f32 [weights rounded, m], V
    place: jax.Array  # int32 [m], which weight of the row each is


def _greedy_row(inverse: jax.Array, w: jax.Array, grid: WeightGrid) -> jax.Array:
    """One row w [in] -> codes [in]."""
    inner = w.shape[0]
    codes = jnp.zeros_like(w)
    row = _Row(w, grid.scale, grid.zero, jnp.diagonal(inverse), jnp.zeros((0, inner), w.dtype), jnp.arange(inner))
    bounds = np.linspace(0, inner, min(_STAGES, inner) + 1).astype(int).tolist()
    for first, last in pairwise(bounds):
        row = row._replace(taken=jnp.pad(row.taken, ((0, last - first), (0, 0))))
        row, found, left = _stage(inverse, row, grid.maxq, first, last)
        codes = codes.at[row.place].set(jnp.where(left, 0.0, found))
        kept = jnp.argsort(~left, stable=True)[: inner - last]
        row = _Row(*(part[..., kept] for part in row))
    return codes


def _stage(inverse: jax.Array, row: _Row, maxq: jax.Array, first: int, last: int) -> tuple[_Row, jax.Array, jax.Array]:
    """Rounds `last - first` weights: the row after it, their codes [m], and which are left, bool [m]."""
    grid = WeightGrid(row.scale, row.zero, maxq)

    def step(k: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        w, codes, diagonal, left, taken = carry
        q = grid.codes(w)
        miss = w - grid.values(q)
        cost = jnp.where(jnp.abs(miss) > 0.5 * jnp.abs(grid.scale), 0.0, jnp.square(miss) / diagonal)
        p = jnp.argmin(jnp.where(left, cost, jnp.inf))
        # Column p of A as it is now. What is taken out already comes to zero there.
        column = inverse[row.place[p]][row.place] - jnp.sum(taken[:, p][:, None] * taken, axis=0)
        column = jnp.where(left, column, 0.0) * lax.rsqrt(diagonal[p])
        w = w - miss[p] * lax.rsqrt(diagonal[p]) * column
        left = left.at[p].set(False)
        diagonal = jnp.where(left, jnp.maximum(diagonal - jnp.square(column), 1e-12), 1.0)
        return w, codes.at[p].set(q[p]), diagonal, left, taken.at[k].set(column)

    begin = (row.w, jnp.zeros_like(row.w), row.diagonal, jnp.ones(row.w.shape[0], bool), row.taken)
    w, codes, diagonal, left, taken = lax.fori_loop(first, last, step, begin)
    return row._replace(w=w, diagonal=diagonal, taken=taken), codes, left
