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
from jax.sharding import Mesh

from spqr_jax.array import SpQRArray, pack_array
from spqr_jax.config import SpQRConfig
from spqr_jax.errors import SpQRError
from spqr_jax.layout import ArrayLayout, array_layout, check_input_shards
from spqr_jax.solver import mesh_columns, row_parts, row_pieces
from spqr_jax.solver.columns import ColumnSpec, RowChoices
from spqr_jax.solver.grid import GridSpec
from spqr_jax.solver.hessian import Factor, Hessian, factorize, quadratic_form
from spqr_jax.solver.outliers import outlier_threshold
from spqr_jax.solver.panel_hessian import PanelHessian
from spqr_jax.solver.panels import by_panels, solve_columns
from spqr_jax.solver.pieces import Figures, Piece, cut, listed, pack, relative_error
from spqr_jax.solver.sparse import OutlierList


@dataclasses.dataclass(frozen=True)
class LayerStats:
    """Error and size of one quantized matrix.

    Attributes:
      output_error: relative error of the outputs on the calibration text, ‖(W-Ŵ)X‖ / ‖WX‖. Without a Hessian it is the
        relative error of the weights, ‖W-Ŵ‖ / ‖W‖.
      outlier_share: outliers per weight, 0..1.
      ideal_bits: bits per weight by the paper's formula, see `SpQRArray.ideal_bits`.
      stored_bits: bits per weight in memory, see `SpQRArray.stored_bits`.
      damping: damping that was used, relative to the mean diagonal of the Hessian. It is more than asked for if the
        factorization needed more.
      outlier_threshold: relative threshold that was used; None without outliers.
      tokens: calibration tokens that the matrix read; None where that is not known.
    """

    output_error: float
    outlier_share: float
    ideal_bits: float
    stored_bits: float
    damping: float
    outlier_threshold: float | None
    tokens: int | None = None


class Solved(NamedTuple):
    """A quantized matrix, what it dequantizes to (float32 [out, in]), and its figures."""

    array: SpQRArray
    dense: jax.Array
    stats: LayerStats


def quantize_weights(
    weights: Sequence[jax.Array],
    hessian: Hessian | PanelHessian | jax.Array | None,
    configs: Sequence[SpQRConfig],
    mesh: Mesh | None = None,
) -> list[Solved]:
    """Quantizes matrices that read the same input, sharing its factorization.

    Those that differ in nothing but code bits and outlier threshold are stacked along their rows and solved as one.

    Args:
      weights: [out_k, in] each, any float type.
      hessian: of their input: a `Hessian`, or H [in, in] with any positive scale; None for round-to-nearest.
      configs: how to quantize each; `solver` is ``columns``.
      mesh: of devices that solve the rows together; None for JAX's default device. Every process of it must make the
        same call, and gets the whole result.

    Raises:
      SpQRError: shapes that do not fit, values that are not finite, or a method that needs a Hessian without one.
    """
    h = checked_hessian(weights, hessian, configs)
    if others := [config.solver for config in configs if config.solver != "columns"]:
        raise SpQRError(f"the loop over columns does not do {others[0]}: use spqr_jax.quantize_weight")
    factors: dict[tuple[str, float, int], Factor] = {}
    stacks: dict[SpQRConfig, list[int]] = {}
    for index, config in enumerate(configs):
        stacks.setdefault(_program(config), []).append(index)
    results: dict[int, Solved] = {}
    for config, members in stacks.items():
        factor = None
        if config.compensate:
            assert h is not None
            key = (config.order, config.damping, config.input_shards)
            if key not in factors:
                factors[key] = factor_hessian(h, config)
            factor = factors[key]
        own = [configs[index] for index in members]
        results.update(zip(members, _solve_stack([weights[i] for i in members], h, factor, own, mesh), strict=True))
    return [results[index] for index in range(len(weights))]


def solved_as(w: jax.Array, h: jax.Array, array: SpQRArray, damping: float = 0.0) -> Solved:
    """An array found for W [out, in] in some other way, with its figures."""
    if not np.all(np.isfinite(np.asarray(array.tile_stats))):
        raise SpQRError(f"a scale or zero point learned for a weight of shape {array.shape} does not fit float16")
    dense = array.to_dense()
    stats = LayerStats(
        output_error=float(_whole_error(w, dense, h)),
        outlier_share=array.nnz / array.size,
        ideal_bits=array.ideal_bits,
        stored_bits=array.stored_bits,
        damping=damping,
        outlier_threshold=None,
    )
    return Solved(array, dense, stats)


@jax.jit
def _whole_error(w: jax.Array, dense: jax.Array, h: jax.Array) -> jax.Array:
    """‖(W-Ŵ)X‖/‖WX‖."""
    w = w.astype(jnp.float32)
    total = quadratic_form(w, h)
    return jnp.sqrt(jnp.maximum(quadratic_form(w - dense, h), 0.0) / jnp.where(total > 0, total, 1.0))


