"""A block in the form in which it is trained: codes unpacked and fixed, everything continuous a function of θ.

Each trained parameter p is p₀ + size · θ with θ starting at 0 and `size` such that
θ = 1 doubles a scale, moves a zero point by one code, an outlier by their root mean
square, or doubles a gain: one learning rate then fits all.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax  # Adam

from spqr_jax.array import SpQRArray
from spqr_jax.layout import round_up
from spqr_jax.models.config import BlockKind
from spqr_jax.models.decoder import Block
from spqr_jax.packing import unpack_codes
from spqr_jax.quantized import is_quantized

_OUTLIER_STEP = 1024  # outlier lists are padded to multiples of this, so that blocks share programs
_OPTIMIZER = optax.scale_by_adam(b1=0.9, b2=0.95)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FixedParts:
    """What training leaves alone of one weight, unpacked: codes u8 [out, padded in], statistics codes [out, groups]."""

    codes: jax.Array
    scale_codes: jax.Array | None
    zero_codes: jax.Array | None
    perm: jax.Array | None
    rows: jax.Array  # int32 [entries], of the outliers
    cols: jax.Array
    start: dict[str, jax.Array]  # p₀
    size: dict[str, jax.Array]  # what θ = 1 adds to it
    inner: int = dataclasses.field(metadata={"static": True})
    group_size: int = dataclasses.field(metadata={"static": True})
    tile: int = dataclasses.field(metadata={"static": True})


def fixed_parts(array: SpQRArray, entries: int) -> FixedParts:
    """Takes an array apart; its outlier list is padded to `entries`."""
    # Outlier lists differ in length from weight to weight; on the host that costs no compilation.
    extra = (0, entries - array.outlier_cols.shape[0])
    nnz, values = array.nnz, np.asarray(array.outlier_values, np.float32)
    root_mean_square = np.sqrt(np.sum(np.square(values)) / max(nnz, 1))
    rows = np.repeat(np.arange(array.shape[0], dtype=np.int32), np.diff(np.asarray(array.outlier_row_ptr)))
    stats, out = jnp.asarray(array.tile_stats, jnp.float32), array.shape[0]
    scale_codes, zero_codes = array.scale_codes, array.zero_codes
    if scale_codes is not None and zero_codes is not None:
        scale_codes = _unpack(jnp.asarray(scale_codes), array.scale_bits).T[:out]
        zero_codes = _unpack(jnp.asarray(zero_codes), array.zero_bits).T[:out]
    return FixedParts(
        codes=_unpack(jnp.asarray(array.codes), array.bits),
        scale_codes=scale_codes,
        zero_codes=zero_codes,
        perm=None if array.perm is None else jnp.asarray(array.perm, jnp.int32),
        rows=jnp.asarray(np.pad(rows, (0, entries - len(rows)))),
        cols=jnp.asarray(np.pad(np.asarray(array.outlier_cols, np.int32), extra)),
        start={"stats": stats, "outliers": jnp.asarray(np.pad(values, extra))},
        size={
            "stats": _stats_size(stats, scale_codes, zero_codes, array.stats_group_size),
            # 0 where a list is padded: those entries are not there.
            "outliers": jnp.asarray(root_mean_square * (np.arange(entries) < nnz), jnp.float32),
        },
        inner=array.shape[1],
        group_size=array.group_size,
        tile=array.stats_group_size,
    )


_unpack = jax.jit(unpack_codes, static_argnums=1)


@partial(jax.jit, static_argnums=3)
def _stats_size(stats: jax.Array, scale_codes: jax.Array | None, zero_codes: jax.Array | None, tile: int) -> jax.Array:
    """What θ = 1 adds to `stats`: to the statistics [rows, groups, 2] themselves, or to those of tiles [.., .., 4]."""
    if scale_codes is None or zero_codes is None:
        return jnp.stack([jnp.abs(stats[..., 0]), jnp.ones_like(stats[..., 1])], axis=-1)
    ss, sz, zs, zz = jnp.moveaxis(stats, -1, 0)

    def distance(codes: jax.Array, offset: jax.Array) -> jax.Array:
        """Mean |code - offset| in each tile: what a unit of the tile's factor adds to its members."""
        offsets = jnp.repeat(offset, tile, axis=0)[: codes.shape[0]]
        missing = len(offset) * tile - codes.shape[0]  # padding is of whole tiles as well
        away = jnp.pad(jnp.abs(codes.astype(jnp.float32) - offsets), ((0, missing), (0, 0)))
        rows = jnp.clip(codes.shape[0] - tile * jnp.arange(len(offset)), 1, tile).astype(jnp.float32)
        return jnp.maximum(away.reshape(-1, tile, codes.shape[1]).sum(axis=1) / rows[:, None], 1.0)

    far = distance(scale_codes, sz)
    return jnp.stack([jnp.abs(ss), far, 1 / distance(zero_codes, zz), 1 / jnp.maximum(jnp.abs(zs), 1e-2)], axis=-1)


@jax.custom_vjp
def _undo_permutation(w: jax.Array, perm: jax.Array) -> jax.Array:
    return jnp.take(w, jnp.argsort(perm), axis=1)


# The transpose of a permutation is a gather too; JAX would scatter, one column at a time.
_undo_permutation.defvjp(
    lambda w, perm: (_undo_permutation(w, perm), perm), lambda perm, g: (jnp.take(g, perm, axis=1), None)
)


