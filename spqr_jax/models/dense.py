"""Quantized weights made dense, one part of a model at a time.

Calibration, evaluation and training multiply many rows at once. There a dense matrix is faster than a packed one.
A whole dense model may not fit into memory, but one dense block does, and so does a piece of the output head.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spqr_jax.array import SpQRArray
from spqr_jax.layout import round_up
from spqr_jax.models.config import DecoderConfig
from spqr_jax.models.weights import Block, Outer, Weight
from spqr_jax.packing import CODES_PER_RUN
from spqr_jax.quantized import QuantizedMatrix, is_quantized

PIECE_WEIGHTS = 2**21
"""Weights of a packed output head or embedding that are dense at a time: 8 MiB in float32."""


def dense_block(block: Block, dtype: Any) -> Block:
    """A block with a dense matrix in place of each `SpQRArray`. Other weights stay as they are.

    Args:
      block: the block, dense or quantized.
      dtype: type of the dequantized matrices. Activations have it, so that a product rounds them no further.
    """
    packed = {name: weight for name, weight in block.items() if is_quantized(weight)}
    return block.replace({name: weight.to_dense(dtype) for name, weight in packed.items()})


# ---- rows of a matrix -------------------------------------------------------------------


def row_pieces(weights: Sequence[Weight]) -> list[tuple[int, int]]:
    """How to make matrices [out, in] of as many rows dense piece by piece.

    Returns:
      (first row, number of rows) of each piece: one piece of all rows if no matrix is packed.
    """
    rows = weights[0].shape[0]
    packed = [weight for weight in weights if isinstance(weight, SpQRArray)]
    if not packed:
        return [(0, rows)]
    step = math.lcm(CODES_PER_RUN, *(weight.stats_group_size for weight in packed))
    count = max(1, PIECE_WEIGHTS // max(weight.shape[1] for weight in weights) // step) * step
    return [(first, min(count, rows - first)) for first in range(0, rows, count)]


def dense_rows(weight: Weight, first: int, count: int, dtype: Any) -> Weight:
    """Rows `first`, ..., `first + count - 1` of a matrix.

    Args:
      weight: [out, in].
      first, count: one of `row_pieces`.
      dtype: of the result for a packed matrix. A dense one keeps its type.

    Returns:
      [count, in].
    """
    if not isinstance(weight, SpQRArray):
        whole = weight.to_dense(dtype) if isinstance(weight, QuantizedMatrix) else weight
        return whole if count == whole.shape[0] else lax.dynamic_slice_in_dim(whole, first, count)
    row_ptr = np.asarray(weight.outlier_row_ptr)
    outliers = max(int(row_ptr[first + count] - row_ptr[first]), 1)
    entries = 1 << (outliers - 1).bit_length()  # few lengths are compiled
    last = first + count == weight.shape[0]
    return _packed_rows(weight, np.int32(first), count, entries, last, np.dtype(dtype))


@partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _packed_rows(array: SpQRArray, first: jax.Array, count: int, entries: int, last: bool, dtype: Any) -> jax.Array:
    """Dense rows of a packed matrix; `entries` are as many as their outliers or more, `last` if no row follows."""

    def part(leaf: jax.Array, rows: int, per: int, axis: int = 0, entries: int = 1) -> jax.Array:
        """So many rows of a leaf that has `entries` entries for each `per` rows."""
        start = first // np.int32(per) * np.int32(entries)
        return lax.dynamic_slice_in_dim(leaf, start, rows // per * entries, axis)

    changes: dict[str, Any] = {"codes": part(array.codes, count, 1), "shape": (count, array.shape[1])}
    if array.quantized_stats:
        padded = round_up(count, math.lcm(array.stats_group_size, CODES_PER_RUN)) if last else count
        changes |= {
            "scale_codes": part(array.scale_codes, padded, CODES_PER_RUN, 1, array.scale_bits),
            "zero_codes": part(array.zero_codes, padded, CODES_PER_RUN, 1, array.zero_bits),
            "tile_stats": part(array.tile_stats, padded, array.stats_group_size),
        }
    else:
        changes["tile_stats"] = part(array.tile_stats, count, 1)
    row_ptr = part(array.outlier_row_ptr, count + 1, 1)
    entry = jnp.arange(entries, dtype=jnp.int32)
    there = entry < row_ptr[-1] - row_ptr[0]
    values = jnp.take(array.outlier_values, row_ptr[0] + entry, mode="clip")
    changes |= {
        "outlier_row_ptr": row_ptr - row_ptr[0],
        "outlier_cols": jnp.take(array.outlier_cols, row_ptr[0] + entry, mode="clip"),
        "outlier_values": jnp.where(there, values, jnp.zeros_like(values)),
    }
    return dataclasses.replace(array, **changes).to_dense(dtype)


# ---- outside of the blocks --------------------------------------------------------------


def embedding_rows(outer: Outer, batches: Sequence[np.ndarray]) -> list[Outer]:
    """What `embed` reads, with a dense row for each token of a text in place of the embedding.

    Args:
      outer: dense or quantized. Rows of a quantized embedding are float32.
      batches: token ids, int32 [batch, seq] each.

    Returns:
      For each batch weights whose embedding has the rows of its tokens, in order: [batch * seq, hidden]. Token ids
      for them are 0, 1, 2, ...
    """
    tokens = [batch.reshape(-1) for batch in batches]
    positions = outer.embed_positions
    positions = positions.to_dense() if isinstance(positions, QuantizedMatrix) else positions
    embedding = outer.embed_tokens
    rows = [np.empty((len(ids), embedding.shape[1]), np.float32) for ids in tokens]
    for first, count in row_pieces([embedding]):
        piece = np.asarray(dense_rows(embedding, first, count, jnp.float32))
        for ids, into in zip(tokens, rows, strict=True):
            here = (first <= ids) & (ids < first + count)
            into[here] = piece[ids[here] - first]
    return [Outer(jnp.asarray(part), None, embed_positions=positions) for part in rows]


def head_rows(config: DecoderConfig, outer: Outer, first: int, count: int, dtype: Any) -> Outer:
    """The weights that `logits` reads, for a piece of the vocabulary: the last norm and dense rows of the output head.

    Args:
      config: the model's.
      outer: dense or quantized.
      first, count: one of `row_pieces`.
      dtype: of the activations.
    """
    norm_only = Outer(None, outer.final_norm, final_norm_bias=outer.final_norm_bias)
    rows = dense_rows(getattr(outer, config.head_path), first, count, dtype)
    return dataclasses.replace(norm_only, **{config.head_path: rows})