def _program(config: SpQRConfig) -> SpQRConfig:
    """The choices that make a program of their own; bits and finite thresholds are data to it."""
    return dataclasses.replace(config, rules=(), bits=8, outlier_threshold=1.0 if config.outliers else math.inf)


def column_spec(config: SpQRConfig, group_size: int, outliers: bool) -> ColumnSpec:
    """The static choices of the loop over columns."""
    grid = GridSpec(config.stats_bits, config.stats_group_size, config.fit, at_once=by_panels())
    return ColumnSpec(grid, group_size, outliers, config.leave_one_out, config.compensate)


def factor_hessian(h: jax.Array, config: SpQRConfig) -> Factor:
    """Orders, damps and factors H [in, in] as `config` says.

    Raises:
      SpQRError: as `factorize`, or `input_shards` cuts a group.
    """
    by_size = config.order == "activation"
    if by_size and config.input_shards > 1:
        check_input_shards(h.shape[0], config.group_size, config.input_shards)
    return factorize(h, config.damping, by_size, config.input_shards if by_size else 1)


def _solve_stack(
    weights: Sequence[jax.Array],
    h: jax.Array | None,
    factor: Factor | None,
    configs: Sequence[SpQRConfig],
    mesh: Mesh | None,
) -> list[Solved]:
    """Solves matrices whose configurations differ in bits and thresholds only."""
    config = configs[0]
    layouts = tuple(weight_layout(w, config) for w in weights)
    spec = column_spec(config, layouts[0].group_size, config.outliers)
    if mesh is not None:
        spec = mesh_columns.spec_for(spec)
    padded = spec.padded(layouts[0].padded_in, sum(layout.padded_out for layout in layouts))
    u = None if factor is None else factor.u
    by_rows = mesh is None and u is None and not spec.grid.at_once and padded[1] > row_parts.ROWS
    if by_rows:
        padded = (padded[0], row_parts.padded_rows(padded[1]))
    perm = None if factor is None else factor.perm
    place = None if perm is None else np.argsort(perm)
    taus, bits = (np.array([getattr(c, n) for c in configs], np.float32) for n in ("outlier_threshold", "bits"))
    stacked = row_pieces.stacked_by(_stack) if by_rows or mesh is not None else _stack
    w_stack, choices, finite = stacked(tuple(weights), perm, u, taus, 2**bits - 1, layouts, padded)
    if u is not None and u.shape[0] < padded[0]:
        u = pad_factor(u, padded[0])
    valid = np.arange(padded[0]) < weights[0].shape[1]
    cutting = row_pieces.Cutting(layouts[0], config.outliers, config.stats_bits, config.stats_group_size, place)
    if mesh is None and not by_rows:
        solved = solve_columns(w_stack, u, valid, choices, spec)
        pieces, figures = cut(solved, place, layouts, config.outliers, config.stats_bits, config.stats_group_size)
        del solved
    else:
        if mesh is None:
            whole, figures = row_parts.round_columns(w_stack, valid, choices, spec, cutting)
        else:
            rows = sum(layout.padded_out for layout in layouts)
            whole, figures = mesh_columns.solve_columns(mesh, w_stack, u, valid, choices, spec, cutting, rows)
        pieces = cutting.split(whole, layouts)
    results = _results(weights, h, factor, configs, w_stack, finite, layouts, pieces, figures)
    if by_rows:
        return [result._replace(array=jax.device_put(result.array)) for result in results]
    return results if mesh is None else [result._replace(array=jax.device_get(result.array)) for result in results]


def _results(
    weights: Sequence[jax.Array],
    h: jax.Array | None,
    factor: Factor | None,
    configs: Sequence[SpQRConfig],
    w_stack: jax.Array,
    finite: jax.Array,
    layouts: Sequence[ArrayLayout],
    pieces: Sequence[Piece],
    figures: Figures,
) -> list[Solved]:
    """Packs solved matrices, and lists their outliers.

    Raises:
      SpQRError: a weight or a group's statistics are not finite.
    """
    codes = [pack(piece.codes, config.bits) for piece, config in zip(pieces, configs, strict=True)]
    shift = None if factor is None else factor.shift
    errors = [relative_error(w, piece.dense, h, piece.loss, shift) for w, piece in zip(weights, pieces, strict=True)]
    finite, figures, errors = jax.device_get((finite, figures, errors))  # the only wait
    for w, fine in zip(weights, finite, strict=True):
        if not fine:
            raise SpQRError(f"a weight of shape {tuple(w.shape)} has values that are not finite")
    if not figures.finite:
        raise SpQRError(
            "a group's scale or zero point does not fit float16: the weights are too large "
            f"(largest {float(abs(w_stack).max()):g}) or too far from zero; rescale the layer or leave it dense"
        )
    counts = np.split(figures.outliers, np.cumsum([layout.padded_out for layout in layouts]))[: len(layouts)]
    lists = list(map(listed, pieces, counts, layouts))
    perm, damping = (None, 0.0) if factor is None else (factor.perm, factor.damping)
    finish = partial(_result, perm=perm, damping=damping)
    return list(map(finish, pieces, codes, errors, lists, layouts, configs))


