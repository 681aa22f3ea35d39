"""Bit-split and stitching (Wang et al., "Towards Accurate Post-Training Network Quantization via Bit-Split and
Stitching", ICML 2020).

A code is a sign and b-1 bits of magnitude, and each bit is looked at by itself, with the sign:

    ŵ = α Σ_m 2^m t_m,   t_m in {-1, 0, 1},   m = 0..b-2

so ŵ takes 2^b - 1 values around zero. The layer error is minimized by turns: each bit of
all weights by coordinate descent with the others fixed, exactly, then α of each group by
least squares. Stitched together, the bits are one code q = 2^(b-1) - 1 + Σ_m 2^m t_m again.

Letters: E = W - Ŵ [out, in]; G = E H, whose column j over H_jj says how far weight j is
from its best value. A block of columns is gone through with its own part of G; the other
columns' parts follow in one product.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spqr_jax.array import SpQRArray
from spqr_jax.config import SpQRConfig
from spqr_jax.layout import round_up
from spqr_jax.methods.grid import by_weight, damped, with_codes

_BLOCK = 64  # columns whose part of G is kept up to date at each step
_SHRINK = 40  # α is first looked for among max|w| / (2^(b-1) - 1) times 1/40, 2/40, ...


class _Split(NamedTuple):
    """A matrix in bits."""

    alpha: jax.Array  # f32 [out, groups]
    bits: jax.Array  # f32 [b-1, out, in], t_m


def solve_bit_split(w: jax.Array, h: jax.Array, rounded: SpQRArray, config: SpQRConfig) -> SpQRArray:
    """Quantizes W [out, in] bit by bit; of `rounded` only the layout is used."""
    split = _descend(w, damped(h, config.damping), config.bits, rounded.group_size, jnp.int32(config.solver_steps))
    top = 2.0 ** (config.bits - 1) - 1.0
    codes = top + _stitched(split.bits)
    return with_codes(rounded, codes, split.alpha, np.full(split.alpha.shape, top, np.float32))


@jax.jit
def _stitched(bits: jax.Array) -> jax.Array:
    """Σ_m 2^m t_m."""
    return jnp.tensordot(2.0 ** jnp.arange(bits.shape[0], dtype=bits.dtype), bits, axes=1)


def _half(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float16).astype(x.dtype)


@partial(jax.jit, static_argnums=(2, 3))
def _descend(w: jax.Array, h: jax.Array, bits: int, group_size: int, sweeps: jax.Array) -> _Split:
    inner = w.shape[1]
    wide = partial(by_weight, group_size=group_size, inner=inner)
    split = _rounded(w, bits, group_size)

    def sweep(_: jax.Array, split: _Split) -> _Split:
        for m in reversed(range(bits - 1)):
            weight = 2.0**m * wide(split.alpha)
            others = wide(split.alpha) * _stitched(split.bits) - weight * split.bits[m]
            own = _best_bits(w - others, weight, split.bits[m], h)
            split = split._replace(bits=split.bits.at[m].set(own))
        return split._replace(alpha=_best_alpha(w, split, h, group_size))

    return lax.fori_loop(0, sweeps, sweep, split)


def _rounded(w: jax.Array, bits: int, group_size: int) -> _Split:
    """The start: for each group the α whose rounding errors are least in square, and its codes' bits."""
    out, inner = w.shape
    groups = -(-inner // group_size)
    by_group = jnp.pad(w, ((0, 0), (0, groups * group_size - inner))).reshape(out, groups, group_size)
    top = 2.0 ** (bits - 1) - 1.0
    largest = jnp.max(jnp.abs(by_group), axis=2) / top
    largest = jnp.where(largest == 0, 1.0, largest)

    def codes(alpha: jax.Array) -> jax.Array:
        return jnp.clip(jnp.round(by_group / alpha[..., None]), -top, top)

    def error(share: jax.Array) -> jax.Array:
        alpha = _half(share * largest)
        alpha = jnp.where(alpha == 0, 1.0, alpha)
        return jnp.sum(jnp.square(by_group - alpha[..., None] * codes(alpha)), axis=2)

    shares = jnp.arange(1, _SHRINK + 1, dtype=w.dtype) / _SHRINK
    alpha = _half(shares[jnp.argmin(lax.map(error, shares), axis=0)] * largest)
    alpha = jnp.where(alpha == 0, 1.0, alpha)
    q = codes(alpha).reshape(out, -1)[:, :inner]
    magnitude = jnp.abs(q).astype(jnp.int32)
    parts = [((magnitude >> m) & 1).astype(w.dtype) for m in range(bits - 1)]
    return _Split(alpha, jnp.sign(q) * jnp.stack(parts))


def _best_bits(target: jax.Array, weight: jax.Array, bits: jax.Array, h: jax.Array) -> jax.Array:
    """One pass over the columns: t_j ← the best of -1, 0, 1 for Σ (target - weight·t) H (target - weight·t)ᵀ."""
    inner = bits.shape[1]
    padded = round_up(inner, _BLOCK)
    extra = padded - inner
    target, bits = (jnp.pad(a, ((0, 0), (0, extra))) for a in (target, bits))
    weight = jnp.pad(weight, ((0, 0), (0, extra)), constant_values=1.0)
    h = jnp.pad(h, ((0, extra), (0, extra))) + jnp.diag((jnp.arange(padded) >= inner).astype(h.dtype))

    def block(carry: tuple[jax.Array, jax.Array], first: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        gradient, bits = carry  # G [out, padded], t [out, padded]
        h_rows = lax.dynamic_slice_in_dim(h, first, _BLOCK)  # [block, padded]
        h_own = lax.dynamic_slice_in_dim(h_rows, first, _BLOCK, axis=1)
        own, step = (lax.dynamic_slice_in_dim(a, first, _BLOCK, axis=1) for a in (bits, weight))

        def column(j: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            gradient, bits = carry
            now = jnp.clip(jnp.round(bits[:, j] + gradient[:, j] / (h_own[j, j] * step[:, j])), -1.0, 1.0)
            moved = (now - bits[:, j]) * step[:, j]
            return gradient - moved[:, None] * h_own[j], bits.at[:, j].set(now)

        _, now = lax.fori_loop(0, _BLOCK, column, (lax.dynamic_slice_in_dim(gradient, first, _BLOCK, axis=1), own))
        gradient = gradient - ((now - own) * step) @ h_rows
        return (gradient, lax.dynamic_update_slice_in_dim(bits, now, first, axis=1)), None

    start = ((target - weight * bits) @ h, bits)
    (_, bits), _ = lax.scan(block, start, jnp.arange(0, padded, _BLOCK))
    return bits[:, :inner]


def _best_alpha(w: jax.Array, split: _Split, h: jax.Array, group_size: int) -> jax.Array:
    """α by least squares, one group after the other with the rest fixed, rounded to float16."""
    inner = w.shape[1]
    groups = split.alpha.shape[1]
    extra = groups * group_size - inner
    q = jnp.pad(_stitched(split.bits), ((0, 0), (0, extra)))
    h = jnp.pad(h, ((0, extra), (0, extra)))
    error = jnp.pad(w, ((0, 0), (0, extra))) - by_weight(split.alpha, group_size, groups * group_size) * q

    def group(carry: tuple[jax.Array, jax.Array], index: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        gradient, alpha = carry  # E H [out, padded]
        first = index * group_size
        own, own_gradient = (lax.dynamic_slice_in_dim(a, first, group_size, axis=1) for a in (q, gradient))
        h_rows = lax.dynamic_slice_in_dim(h, first, group_size)
        h_own = lax.dynamic_slice_in_dim(h_rows, first, group_size, axis=1)
        curvature = jnp.sum((own @ h_own) * own, axis=1)
        old = alpha[:, index]
        now = old + jnp.sum(own_gradient * own, axis=1) / jnp.where(curvature > 0, curvature, 1.0)
        now = _half(jnp.where((curvature > 0) & (_half(now) > 0), now, old))
        return (gradient - ((now - old)[:, None] * own) @ h_rows, alpha.at[:, index].set(now)), None

    (_, alpha), _ = lax.scan(group, (error @ h, split.alpha), jnp.arange(groups))
    return alpha
