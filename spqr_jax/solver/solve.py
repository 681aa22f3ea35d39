"""One weight matrix (or several that read the same input) to `SpQRArray`s.

Letters: W [out, in]; H = (2/n) X Xᵀ [in, in]; U with UᵀU = H⁻¹; T = outlier
threshold. The steps are the paper's algorithm 1: order the columns, damp and
factor H, set T, then the loop of `columns.py`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spqr_jax.array import ArrayLayout, SpQRArray, array_layout, pack_array, round_up
from spqr_jax.config import SpQRConfig
from spqr_jax.errors import SpQRError
from spqr_jax.packing import pack_codes
from spqr_jax.solver.columns import ColumnSpec, SolvedColumns, solve_columns
from spqr_jax.solver.grid import GridSpec
from spqr_jax.solver.hessian import Hessian, factorize
from spqr_jax.solver.outliers import outlier_threshold


@dataclasses.dataclass(frozen=True)
class LayerStats:
    """What quantizing one matrix did to it.

    Attributes:
      output_error: ‖(W-Ŵ)X‖/‖WX‖ on the calibration inputs; without a Hessian
        ‖W-Ŵ‖/‖W‖.
      outlier_share: weights kept apart, 0..1.
      ideal_bits, stored_bits: of the array, see `SpQRArray`.
      damping: what was really added to the Hessian, as a share of its mean
        diagonal; more than asked for if the factorization needed it.
    """

    output_error: float
    outlier_share: float
    ideal_bits: float
    stored_bits: float
    damping: float


class Solved(NamedTuple):
    """A quantized matrix, what it dequantizes to (float32 [out, in]), and its figures."""

    array: SpQRArray
    dense: jax.Array
    stats: LayerStats


def quantize_weight(w: jax.Array, hessian: Hessian | jax.Array | None, config: SpQRConfig | None = None) -> SpQRArray:
    """Quantizes one matrix.

    Args:
      w: [out, in], any float type.
      hessian: of its inputs: a `Hessian`, or the matrix H [in, in] itself (any
        positive scale gives the same result); None for round to nearest.
      config: what to do; None for the defaults. Per-layer rules do not apply.

    Raises:
      SpQRError: shapes that do not fit, values that are not finite, or a method
        that needs a Hessian without one.
    """
    return quantize_weights([w], hessian, config or SpQRConfig())[0].array


def quantize_weights(
    weights: Sequence[jax.Array], hessian: Hessian | jax.Array | None, config: SpQRConfig
) -> list[Solved]:
    """Quantizes matrices that read the same input, sharing its factorization.

    As :func:`quantize_weight`, for a list of [out_k, in]; they are stacked along
    their rows and solved as one.
    """
    h = _checked_hessian(weights, hessian, config)
    inner = weights[0].shape[1]
    layouts = [_layout(w, config) for w in weights]
    spec = ColumnSpec(
        GridSpec(config.bits, config.stats_bits, config.stats_group_size, config.fit),
        layouts[0].group_size,
        outliers=config.outliers,
        compensate=config.compensate,
    )
    perm: jax.Array | None = None
    u = u_padded = None
    damping = 0.0
    columns = round_up(layouts[0].padded_in, spec.panel(layouts[0].padded_in))
    if config.compensate:
        assert h is not None
        if config.order == "activation":
            perm = jnp.argsort(-jnp.diagonal(h), stable=True)
        u, damping = factorize(h if perm is None else h[perm][:, perm], config.damping)
        u_padded = _pad_factor(u, columns)
    w_stack, thresholds = _stack(tuple(weights), perm, u, config.outlier_threshold, tuple(layouts), columns)
    valid = jnp.arange(columns) < inner
    solved = solve_columns(w_stack, u_padded, valid, thresholds, spec)
    if not _finite((solved.stats,))[0]:
        raise SpQRError(
            "a group's scale or zero point does not fit float16: the weights are too large "
            f"(largest {float(jnp.max(jnp.abs(w_stack))):g}) or too far from zero; rescale the layer or leave it dense"
        )
    results, first = [], 0
    static = dataclasses.replace(config, rules=(), damping=1.0, outlier_threshold=0.2 if config.outliers else math.inf)
    for w, layout in zip(weights, layouts, strict=True):
        matrix = _cut(solved, jnp.int32(first), w, h, perm, layout, static)
        results.append(_result(matrix, layout, perm, damping, config))
        first += layout.padded_out
    return results


@jax.jit
def _finite(arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    return tuple(jnp.all(jnp.isfinite(array)) for array in arrays)


def _checked_hessian(
    weights: Sequence[jax.Array], hessian: Hessian | jax.Array | None, config: SpQRConfig
) -> jax.Array | None:
    shapes = [tuple(w.shape) for w in weights]
    if any(len(shape) != 2 or 0 in shape for shape in shapes) or len({shape[1] for shape in shapes}) != 1:
        raise SpQRError(f"expected matrices [out, in] with one common `in`, got shapes {shapes}")
    for w, finite in zip(weights, _finite(tuple(weights)), strict=True):
        if not finite:
            raise SpQRError(f"a weight of shape {tuple(w.shape)} has values that are not finite")
    h = hessian.matrix() if isinstance(hessian, Hessian) else hessian
    inner = shapes[0][1]
    if h is None:
        if config.needs_calibration:
            raise SpQRError(
                "this configuration compensates errors and needs a Hessian: pass one (see accumulate_hessian), "
                "or use SpQRConfig.rtn()"
            )
        return None
    if tuple(h.shape) != (inner, inner):
        raise SpQRError(f"the Hessian has shape {tuple(h.shape)}, expected ({inner}, {inner}) for weights {shapes}")
    return jnp.asarray(h, jnp.float32)


def _layout(w: jax.Array, config: SpQRConfig) -> ArrayLayout:
    shape = (int(w.shape[0]), int(w.shape[1]))
    return array_layout(shape, config.group_size, config.stats_group_size if config.quantized_stats else None)


@partial(jax.jit, static_argnums=1)
def _pad_factor(u: jax.Array, columns: int) -> jax.Array:
    """Padding columns are inputs of their own, unrelated to the others."""
    extra = columns - u.shape[0]
    padded = jnp.pad(u, ((0, extra), (0, extra)))
    return padded + jnp.diag((jnp.arange(columns) >= u.shape[0]).astype(u.dtype))


@partial(jax.jit, static_argnums=(4, 5))
def _stack(
    weights: tuple[jax.Array, ...],
    perm: jax.Array | None,
    u: jax.Array | None,
    tau: jax.Array,
    layouts: tuple[ArrayLayout, ...],
    columns: int,
) -> tuple[jax.Array, jax.Array]:
    """Wᵀ of all matrices side by side [columns, Σ padded_out], and T of each row.

    Rows that pad a tile repeat the last row, so that they change no tile's range.
    """
    stacked, thresholds = [], []
    for w, layout in zip(weights, layouts, strict=True):
        w_t = w.astype(jnp.float32).T
        if perm is not None:
            w_t = w_t[perm]
        threshold = jnp.float32(jnp.inf)
        if u is not None:
            threshold = outlier_threshold(w_t, jnp.diagonal(u), tau)
        w_t = jnp.pad(w_t, ((0, 0), (0, layout.padded_out - layout.shape[0])), mode="edge")
        stacked.append(jnp.pad(w_t, ((0, columns - layout.shape[1]), (0, 0))))
        thresholds.append(jnp.broadcast_to(threshold, layout.padded_out))
    return jnp.concatenate(stacked, axis=1), jnp.concatenate(thresholds)


class _Matrix(NamedTuple):
    """One matrix cut out of the stacked result, packed but for its outliers."""

    codes: jax.Array
    scale_codes: jax.Array | None
    zero_codes: jax.Array | None
    tile_stats: jax.Array
    residual: jax.Array | None  # f16 [out, in], permuted columns
    outliers: jax.Array | None  # bool [out, in], permuted columns
    dense: jax.Array  # f32 [out, in]
    output_error: jax.Array  # f32 scalar


@partial(jax.jit, static_argnames=("layout", "config"))
def _cut(
    solved: SolvedColumns,
    first: jax.Array,
    w: jax.Array,
    h: jax.Array | None,
    perm: jax.Array | None,
    layout: ArrayLayout,
    config: SpQRConfig,
) -> _Matrix:
    """Cuts the matrix whose rows start at `first` out of the stacked result and packs it."""
    out, inner = layout.shape

    def rows(part: jax.Array, columns: int, count: int) -> jax.Array:
        return lax.dynamic_slice_in_dim(part[:columns], first, count, axis=1)

    scale_codes = zero_codes = None
    if config.quantized_stats:
        tile = config.stats_group_size
        tiles = lax.dynamic_slice_in_dim(solved.stats, first // tile, layout.padded_out // tile, axis=1)
        scale_codes = pack_codes(rows(solved.scale_codes, layout.groups, layout.padded_out), config.stats_bits)
        zero_codes = pack_codes(rows(solved.zero_codes, layout.groups, layout.padded_out), config.stats_bits)
    else:
        tiles = lax.dynamic_slice_in_dim(solved.stats, first, out, axis=1)
    dense = rows(solved.values, inner, out).T
    if perm is not None:
        dense = dense[:, jnp.argsort(perm)]
    return _Matrix(
        codes=pack_codes(rows(solved.codes, layout.padded_in, out).T, config.bits),
        scale_codes=scale_codes,
        zero_codes=zero_codes,
        tile_stats=jnp.swapaxes(tiles[: layout.groups], 0, 1),
        residual=rows(solved.residual, inner, out).T if config.outliers else None,
        outliers=rows(solved.outliers, inner, out).T if config.outliers else None,
        dense=dense,
        output_error=_relative_error(w.astype(jnp.float32), dense, h),
    )


def _relative_error(w: jax.Array, dense: jax.Array, h: jax.Array | None) -> jax.Array:
    def energy(m: jax.Array) -> jax.Array:
        return jnp.sum(m * m) if h is None else jnp.sum((m @ h) * m)

    total = energy(w)
    return jnp.sqrt(jnp.maximum(energy(w - dense), 0.0) / jnp.where(total > 0, total, 1.0))


def _result(matrix: _Matrix, layout: ArrayLayout, perm: jax.Array | None, damping: float, config: SpQRConfig) -> Solved:
    no_outliers = np.zeros(layout.shape, bool)
    array = pack_array(
        layout,
        codes=matrix.codes,
        scale_codes=matrix.scale_codes,
        zero_codes=matrix.zero_codes,
        tile_stats=matrix.tile_stats,
        residual=no_outliers if matrix.residual is None else np.asarray(matrix.residual),
        outliers=no_outliers if matrix.outliers is None else np.asarray(matrix.outliers),
        perm=None if perm is None else np.asarray(perm),
        bits=config.bits,
        stats_group_size=config.stats_group_size,
        stats_bits=config.stats_bits,
    )
    stats = LayerStats(
        output_error=float(matrix.output_error),
        outlier_share=array.nnz / array.size,
        ideal_bits=array.ideal_bits,
        stored_bits=array.stored_bits,
        damping=damping,
    )
    return Solved(array, matrix.dense, stats)