def checked_hessian(
    weights: Sequence[jax.Array], hessian: Hessian | PanelHessian | jax.Array | None, configs: Sequence[SpQRConfig]
) -> jax.Array | None:
    shapes = [tuple(w.shape) for w in weights]
    if any(len(shape) != 2 or 0 in shape for shape in shapes) or len({shape[1] for shape in shapes}) != 1:
        raise SpQRError(f"expected matrices [out, in] with one common `in`, got shapes {shapes}")
    h = hessian.matrix() if isinstance(hessian, (Hessian, PanelHessian)) else hessian
    inner = shapes[0][1]
    if h is None:
        if any(config.needs_calibration for config in configs):
            raise SpQRError(
                "this configuration compensates errors and needs a Hessian: pass one (see accumulate_hessian), "
                "or use SpQRConfig.rtn()"
            )
        return None
    if tuple(h.shape) != (inner, inner):
        raise SpQRError(f"the Hessian has shape {tuple(h.shape)}, expected ({inner}, {inner}) for weights {shapes}")
    return jnp.asarray(h, jnp.float32)


def weight_layout(w: jax.Array, config: SpQRConfig) -> ArrayLayout:
    """Padded sizes of a weight [out, in]."""
    shape = (int(w.shape[0]), int(w.shape[1]))
    return array_layout(shape, config.group_size, config.stats_group_size if config.quantized_stats else None)


@partial(jax.jit, static_argnums=1)
def pad_factor(u: jax.Array, columns: int) -> jax.Array:
    """Padding columns are inputs of their own, unrelated to the others."""
    extra = columns - u.shape[0]
    if not extra:
        return u
    padded = jnp.pad(u, ((0, extra), (0, extra)))
    return padded + jnp.diag((jnp.arange(columns) >= u.shape[0]).astype(u.dtype))


@partial(jax.jit, static_argnums=(5, 6))
def _stack(
    weights: tuple[jax.Array, ...],
    perm: np.ndarray | None,
    u: jax.Array | None,
    taus: np.ndarray,
    maxqs: np.ndarray,
    layouts: tuple[ArrayLayout, ...],
    padded: tuple[int, int],
) -> tuple[jax.Array, RowChoices, jax.Array]:
    """Wᵀ of all matrices side by side, `padded` [columns, rows], the rows' choices, and which matrices are finite.

    `taus` and `maxqs` are [matrices].

    Rows that pad a tile repeat the last row, so that they change no tile's range; those behind all tiles are zero.
    """
    stacked, thresholds = [], []
    for index, (w, layout) in enumerate(zip(weights, layouts, strict=True)):
        w_t = w.astype(jnp.float32).T
        if perm is not None:
            w_t = w_t[perm]
        threshold = jnp.float32(jnp.inf)
        if u is not None:
            threshold = outlier_threshold(w_t, jnp.diagonal(u), taus[index])
        stacked.append(jnp.pad(w_t, ((0, 0), (0, layout.padded_out - layout.shape[0])), mode="edge"))
        thresholds.append(jnp.full(layout.padded_out, threshold))
    w_t = jnp.concatenate(stacked, axis=1)
    extra = (0, padded[1] - w_t.shape[1])
    largest_codes = [jnp.full(layout.padded_out, maxqs[index]) for index, layout in enumerate(layouts)]
    choices = RowChoices(
        jnp.pad(jnp.concatenate(thresholds), extra, constant_values=jnp.inf),
        jnp.pad(jnp.concatenate(largest_codes), extra, constant_values=1.0),
    )
    finite = jnp.stack([jnp.all(jnp.isfinite(w)) for w in weights])
    return jnp.pad(w_t, ((0, padded[0] - w_t.shape[0]), extra)), choices, finite


def _result(
    matrix: Piece,
    codes: jax.Array,
    output_error: np.ndarray,
    outliers: OutlierList,
    layout: ArrayLayout,
    config: SpQRConfig,
    perm: np.ndarray | None,
    damping: float,
) -> Solved:
    """A solved matrix, with its packed codes, its output error and its outliers."""
    array = pack_array(
        layout,
        codes=codes,
        scale_codes=matrix.scale_codes,
        zero_codes=matrix.zero_codes,
        tile_stats=matrix.tile_stats,
        **outliers._asdict(),
        perm=perm,
        bits=config.bits,
        stats_group_size=config.stats_group_size,
        stats_bits=config.stats_bits,
    )
    stats = LayerStats(
        output_error=float(output_error),
        outlier_share=array.nnz / array.size,
        ideal_bits=array.ideal_bits,
        stored_bits=array.stored_bits,
        damping=damping,
        outlier_threshold=config.outlier_threshold if config.outliers else None,
    )
    return Solved(array, matrix.dense, stats)
