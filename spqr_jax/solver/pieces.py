"""Matrices that were solved as one, cut out of the result again; with the figures that the host reads."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spqr_jax.layout import ArrayLayout
from spqr_jax.packing import pack_codes, packed_words
from spqr_jax.product_jit import product_jit
from spqr_jax.solver.columns import SolvedColumns
from spqr_jax.solver.hessian import quadratic_form


class Figures(NamedTuple):
    """What the host reads as soon as matrices are solved."""

    output_errors: list[jax.Array]  # f32 scalar of each matrix
    finite: jax.Array  # bool scalar, whether all statistics are
    outliers: jax.Array  # int32 [rows], of each row of all matrices


class Piece(NamedTuple):
    """One matrix cut out of the stacked result, its statistics packed."""

    codes: jax.Array  # u8 [out, padded in], one a weight
    scale_codes: jax.Array | None
    zero_codes: jax.Array | None
    tile_stats: jax.Array
    residual: jax.Array | None  # f16 [out, in], permuted columns
    outliers: jax.Array | None  # bool [out, in], permuted columns
    dense: jax.Array  # f32 [out, in]


@product_jit(static_argnames=("layouts", "has_outliers", "stats_bits", "tile"))
def cut(
    solved: SolvedColumns,
    weights: tuple[jax.Array, ...],
    h: jax.Array | None,
    place: np.ndarray | None,
    shift: jax.Array | None,
    layouts: tuple[ArrayLayout, ...],
    has_outliers: bool,
    stats_bits: int,
    tile: int,
) -> tuple[list[Piece], Figures]:
    """Cuts the stacked result into its matrices."""
    inner, padded_in, groups = layouts[0].shape[1], layouts[0].padded_in, layouts[0].groups
    codes = solved.codes[:padded_in].T
    values = solved.dequantized()[:inner]
    dense = (values if place is None else values[place]).T
    stats = jnp.swapaxes(solved.stats[:groups], 0, 1)  # [rows or tiles, groups, ...]
    second_level = stats_bits < 16
    if second_level:
        both = jnp.stack([solved.scale_codes[:groups], solved.zero_codes[:groups]])
        # Without the barrier, an accelerator compiles a kernel that packs for each matrix.
        scale_codes, zero_codes = lax.optimization_barrier(pack_codes(both, stats_bits))
    pieces, errors, first = [], [], 0
    for w, layout in zip(weights, layouts, strict=True):
        last, end = first + layout.shape[0], first + layout.padded_out

        def words(packed: jax.Array, first: int = first, end: int = end) -> jax.Array:
            return packed[:, packed_words(first, stats_bits) : packed_words(end, stats_bits)]

        rows = slice(first, last)
        piece = Piece(
            codes=codes[rows],
            scale_codes=words(scale_codes) if second_level else None,
            zero_codes=words(zero_codes) if second_level else None,
            tile_stats=stats[first // tile : end // tile] if second_level else stats[rows],
            residual=solved.residual[:inner, rows].T if has_outliers else None,
            outliers=solved.outliers[:inner, rows].T if has_outliers else None,
            dense=dense[rows],
        )
        pieces.append(piece)
        errors.append(_relative_error(w.astype(jnp.float32), dense[rows], h, solved.loss[rows], shift))
        first = end
    counts = jnp.sum(solved.outliers[:inner], axis=0, dtype=jnp.int32)
    return pieces, Figures(errors, jnp.all(jnp.isfinite(stats)), counts)


def _relative_error(
    w: jax.Array, dense: jax.Array, h: jax.Array | None, loss: jax.Array, shift: jax.Array | None
) -> jax.Array:
    """‖(W-Ŵ)X‖/‖WX‖, or ‖W-Ŵ‖/‖W‖ without compensation.

    The loop's own loss is that of the damped H; taking out what damping added to
    it costs no product with H.
    """
    miss = jnp.square(w - dense)
    if h is None or shift is None:
        error, total = jnp.sum(miss), jnp.sum(w * w)
    else:
        error, total = jnp.sum(loss) - jnp.sum(miss * shift), quadratic_form(w, h)
    return jnp.sqrt(jnp.maximum(error, 0.0) / jnp.where(total > 0, total, 1.0))