def _values(fixed: FixedParts, theta: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: fixed.start[name] + fixed.size[name] * theta[name] for name in theta}


_values_of = jax.jit(_values)


def dense_weight(fixed: FixedParts, theta: dict[str, jax.Array]) -> jax.Array:
    """The weight [out, in], as `SpQRArray.to_dense`, differentiable in θ."""
    values = _values(fixed, theta)
    stats, out = values["stats"], fixed.codes.shape[0]
    if fixed.scale_codes is None or fixed.zero_codes is None:
        scale, zero = stats[..., 0], stats[..., 1]
    else:
        ss, sz, zs, zz = jnp.moveaxis(jnp.repeat(stats, fixed.tile, axis=0)[:out], -1, 0)
        scale = ss * (fixed.scale_codes.astype(jnp.float32) - sz)
        zero = zs * (fixed.zero_codes.astype(jnp.float32) - zz)
    groups = scale.shape[1]
    codes = fixed.codes[:, : groups * fixed.group_size].astype(jnp.float32).reshape(out, groups, fixed.group_size)
    dense = (scale[..., None] * (codes - zero[..., None])).reshape(out, -1)[:, : fixed.inner]
    dense = dense.at[fixed.rows, fixed.cols].add(values["outliers"], mode="promise_in_bounds")
    return dense if fixed.perm is None else _undo_permutation(dense, fixed.perm)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockForm:
    """A block in training: what is fixed, θ, and the optimizer's state.

    Attributes:
      fixed: name -> `FixedParts`.
      dense: the block's other leaves by name, norm gains among them.
      theta: name -> {"stats", "outliers"}, or for a norm gain its θ [hidden].
      state: of the optimizer.
      kind: of the block.
      gain_offset: what norms add to their gains.
    """

    fixed: dict[str, FixedParts]
    dense: dict[str, jax.Array]
    theta: dict[str, Any]
    state: Any
    kind: BlockKind = dataclasses.field(metadata={"static": True})
    gain_offset: float = dataclasses.field(metadata={"static": True})


def block_form(block: Block, entries: dict[str, int], gain_offset: float = 0.0) -> BlockForm:
    """A quantized block at θ = 0, outlier lists padded to `entries` (see `padded_entries`)."""
    fixed = {n: fixed_parts(leaf, entries[n]) for n, leaf in block.items() if is_quantized(leaf)}
    dense = {n: jnp.asarray(leaf, jnp.float32) for n, leaf in block.items() if n not in fixed}
    theta: dict[str, Any] = {n: jax.tree.map(jnp.zeros_like, one.start) for n, one in fixed.items()}
    theta |= {n: jnp.zeros_like(leaf) for n, leaf in dense.items() if leaf.ndim == 1 and not n.endswith("_bias")}
    return BlockForm(fixed, dense, theta, _start_optimizer(theta), block.kind, gain_offset)


_start_optimizer = jax.jit(_OPTIMIZER.init)


def note_entries(longest: dict[str, int], block: Block) -> None:
    """Adds a block to the length of the longest outlier list of each weight."""
    for name, leaf in block.items():
        if is_quantized(leaf):
            longest[name] = max(longest.get(name, 1), leaf.outlier_cols.shape[0])


def padded_entries(longest: dict[str, int]) -> dict[str, int]:
    """Length to which each weight's outlier list is padded, so that all blocks are of one form."""
    return {name: round_up(length, _OUTLIER_STEP) for name, length in longest.items()}


def _gain(form: BlockForm, name: str, theta: jax.Array) -> jax.Array:
    return form.dense[name] + (form.dense[name] + form.gain_offset) * theta


def to_block(form: BlockForm, theta: dict[str, Any]) -> Block:
    """The block with dense weights, differentiable in θ."""
    leaves = dict(form.dense)
    for name, own in theta.items():
        leaves[name] = dense_weight(form.fixed[name], own) if name in form.fixed else _gain(form, name, own)
    return Block(leaves, form.kind)


def finished(form: BlockForm, block: Block) -> Block:
    """The quantized block with what was trained put back, in its own types."""
    changes: dict[str, Any] = {}
    for name, theta in form.theta.items():
        leaf = getattr(block, name)
        if is_quantized(leaf):
            # Outlier lists differ in length from weight to weight; on the host that costs no compilation.
            values = {kind: np.asarray(each, np.float16) for kind, each in _values_of(form.fixed[name], theta).items()}
            outliers = values["outliers"][: leaf.outlier_cols.shape[0]]
            changes[name] = dataclasses.replace(
                leaf, tile_stats=jax.device_put(values["stats"]), outlier_values=jax.device_put(outliers)
            )
        else:
            changes[name] = _gain(form, name, theta).astype(leaf.dtype)
    return block.replace(changes)


def updated(form: BlockForm, gradient: dict[str, Any], rate: jax.Array) -> BlockForm:
    """The form one step of the optimizer further; `rate` is the learning rate."""
    with jax.numpy_dtype_promotion("standard"):  # optax mixes types
        updates, state = _OPTIMIZER.update(gradient, form.state)
    theta = jax.tree.map(lambda p, step: p - rate * step, form.theta, updates)
    return dataclasses.replace(form, theta=theta, state=state)
