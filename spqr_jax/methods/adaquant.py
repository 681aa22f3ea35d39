"""AdaQuant (Hubara et al., "Improving Post Training Neural Quantization: Layer-wise Calibration and Integer
Programming", arXiv 2006.10518, section 3), for weights alone.

    min over V, s, z of  Σ_r (w_r-ŵ_r) H (w_r-ŵ_r)ᵀ,   Ŵ = s (clip(round((W+V)/s + z), 0, maxq) - z)

by Adam; rounding passes gradients straight through. Unlike AdaRound's, a code may move by
more than one step, and scales and zero points move too. Rounding makes the loss jump, so
each row keeps the best it has been at, its statistics rounded to float16.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from spqr_jax.array import SpQRArray
from spqr_jax.config import SpQRConfig
from spqr_jax.methods.grid import WeightGrid, adam_step, by_weight, row_losses, with_codes

_LEARNING_RATES = {"shift": 2e-2, "stretch": 2e-3, "zero": 2e-2}
"""In steps of the grid, in shares of a scale, in steps of the grid."""


class _Learned(NamedTuple):
    """What is learned."""

    shift: Any  # f32 [out, in], V in steps of the first scale
    stretch: Any  # f32 [out, groups], ln(s / first s)
    zero: Any  # f32 [out, groups]


class _Best(NamedTuple):
    """The best of each row so far."""

    loss: jax.Array  # [out]
    codes: jax.Array  # [out, in]
    scale: jax.Array  # [out, groups]
    zero: jax.Array  # [out, groups]


def solve_adaquant(w: jax.Array, h: jax.Array, rounded: SpQRArray, config: SpQRConfig) -> SpQRArray:
    """Learns codes and statistics of W [out, in]."""
    scale, zero = _statistics(rounded)
    maxq = jnp.float32(2**rounded.bits - 1)
    best = _learn(w, h, scale, zero, maxq, jnp.float32(config.solver_steps), rounded.group_size)
    return with_codes(rounded, best.codes, best.scale, best.zero)


def _straight_through(x: jax.Array, rounded: Callable[[jax.Array], jax.Array]) -> jax.Array:
    return x + lax.stop_gradient(rounded(x) - x)


def _falling(rate: float, steps: jax.Array) -> Callable[[Any], jax.Array]:
    """A learning rate that falls to 0 along a cosine; the number of steps is data."""
    return lambda step: 0.5 * rate * (1.0 + jnp.cos(jnp.pi * jnp.minimum(step / steps, 1.0)))


def _half(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float16).astype(x.dtype)


@jax.jit
def _statistics(array: SpQRArray) -> tuple[jax.Array, jax.Array]:
    return array.statistics()


@partial(jax.jit, static_argnums=6)
def _learn(
    w: jax.Array, h: jax.Array, scale: jax.Array, zero: jax.Array, maxq: jax.Array, steps: jax.Array, group_size: int
) -> _Best:
    scale = jnp.where(scale == 0, 1.0, scale)
    inner = w.shape[1]
    wide = partial(by_weight, group_size=group_size, inner=inner)
    first_step = wide(scale)

    def losses(learned: _Learned) -> tuple[jax.Array, _Best]:
        """Their sum, and what the rows have come to."""
        s = _straight_through(scale * jnp.exp(learned.stretch), _half)
        z = _straight_through(learned.zero, _half)
        grid = WeightGrid(wide(s), wide(z), maxq)
        place = (w + learned.shift * first_step) / grid.scale + grid.zero
        codes = jnp.clip(_straight_through(place, jnp.round), 0.0, maxq)
        by_row = row_losses(w - grid.values(codes), h)
        return jnp.sum(by_row) / unit, _Best(by_row, codes, s, z)

    def better(best: _Best, found: _Best) -> _Best:
        improved = found.loss < best.loss

        def chosen(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(improved.reshape(-1, *[1] * (new.ndim - 1)), new, old)

        return _Best(*(chosen(new, old) for new, old in zip(found, best, strict=True)))

    def body(step: jax.Array, carry: tuple[_Learned, optax.OptState, _Best]) -> tuple[_Learned, optax.OptState, _Best]:
        learned, state, best = carry
        gradient, found = jax.grad(losses, has_aux=True)(learned)
        learned, state = adam_step(optimizer, gradient, state, learned)
        return learned, state, better(best, found)

    learned, unit = _Learned(jnp.zeros_like(w), jnp.zeros_like(scale), zero), jnp.float32(1)
    total, start = losses(learned)
    unit = jnp.where(total > 0, total, 1.0) / w.size
    rates = {name: optax.adam(_falling(rate, steps)) for name, rate in _LEARNING_RATES.items()}
    optimizer = optax.multi_transform(rates, _Learned("shift", "stretch", "zero"))
    learned, _, best = lax.fori_loop(0, steps.astype(jnp.int32), body, (learned, optimizer.init(learned), start))
    return better(best, losses(learned)[1])
