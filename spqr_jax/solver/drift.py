"""Moving a weight, before it is quantized, to make up for inputs that have drifted.

Letters: W [out, in]; x, what W reads once the layers before it are quantized;
x₀, what it read in the dense model; H = (2/n) X Xᵀ; D = (2/n) (X₀-X) Xᵀ. The
weight that gives W X₀ back from X with the least squared error is

    W + W D H⁻¹

(quantization error propagation, arXiv 2504.09629). The text that it is found on
is little: H is damped and only a share of the way is gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from spqr_jax.product_jit import product_jit
from spqr_jax.solver.hessian import damping_shift, gram_panels

_DAMPING = 1.0  # share of the mean diagonal of H; as much as the inputs' own size


def cross_gram(aim: jax.Array, x: jax.Array) -> jax.Array:
    """Σ (aim - x) xᵀ over tokens: activations [..., in] twice -> float32 [in, in]."""
    aim, x = (a.reshape(-1, a.shape[-1]).astype(jnp.float32) for a in (aim, x))
    whole = partial(cross_panel, first=0, end=x.shape[1])
    total: jax.Array = lax.platform_dependent(aim - x, x, cpu=_in_panels, default=whole)
    return total


def _in_panels(miss: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.concatenate([cross_panel(miss, x, *columns) for columns in gram_panels(x.shape[1])])


def cross_panel(miss: jax.Array, x: jax.Array, first: int, end: int) -> jax.Array:
    """Rows `first` to `end` of Σ miss xᵀ: float32 [tokens, in] twice -> [end - first, in].

    The devices of a mesh sum the panels that one CPU sums, for the same numbers.
    """
    return lax.dot_general(miss[:, first:end], x, (((0,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)


@product_jit()
def correct_drift(
    weights: Sequence[jax.Array], h: jax.Array, drift: jax.Array, share: jax.Array | float
) -> list[jax.Array]:
    """Weights that give, from drifted inputs, nearly what the originals gave from the dense model's.

    Args:
      weights: [out_k, in] each, reading one input.
      h: f32 [in, in], H of the drifted inputs.
      drift: f32 [in, in], D.
      share: of the way to go, 0..1.

    Returns:
      f32 [out_k, in] each.
    """
    damped = h + jnp.diag(damping_shift(jnp.diagonal(h), _DAMPING))
    factor = jax.scipy.linalg.cho_factor(damped)
    moved = []
    for w in weights:
        w = w.astype(jnp.float32)
        aside = jnp.matmul(w, drift, precision=lax.Precision.HIGHEST)
        moved.append(w + share * jax.scipy.linalg.cho_solve(factor, aside.T).T)
    return moved
