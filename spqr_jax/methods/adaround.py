"""AdaRound (Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", arXiv 2004.10568).

Each weight goes to one of its two neighbours on a fixed grid. Which one is a soft choice
h(v) in 0..1, learned together with a term that drives it to 0 or 1 in the end:

    q = clip(⌊w/s + z⌋ + h(v), 0, maxq),  h(v) = clip(σ(v)(ζ-γ) + γ, 0, 1),  ζ = 1.1, γ = -0.1
    min over v of  Σ_r (w_r-ŵ_r) H (w_r-ŵ_r)ᵀ / unit + λ Σ (1 - |2h(v) - 1|^β)

β falls from 20 to 2; in the first fifth of the steps λ is 0. The paper's loss over batches
of activations is, for a layer without an activation function behind it, exactly this sum
with H over all of them, so gradients here are exact and a few hundred larger steps do for
the paper's ten thousand. `unit` is the mean error of a weight rounded to nearest, so that
one λ serves every layer; on random layers any λ from 10 to 100 gives the same to 1%. A row
that gained nothing stays as it was rounded to nearest.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jax import lax

from spqr_jax.array import SpQRArray
from spqr_jax.config import SpQRConfig
from spqr_jax.methods.grid import WeightGrid, adam_step, row_losses, weight_grid, with_codes

ZETA, GAMMA = 1.1, -0.1
LEARNING_RATE = 0.1
LAMBDA = 30.0
_WARM_UP = 0.2  # share of the steps without the term
_BETA = (20.0, 2.0)


def soft_choice(v: jax.Array) -> jax.Array:
    """h(v): how far up, 0..1."""
    return jnp.clip(jax.nn.sigmoid(v) * (ZETA - GAMMA) + GAMMA, 0.0, 1.0)


def choice_of(fraction: jax.Array) -> jax.Array:
    """v with h(v) = fraction, for fractions in 0..1."""
    return -jnp.log((ZETA - GAMMA) / (fraction - GAMMA) - 1.0)


def undecided(v: jax.Array, step: jax.Array, steps: jax.Array) -> jax.Array:
    """Σ (1 - |2h(v) - 1|^β) with this step's β; 0 while warming up."""
    begun = _WARM_UP * steps
    progress = jnp.clip((step - begun) / jnp.maximum(steps - begun, 1.0), 0.0, 1.0)
    beta = _BETA[0] + (_BETA[1] - _BETA[0]) * progress
    away = jnp.clip(jnp.abs(2.0 * soft_choice(v) - 1.0), 1e-6, 1.0)
    return jnp.where(step < begun, 0.0, jnp.sum(1.0 - away**beta))


def solve_adaround(w: jax.Array, h: jax.Array, rounded: SpQRArray, config: SpQRConfig) -> SpQRArray:
    """Learns for each weight of W [out, in] whether to round it up."""
    grid = weight_grid(rounded)
    steps = jnp.float32(config.solver_steps)
    return with_codes(rounded, _learn(w, h, grid._replace(maxq=jnp.float32(grid.maxq)), steps))


@jax.jit
def _learn(w: jax.Array, h: jax.Array, grid: WeightGrid, steps: jax.Array) -> jax.Array:
    place = w / grid.scale + grid.zero
    below = jnp.floor(place)
    nearest = grid.codes(w)
    nearest_losses = row_losses(w - grid.values(nearest), h)
    total = jnp.sum(nearest_losses)
    unit = jnp.where(total > 0, total, 1.0) / w.size

    def loss(v: jax.Array, step: jax.Array) -> jax.Array:
        values = grid.values(jnp.clip(below + soft_choice(v), 0.0, grid.maxq))
        return jnp.sum(row_losses(w - values, h)) / unit + LAMBDA * undecided(v, step, steps)

    optimizer = optax.adam(LEARNING_RATE)

    def body(step: jax.Array, carry: tuple[jax.Array, optax.OptState]) -> tuple[jax.Array, optax.OptState]:
        v, state = carry
        return adam_step(optimizer, jax.grad(loss)(v, step.astype(v.dtype)), state, v)

    v = choice_of(jnp.clip(place - below, 0.0, 1.0))
    v, _ = lax.fori_loop(0, steps.astype(jnp.int32), body, (v, optimizer.init(v)))
    up = (soft_choice(v) >= 0.5).astype(w.dtype)
    learned = jnp.clip(below + up, 0.0, grid.maxq)
    gained = row_losses(w - grid.values(learned), h) < nearest_losses
    return jnp.where(gained[:, None], learned, nearest)
