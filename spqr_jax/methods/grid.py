"""What the baselines share: a grid fitted beforehand, and codes put on it.

Letters as in the solver: a weight is dequantized as s (q - z), codes q in 0..maxq.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from spqr_jax.array import SpQRArray
from spqr_jax.layout import array_layout
from spqr_jax.packing import pack_codes


class WeightGrid(NamedTuple):
    """The grid of each weight."""

    scale: Any  # f32 [out, in]; never 0
    zero: Any  # f32 [out, in]
    maxq: Any  # largest code

    def codes(self, w: jax.Array) -> jax.Array:
        """The nearest codes, as floats."""
        return jnp.clip(jnp.round(w / self.scale + self.zero), 0.0, self.maxq)

    def values(self, codes: jax.Array) -> jax.Array:
        """What codes stand for."""
        return self.scale * (codes - self.zero)


def weight_grid(array: SpQRArray) -> WeightGrid:
    """The grid of a quantized matrix without a permutation, weight by weight.

    A group whose scale is 0 holds one value, 0; there a scale of 1 and codes that stay at
    the zero point mean the same.
    """
    scale, zero = _by_weight(array)
    return WeightGrid(scale, zero, float(2**array.bits - 1))


@jax.jit
def _by_weight(array: SpQRArray) -> tuple[jax.Array, jax.Array]:
    """Scale, never 0, and zero point of each weight."""
    scale, zero = (by_weight(part, array.group_size, array.shape[1]) for part in array.statistics())
    return jnp.where(scale == 0, 1.0, scale), zero


def by_weight(statistic: jax.Array, group_size: int, inner: int) -> jax.Array:
    """[out, groups] -> [out, in]."""
    return jnp.repeat(statistic, group_size, axis=1)[:, :inner]


@partial(jax.jit, static_argnums=(1, 2))
def _packed(codes: jax.Array, padded_in: int, bits: int) -> jax.Array:
    padded = jnp.pad(codes, ((0, 0), (0, padded_in - codes.shape[1])))
    return pack_codes(padded.astype(jnp.uint8), bits)


@jax.jit
def _stacked_halves(scale: jax.Array, zero: jax.Array | np.ndarray) -> jax.Array:
    return jnp.stack([scale, zero], axis=-1).astype(jnp.float16)


def with_codes(
    array: SpQRArray, codes: jax.Array, scale: jax.Array | None = None, zero: jax.Array | np.ndarray | None = None
) -> SpQRArray:
    """The array with other codes [out, in], and statistics [out, groups] where its own are 16-bit floats."""
    stats_group = array.stats_group_size if array.quantized_stats else None
    layout = array_layout(array.shape, array.group_size, stats_group)
    changes = {"codes": _packed(codes, layout.padded_in, array.bits)}
    if scale is not None and zero is not None:
        changes["tile_stats"] = _stacked_halves(scale, zero)
    return dataclasses.replace(array, **changes)


@jax.jit
def damped(h: jax.Array, damping: jax.Array | float) -> jax.Array:
    """H with a share of its mean diagonal added, and 1 for inputs that calibration never excites."""
    diagonal = jnp.diagonal(h)
    return h + jnp.diag(damping * jnp.mean(diagonal) + (diagonal == 0).astype(h.dtype))


def adam_step(
    optimizer: optax.GradientTransformation, gradient: Any, state: optax.OptState, values: Any
) -> tuple[Any, optax.OptState]:
    """One step of an optimizer; optax multiplies integers by floats, which strict type promotion would refuse."""
    with jax.numpy_dtype_promotion("standard"):
        update, state = optimizer.update(gradient, state, values)
        return optax.apply_updates(values, update), state


@jax.custom_vjp
def row_losses(miss: jax.Array, h: jax.Array) -> jax.Array:
    """(w-ŵ) H (w-ŵ)ᵀ of each row: [out, in], symmetric [in, in] -> [out].

    Its gradient 2 (w-ŵ) H takes no other product than the loss itself; H has none.
    """
    return jnp.sum((miss @ h) * miss, axis=1)


def _row_losses_forward(miss: jax.Array, h: jax.Array) -> tuple[jax.Array, jax.Array]:
    product = miss @ h
    return jnp.sum(product * miss, axis=1), product


row_losses.defvjp(_row_losses_forward, lambda product, g: (2.0 * g[:, None] * product, None))
