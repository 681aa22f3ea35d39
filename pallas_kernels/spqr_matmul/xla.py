"""The same products in plain XLA, from every layout: for many rows of activations, and where no kernel fits.

The matrix is dequantized to the type of the activations and multiplied once. A matrix of
more than `DENSE_BYTES` is cut into blocks of rows, one after the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.spqr_matmul import entries, fragments, pieces
from pallas_kernels.spqr_matmul.formats import TILE, UNIT, Format
from pallas_kernels.spqr_matmul.prepared import Prepared

DENSE_BYTES = 512 << 20
"""Of a dense copy at most, from the "fragments" layout."""

PIECE_BYTES = 32 << 20
"""The same from the other layouts, which decode to float32 first."""


@dataclasses.dataclass(frozen=True)
class _Section:
    """Rows that are dequantized alike.

    Attributes:
      rows: of the section, padded to whole tiles.
      parts: rows of each part in it.
      most_bytes: of a dense copy; more rows are cut into blocks.
      dense: (first row, count, dtype) -> [count, in], in the packed order; both are multiples of 16.
    """

    rows: int
    parts: tuple[int, ...]
    most_bytes: int
    dense: Callable[[Any, int, Any], jax.Array]


def split(array: jax.Array, parts: Sequence[int], axis: int) -> Iterator[jax.Array]:
    """The rows of each part without their padding."""
    first = 0
    for part in parts:
        yield lax.slice_in_dim(array, first, first + part, axis=axis)
        first += -(-part // TILE) * TILE


def _sections(prepared: Prepared, index: jax.Array) -> list[_Section]:
    if prepared.layout == "fragments":

        def dense(first: Any, count: int, dtype: Any) -> jax.Array:
            weights = _dense_tiles(prepared, index, first // TILE, count // TILE)[:, : prepared.inner].astype(dtype)
            return entries.add_to(weights, prepared.entries[index], prepared.starts[index], first)

        return [_Section(prepared.rows, prepared.parts, DENSE_BYTES, dense)]
    return [_piece_section(piece) for piece in prepared.pieces]


def _piece_section(piece: pieces.Piece) -> _Section:
    out = piece.shape[0]
    return _Section(
        -(-out // TILE) * TILE,
        (out,),
        PIECE_BYTES,
        lambda first, count, dtype: pieces.dense_with_outliers(piece, first, count, dtype),
    )


def multiply(x: jax.Array, prepared: Prepared, index: jax.Array) -> list[jax.Array]:
    """x W' for x [n, in] in the packed order: [n, rows of a part] each, in the type of x."""
    results: list[jax.Array] = []
    for section in _sections(prepared, index):
        results += split(_multiply(x, section), section.parts, axis=1)
    return results


