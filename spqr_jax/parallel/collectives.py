"""Pieces of weights as weights: their products and rows are those of the whole, put together across devices.

They live inside `jax.shard_map` only, where an axis of the mesh has a name. The
decoder's functions multiply by them as by any weight.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from spqr_jax.models.ready import BlockStack, ReadyDecoder
from spqr_jax.models.weights import Block, Decoder, Outer
from spqr_jax.parallel.plan import VOCABULARY, sums_over_devices
from spqr_jax.products import linear, take_rows
from spqr_jax.quantized import QuantizedMatrix, is_quantized


def _sum(x: jax.Array, axis: str) -> jax.Array:
    """The sum over devices, in float32, in the type of `x`."""
    total: jax.Array = lax.psum(x.astype(jnp.float32), axis)
    return total.astype(x.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class ColumnPiece(QuantizedMatrix):
    """Some columns of W, for the inputs that this device has; products are summed over devices.

    Attributes:
      piece: the columns, a dense or quantized matrix.
      axis: name of the mesh's axis.
    """

    piece: Any
    axis: str = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        """(out, inputs of this device)."""
        out, inner = self.piece.shape[-2:]
        return out, inner

    def at(self, index: jax.Array) -> ColumnPiece:
        """The piece of one layer, where `piece` is a stack; index int32 scalar."""
        if is_quantized(self.piece):
            return ColumnPiece(self.piece.at(index), self.axis)
        return ColumnPiece(lax.dynamic_index_in_dim(self.piece, index, keepdims=False), self.axis)

    def multiply(self, x: jax.Array) -> jax.Array:
        return _sum(linear(self.piece, x), self.axis)

    def to_dense(self, dtype: Any = jnp.float32) -> jax.Array:
        """The columns of this device."""
        dense: jax.Array = self.piece.astype(dtype)
        return dense

    def take_rows(self, index: jax.Array) -> jax.Array:
        """Rows of the columns of this device."""
        return take_rows(self.piece, index)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class VocabularyPiece(QuantizedMatrix):
    """Rows of an embedding or an output head; every device is given the rows or logits of all tokens.

    Attributes:
      piece: the rows, a dense or quantized matrix, with zeros past the vocabulary.
      axis: name of the mesh's axis.
      vocabulary: tokens.
    """

    piece: Any
    axis: str = dataclasses.field(metadata={"static": True})
    vocabulary: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        """(tokens, hidden)."""
        return self.vocabulary, self.piece.shape[1]

    def multiply(self, x: jax.Array) -> jax.Array:
        scores = lax.all_gather(linear(self.piece, x), self.axis, axis=x.ndim - 1, tiled=True)
        return scores[..., : self.vocabulary]

    def to_dense(self, dtype: Any = jnp.float32) -> jax.Array:
        """The rows of this device."""
        dense: jax.Array = self.piece.astype(dtype)
        return dense

    def take_rows(self, index: jax.Array) -> jax.Array:
        count = self.piece.shape[0]
        row = jnp.clip(index, 0, self.vocabulary - 1).astype(jnp.int32) - lax.axis_index(self.axis) * count
        rows = take_rows(self.piece, jnp.clip(row, 0, count - 1))
        here = ((row >= 0) & (row < count))[..., None]
        return _sum(jnp.where(here, rows, jnp.zeros((), rows.dtype)), self.axis)


def with_collectives(local: Decoder | ReadyDecoder, axis: str) -> Any:
    """One device's decoder, its shared weights wrapped so that their results are those of the whole."""
    vocabulary = local.config.vocab_size

    def of_block(block: Block) -> Block:
        return block.replace({name: ColumnPiece(w, axis) for name, w in block.items() if sums_over_devices(name)})

    def of_part(part: Any) -> Any:
        if isinstance(part, BlockStack):
            return dataclasses.replace(part, block=of_block(part.block))
        return of_block(part)

    tables = {name: getattr(local.outer, name) for name in VOCABULARY}
    pieces = {name: VocabularyPiece(w, axis, vocabulary) for name, w in tables.items() if w is not None}
    outer: Outer = dataclasses.replace(local.outer, **pieces)
    if isinstance(local, ReadyDecoder):
        return ReadyDecoder(outer, tuple(map(of_part, local.parts)), local.config)
    return Decoder(outer, tuple(map(of_part, local.layers)), local.config)
