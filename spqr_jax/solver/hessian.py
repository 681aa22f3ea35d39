"""The Hessian of a layer's squared output error, accumulated and factored.

Letters: X [in, tokens]; H = (2/n) X Xᵀ [in, in]; U = upper Cholesky factor of
H⁻¹, so that UᵀU = H⁻¹. The error of a weight row w rounded to ŵ is
½ (w-ŵ)ᵀ H (w-ŵ), and (w_j-ŵ_j)²/U_jj² is what rounding weight j alone costs when
the columns after it may compensate (GPTQ, arXiv 2210.17323, eq. 3).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from spqr_jax.errors import DataError, SpQRError

_DAMPING_STEPS = 8  # times that a failed factorization raises the damping tenfold
_LEAST_DAMPING = 1e-6  # where raising starts if none was asked for
_PANEL = 1024  # about how many columns of a symmetric matrix are looked at together


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hessian:
    """Running sum over calibration tokens.

    Attributes:
      gram: X Xᵀ, float32 [in, in].
      tokens: number of tokens in it, float32 scalar.
    """

    gram: jax.Array
    tokens: jax.Array

    def matrix(self) -> jax.Array:
        """H = (2/n) X Xᵀ, float32 [in, in]."""
        return self.gram * (2.0 / jnp.maximum(self.tokens, 1.0))


def empty_hessian(in_features: int) -> Hessian:
    """The sum over no tokens."""
    return Hessian(jnp.zeros((in_features, in_features), jnp.float32), jnp.zeros((), jnp.float32))


@jax.jit
def accumulate_hessian(hessian: Hessian, x: jax.Array) -> Hessian:
    """Adds the inputs of a layer to its Hessian.

    Args:
      hessian: the sum so far, from :func:`empty_hessian`.
      x: activations [..., in], any float type; summed in float32.
    """
    x = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    return Hessian(hessian.gram + _gram(x), hessian.tokens + x.shape[0])


def _panels(width: int) -> list[tuple[int, int]]:
    """Cuts 0..width into equal parts: (first, end) of each."""
    step = -(-width // max(1, round(width / _PANEL)))
    return [(first, min(first + step, width)) for first in range(0, width, step)]


def _gram(x: jax.Array) -> jax.Array:
    """xᵀ x of [tokens, in]: panels from the diagonal on, the rest by symmetry."""
    rows: list[jax.Array] = []
    for first, end in _panels(x.shape[1]):
        found = lax.dot_general(
            x[:, first:end], x[:, first:], (((0,), (0,)), ((), ())), precision=lax.Precision.HIGHEST
        )
        left = [row[:, first:end].T for row in rows]  # by symmetry, what is before the diagonal
        rows.append(jnp.concatenate([*left, found], axis=1))
    return jnp.concatenate(rows, axis=0)


def quadratic_form(w: jax.Array, h: jax.Array) -> jax.Array:
    """Σ_r w_r H w_rᵀ of f32 [out, in] and a symmetric f32 [in, in]; what is below the diagonal is not read."""
    total = jnp.zeros((), w.dtype)
    for first, end in _panels(w.shape[1]):
        panel, rest = w[:, first:end], w[:, end:]
        total += jnp.vdot(panel @ h[first:end, first:end], panel)
        if rest.shape[1]:
            total += 2 * jnp.vdot(panel @ h[first:end, end:], rest)
    return total


def damping_shift(diagonal: jax.Array, damping: jax.Array | float) -> jax.Array:
    """What damping adds to the diagonal of H: f32 [in] -> f32 [in].

    A share of its mean; 1 more for an input that calibration never excites.
    """
    return damping * jnp.mean(diagonal) + (diagonal == 0).astype(diagonal.dtype)


@jax.jit
def _damped_factor(h: jax.Array, damping: jax.Array) -> jax.Array:
    """U of the damped H. A reversed H needs one factorization instead of two and an inverse.

    With J the reversal, J H J = L Lᵀ gives H⁻¹ = (J L⁻¹ J)ᵀ (J L⁻¹ J), and J L⁻¹ J
    is upper triangular.
    """
    shift = damping_shift(jnp.diagonal(h), damping)
    lower = jnp.linalg.cholesky((h + jnp.diag(shift))[::-1, ::-1])
    inverse = jax.scipy.linalg.solve_triangular(lower, jnp.eye(h.shape[0], dtype=h.dtype), lower=True)
    return inverse[::-1, ::-1]


def factorize(h: jax.Array, damping: float) -> tuple[jax.Array, float]:
    """Factors H, damping it more if that is what it takes.

    Args:
      h: float32 [in, in], symmetric.
      damping: share of the mean diagonal that is added to the diagonal.

    Returns:
      U, upper triangular float32 [in, in], and the damping really used.

    Raises:
      DataError: `h` has values that are not finite.
      SpQRError: no damping made `h` positive definite, so it is no Hessian.
    """
    if not bool(jnp.all(jnp.isfinite(h))):
        raise DataError(
            "the Hessian has values that are not finite: the calibration activations overflow or hold NaN; "
            "check the model's weights and the calibration text, or calibrate in float32"
        )
    used = damping
    for _ in range(_DAMPING_STEPS):
        u = _damped_factor(h, jnp.float32(used))
        if bool(jnp.all(jnp.isfinite(u))):
            return u, used
        used = max(10 * used, _LEAST_DAMPING)
    raise SpQRError(f"the Hessian is not positive definite even with damping {used:g}; is it symmetric?")