def _multiply(x: jax.Array, section: _Section) -> jax.Array:
    tiles = section.rows // TILE
    blocks = min(-(-section.rows * x.shape[1] * x.dtype.itemsize // section.most_bytes), tiles)
    count = -(-tiles // blocks) * TILE
    blocks = -(-section.rows // count)

    def block(first: Any) -> jax.Array:
        dense = section.dense(first, count, x.dtype)
        return lax.dot_general(x, dense, (((1,), (1,)), ((), ())), preferred_element_type=x.dtype)

    if blocks == 1:
        return block(0)
    # the last block ends with the matrix, and repeats some rows of the one before
    starts = np.minimum(np.arange(blocks) * count, section.rows - count)
    products = lax.map(block, jnp.asarray(starts, jnp.int32))
    whole = products[:-1].swapaxes(0, 1).reshape(x.shape[0], -1)
    return jnp.concatenate([whole, products[-1][:, whole.shape[1] - section.rows :]], axis=1)


def dequantize(prepared: Prepared, index: jax.Array, dtype: Any) -> jax.Array:
    """The matrix with its columns in the original order: [rows of all parts, in]."""
    results: list[jax.Array] = []
    for section in _sections(prepared, index):
        results += split(section.dense(0, section.rows, dtype), section.parts, axis=0)
    return _original_order(jnp.concatenate(results), prepared, index)


def take_rows(prepared: Prepared, rows: jax.Array, index: jax.Array) -> jax.Array:
    """Rows of the matrix, int32 [n] inside of it, with their columns in the original order: float32 [n, in]."""
    firsts = np.concatenate([[0], np.cumsum(prepared.parts)])[:-1]
    if prepared.layout == "fragments":
        padded = np.concatenate([[0], np.cumsum([-(-part // TILE) * TILE for part in prepared.parts])])[:-1]
        for first, shift in zip(firsts[1:], np.diff(padded - firsts), strict=True):
            rows = rows if not shift else rows + jnp.where(rows >= first, int(shift), 0)
        dense = _dense_rows(prepared, index, rows)[:, : prepared.inner]
        dense += entries.rows_of(prepared.entries[index], prepared.starts[index], rows, prepared.inner)
    else:
        dense = jnp.zeros((rows.shape[0], prepared.inner), jnp.float32)
        for first, piece in zip(firsts, prepared.pieces, strict=True):
            inside = (rows >= first) & (rows < first + piece.shape[0])
            taken = pieces.take_rows(piece, jnp.clip(rows - int(first), 0, piece.shape[0] - 1))
            dense = jnp.where(inside[:, None], taken, dense)
    return _original_order(dense, prepared, index)


def _original_order(dense: jax.Array, prepared: Prepared, index: jax.Array) -> jax.Array:
    if prepared.order is None:
        return dense
    places = jnp.arange(prepared.inner, dtype=jnp.int32)
    inverse = jnp.zeros_like(places).at[prepared.order[index]].set(places, unique_indices=True)
    return dense.at[:, inverse].get(mode="promise_in_bounds", unique_indices=True)


def _dense_tiles(prepared: Prepared, index: jax.Array, first: Any, count: int) -> jax.Array:
    """Weights without outliers of `count` tiles from `first` on: float32 [16 * count, 256 * steps]."""

    def weights(words: jax.Array, form: Format) -> jax.Array:
        return fragments.decode(fragments.by_row(words, form), form)

    if prepared.spans is None:
        sizes = (1, count, *prepared.words.shape[2:])
        dense = weights(lax.dynamic_slice(prepared.words, (index, first, 0, 0), sizes)[0], prepared.formats[0])
    else:
        span = lax.dynamic_slice(prepared.spans, (index, first, 0), (1, count, 2))[0]
        dense = _mixed(prepared, span, weights)
    return dense.reshape(TILE * count, -1)


def _dense_rows(prepared: Prepared, index: jax.Array, rows: jax.Array) -> jax.Array:
    """Weights without outliers of some padded rows: float32 [n, 256 * steps]."""
    tiles = rows // TILE

    def weights(words: jax.Array, form: Format) -> jax.Array:
        return fragments.decode(fragments.pick(fragments.by_row(words, form), rows % TILE), form)

    if prepared.spans is None:
        dense = weights(prepared.words.at[index, tiles].get(mode="promise_in_bounds"), prepared.formats[0])
    else:
        dense = _mixed(prepared, prepared.spans[index, tiles], weights)
    return dense.reshape(rows.shape[0], -1)


def _mixed(prepared: Prepared, span: jax.Array, weights: Callable[[jax.Array, Format], jax.Array]) -> jax.Array:
    """Weights of tiles whose formats are known at run time only: of every format those, of which one is taken."""
    units, steps = prepared.words.reshape(-1, UNIT), fragments.num_steps(prepared.inner)
    choices = []
    for form in prepared.formats:
        # past the end of another format's tile there may be nothing: what is read there is not used
        at = span[:, :1] + jnp.arange(steps * form.step_words // UNIT, dtype=jnp.int32)
        words = units.at[at].get(mode="clip").reshape(-1, steps, form.step_words)
        choices.append(weights(words, form))
    return lax.select_n(jnp.broadcast_to(span[:, 1, None, None], choices[0].shape), *choices)
