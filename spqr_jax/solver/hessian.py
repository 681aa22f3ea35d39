"""The Hessian of a layer's squared output error, accumulated and factored.

Letters: X [in, tokens]; H = (2/n) X Xᵀ [in, in]; U = upper Cholesky factor of
H⁻¹, so that UᵀU = H⁻¹. The error of a weight row w rounded to ŵ is
½ (w-ŵ)ᵀ H (w-ŵ), and (w_j-ŵ_j)²/U_jj² is what rounding weight j alone costs when
the columns after it may compensate (GPTQ, arXiv 2210.17323, eq. 3).
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spqr_jax.errors import DataError, SpQRError
from spqr_jax.solver.blocked_factor import PANEL, fits_plainly, inverse_of_cholesky

_DAMPING_STEPS = 8  # times that a failed factorization raises the damping tenfold
_LEAST_DAMPING = 1e-6  # where raising starts if none was asked for
_GRAM_PANEL = 256  # about how many columns of a Gram matrix are summed together
_INVERTED_AT_ONCE = 256  # columns of a triangular matrix
_FORM_PANEL = 1024  # the same for a quadratic form, whose product is small beside its compilation
_LARGE_PANEL = 2048  # the same for both on an accelerator: it compiles for each panel


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hessian:
    """Sum over the calibration inputs of one matrix. Start with `empty_hessian`, add with `accumulate_hessian`.

    Attributes:
      gram: X Xᵀ, float32 [in, in], for inputs X [in, tokens]. Only the upper triangle is complete.
      tokens: number of tokens, float32 scalar. All-zero inputs do not count: they are tokens that were routed to
        another expert.
    """

    gram: jax.Array
    tokens: jax.Array

    @property
    def width(self) -> int:
        """Number of inputs."""
        return int(self.gram.shape[-1])

    def matrix(self) -> jax.Array:
        """The Hessian of the squared output error, H = (2/n) X Xᵀ for n tokens (GPTQ, arXiv 2210.17323).

        Returns:
          float32 [in, in], symmetric.
        """
        return mean_square(self.gram, self.tokens)


def empty_hessian(in_features: int) -> Hessian:
    """A Hessian of no tokens.

    Args:
      in_features: number of inputs of the matrix.

    Returns:
      The sum to start `accumulate_hessian` with.
    """
    return Hessian(jnp.zeros((in_features, in_features), jnp.float32), jnp.zeros((), jnp.float32))


@jax.jit
def accumulate_hessian(hessian: Hessian, x: jax.Array) -> Hessian:
    """Adds inputs of a matrix to its Hessian.

    Args:
      hessian: the sum so far; `empty_hessian` at the start.
      x: inputs [..., in], any float type. Products of bfloat16 inputs are exact in float32, and a processor with
        instructions for them takes half the time.

    Returns:
      The new sum, in float32.

    Example:
      >>> hessian = spqr_jax.empty_hessian(32)
      >>> for batch in range(4):
      ...     x = jax.random.normal(jax.random.key(batch), (64, 32))
      ...     hessian = spqr_jax.accumulate_hessian(hessian, x)
      >>> float(hessian.tokens), hessian.matrix().shape
      (256.0, (32, 32))
    """
    x = x.reshape(-1, x.shape[-1])
    x = x if x.dtype == jnp.bfloat16 else x.astype(jnp.float32)
    large = partial(_added, about=_LARGE_PANEL)
    gram = lax.platform_dependent(hessian.gram, x, cpu=partial(_added, about=_GRAM_PANEL), default=large)
    return Hessian(gram, hessian.tokens + jnp.sum(jnp.any(x != 0, axis=1), dtype=jnp.float32))


def _added(gram: jax.Array, x: jax.Array, about: int) -> jax.Array:
    """gram + xᵀ x in panels of about so many columns, each from the diagonal on."""
    for first, end in _panels(x.shape[1], about):
        part = gram_panel(x, first, end)
        gram = lax.dynamic_update_slice(gram, gram[first:end, first:] + part, (first, first))
    return gram


def gram_panel(x: jax.Array, first: int, end: int) -> jax.Array:
    """Rows `first` to `end` of xᵀ x, from column `first` on: x [tokens, in], float32 or bfloat16, summed in float32."""
    panel = x[:, first:end].T
    if x.dtype == jnp.bfloat16:
        # On a CPU, XLA multiplies bfloat16 by its instructions only where the first factor lies as it is read. Without
        # the barriers it multiplies x as it lies, as slowly as float32.
        panel = lax.optimization_barrier(lax.optimization_barrier(x.T)[first:end])
    return lax.dot_general(
        panel,
        x[:, first:],
        (((1,), (0,)), ((), ())),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def accumulate_in_stack(hessians: Hessian, index: jax.Array, x: jax.Array) -> Hessian:
    """Adds inputs to one of several Hessians of one width, without touching the others.

    Args:
      hessians: stacked: gram [n, in, in], tokens [n].
      index: int32 scalar, of the Hessian.
      x: float32 [rows, in]. All-zero rows do not count.
    """
    large = partial(_added_in_stack, about=_LARGE_PANEL)
    small = partial(_added_in_stack, about=_GRAM_PANEL)
    grams = lax.platform_dependent(hessians.gram, index, x, cpu=small, default=large)
    return Hessian(grams, hessians.tokens.at[index].add(jnp.sum(jnp.any(x != 0, axis=1), dtype=jnp.float32)))


def _added_in_stack(grams: jax.Array, index: jax.Array, x: jax.Array, about: int) -> jax.Array:
    """As `_added`, to one matrix of a stack."""
    for first, end in _panels(x.shape[1], about):
        part = lax.dot_general(x[:, first:end], x[:, first:], (((0,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)
        begin = (index, jnp.int32(first), jnp.int32(first))
        before = lax.dynamic_slice(grams, begin, (1, *part.shape))
        grams = lax.dynamic_update_slice(grams, before + part, begin)
    return grams


@jax.jit
def mean_square(gram: jax.Array, tokens: jax.Array) -> jax.Array:
    """(2/n) times the symmetric matrix with this upper triangle."""
    return (jnp.triu(gram) + jnp.triu(gram, 1).T) * (2.0 / jnp.maximum(tokens, 1.0))


def gram_panels(width: int) -> list[tuple[int, int]]:
    """Columns [first, end) of a Gram matrix [width, width] that are summed together on a CPU."""
    return _panels(width, _GRAM_PANEL)


def _panels(width: int, about: int) -> list[tuple[int, int]]:
    """Cuts 0..width into equal parts of about so many: (first, end) of each."""
    step = -(-width // max(1, round(width / about)))
    return [(first, min(first + step, width)) for first in range(0, width, step)]


def quadratic_form(w: jax.Array, h: jax.Array) -> jax.Array:
    """Σ_r w_r H w_rᵀ of f32 [out, in] and a symmetric f32 [in, in]; what is below the diagonal is not read."""
    large = partial(_form, about=_LARGE_PANEL)
    total: jax.Array = lax.platform_dependent(w, h, cpu=partial(_form, about=_FORM_PANEL), default=large)
    return total


def _form(w: jax.Array, h: jax.Array, about: int) -> jax.Array:
    product = partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    total = jnp.zeros((), w.dtype)
    for first, end in _panels(w.shape[1], about):
        panel, rest = w[:, first:end], w[:, end:]
        total += jnp.vdot(product(panel, h[first:end, first:end]), panel, precision=lax.Precision.HIGHEST)
        if rest.shape[1]:
            total += 2 * jnp.vdot(product(panel, h[first:end, end:]), rest, precision=lax.Precision.HIGHEST)
    return total


def damping_shift(diagonal: jax.Array, damping: jax.Array | float) -> jax.Array:
    """What damping adds to the diagonal of H: f32 [in] -> f32 [in].

    A share of its mean; 1 more for an input that calibration never excites.
    """
    return damping * jnp.mean(diagonal) + (diagonal == 0).astype(diagonal.dtype)


class Factor(NamedTuple):
    """What matrices that read one input share: H in the order of visit, factored."""

    perm: np.ndarray | None  # int [in]; None for the identity
    u: jax.Array  # f32 [in, in], upper, UᵀU = H⁻¹ (permuted, damped)
    damping: float  # really used, as a share of the mean diagonal
    shift: jax.Array  # f32 [in], what damping added to the diagonal of H, own order


def falling_order(diagonal: jax.Array, ranges: int = 1) -> jax.Array:
    """Inputs by falling mean square within each of `ranges` equal ranges, range after range: f32 [in] -> int32 [in]."""
    within = jnp.argsort(-diagonal.reshape(ranges, -1), axis=1, stable=True)
    return (within + jnp.arange(ranges)[:, None] * within.shape[1]).reshape(-1)


@partial(jax.jit, static_argnums=(2, 3))
def _damped_factor(
    h: jax.Array, damping: jax.Array, by_size: bool, ranges: int
) -> tuple[jax.Array | None, jax.Array, jax.Array, tuple[jax.Array, jax.Array]]:
    """(perm, U, shift) of `Factor`, and whether H and U are finite.

    A reversed H needs one factorization instead of two and an inverse.

    With J the reversal, J H J = L Lᵀ gives H⁻¹ = (J L⁻¹ J)ᵀ (J L⁻¹ J), and J L⁻¹ J
    is upper triangular.
    """
    diagonal = jnp.diagonal(h)
    shift = damping_shift(diagonal, damping)
    damped = h + jnp.diag(shift)
    perm = falling_order(diagonal, ranges) if by_size else None
    reverse = jnp.arange(h.shape[0])[::-1] if perm is None else perm[::-1]
    rows = jnp.take(damped, reverse, axis=0, mode="clip")
    lower = jnp.linalg.cholesky(jnp.take(rows, reverse, axis=1, mode="clip"))
    inverse = _inverse_of_lower(lower)
    finite = (jnp.all(jnp.isfinite(h)), jnp.all(jnp.isfinite(inverse)))
    return perm, inverse[::-1, ::-1], shift, finite


def _inverse_of_lower(lower: jax.Array) -> jax.Array:
    """L⁻¹ of a lower triangular L by halves: [[A, 0], [C, B]]⁻¹ = [[A⁻¹, 0], [-B⁻¹ C A⁻¹, B⁻¹]].

    Most of the work is products, and they skip most of the zeros: half the time of solving L X = I at once.
    """
    width = len(lower)
    if width <= _INVERTED_AT_ONCE:
        return jax.scipy.linalg.solve_triangular(lower, jnp.eye(width, dtype=lower.dtype), lower=True)
    half, product = width // 2, partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    first, last = _inverse_of_lower(lower[:half, :half]), _inverse_of_lower(lower[half:, half:])
    below = -product(last, product(lower[half:, :half], first))
    return jnp.block([[first, jnp.zeros((half, width - half), lower.dtype)], [below, last]])


def _damped_factor_by_blocks(
    h: jax.Array, damping: jax.Array, by_size: bool, ranges: int, panel: int
) -> tuple[np.ndarray | None, jax.Array, jax.Array, tuple[bool, bool]]:
    """`_damped_factor` through host memory."""
    diagonal = jnp.diagonal(h)
    shift = damping_shift(diagonal, damping)
    perm = np.asarray(falling_order(diagonal, ranges)) if by_size else None
    order = (np.arange(len(diagonal)) if perm is None else perm)[::-1]
    damped = np.array(h)
    np.fill_diagonal(damped, np.asarray(diagonal + shift))
    h_is_finite = bool(np.isfinite(damped).all())
    inverse = inverse_of_cholesky(damped[np.ix_(order, order)], panel)
    return perm, jax.device_put(inverse[::-1, ::-1]), shift, (h_is_finite, bool(np.isfinite(inverse).all()))


def factorize(h: jax.Array, damping: float, by_size: bool = False, ranges: int = 1, panel: int | None = None) -> Factor:
    """Orders and factors H, damping it more if that is what it takes.

    Args:
      h: float32 [in, in], symmetric.
      damping: share of the mean diagonal that is added to the diagonal.
      by_size: visit inputs by falling mean square, not as they are.
      ranges: number of equal ranges of inputs that are ordered each by itself and visited one after the other.
      panel: columns that are factored together, through host memory (`blocked_factor.py`). None: all at once, or
        `blocked_factor.PANEL` where the device's free memory does not hold what that takes.

    Raises:
      DataError: `h` has values that are not finite.
      SpQRError: no damping made `h` positive definite, so it is no Hessian.
    """
    used, h = damping, jnp.asarray(h)
    if panel is None and not fits_plainly(h.shape[0], next(iter(h.devices()))):
        panel = PANEL
    factored = _damped_factor if panel is None else partial(_damped_factor_by_blocks, panel=panel)
    for _ in range(_DAMPING_STEPS):
        perm, u, shift, finite = factored(h, jnp.float32(used), by_size, ranges)
        perm, (h_is_finite, u_is_finite) = jax.device_get((perm, finite))  # the only wait
        if not h_is_finite:
            raise DataError(
                "the Hessian has values that are not finite: activations on the calibration text overflow or are NaN"
            )
        if u_is_finite:
            return Factor(perm, u, used, shift)
        used = max(10 * used, _LEAST_DAMPING)
    raise SpQRError(f"the Hessian is not positive definite even with damping {used:g}; is it symmetric?")
