"""Matrices that were solved as one, cut out of the result again: whole, or by rows where a mesh has solved them."""

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
from spqr_jax.solver.sparse import OutlierList, outlier_list


class Figures(NamedTuple):
    """What the host reads as soon as matrices are solved."""

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
    loss: jax.Array  # f32 [out], see `SolvedColumns`


@product_jit(static_argnames=("layouts", "has_outliers", "stats_bits", "tile"))
def cut(
    solved: SolvedColumns,
    place: np.ndarray | None,
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
    pieces, first = [], 0
    for layout in layouts:
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
            loss=solved.loss[rows],
        )
        pieces.append(piece)
        first = end
    counts = jnp.sum(solved.outliers[:inner], axis=0, dtype=jnp.int32)
    return pieces, Figures(jnp.all(jnp.isfinite(stats)), counts)


pack = jax.jit(pack_codes, static_argnums=1)
"""Packs codes; apart from the rest, as bits differ from matrix to matrix."""


def listed(piece: Piece, counts: np.ndarray, layout: ArrayLayout) -> OutlierList:
    """The outliers of a matrix; `counts` int32 [padded out], of each of its rows."""
    if piece.residual is None or piece.outliers is None:
        row_ptr = np.zeros(layout.shape[0] + 1, np.int32)
        return OutlierList(row_ptr, np.zeros(0, np.int32), np.zeros(0, np.float16))
    return outlier_list(piece.residual, piece.outliers, counts[: layout.shape[0]])


@product_jit()
def relative_error(
    w: jax.Array, dense: jax.Array, h: jax.Array | None, loss: jax.Array, shift: jax.Array | None
) -> jax.Array:
    """‖(W-Ŵ)X‖/‖WX‖, or ‖W-Ŵ‖/‖W‖ without compensation, of one matrix [out, in].

    The loop's own loss is that of the damped H; taking out what damping added to
    it costs no product with H.
    """
    w = w.astype(jnp.float32)
    miss = jnp.square(w - dense)
    if h is None or shift is None:
        error, total = jnp.sum(miss), jnp.sum(w * w)
    else:
        error, total = jnp.sum(loss) - jnp.sum(miss * shift), quadratic_form(w, h)
    return jnp.sqrt(jnp.maximum(error, 0.0) / jnp.where(total > 0, total, 1.0))
