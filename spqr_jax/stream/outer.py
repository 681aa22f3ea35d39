"""The weights outside of the blocks, a piece at a time. A matrix of them may stay on disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np

from spqr_jax.models.config import DecoderConfig
from spqr_jax.models.dense import embedding_rows, head_rows, row_pieces
from spqr_jax.models.weights import Outer, Weight
from spqr_jax.quantized import QuantizedMatrix, is_quantized
from spqr_jax.stream.blocks import BlockSource


@runtime_checkable
class StoredMatrix(Protocol):
    """A dense matrix [out, in] on disk, in an `Outer` in place of an array.

    Attributes:
      shape, dtype: of the matrix.
      band: rows that are read together.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    band: int

    def walk(self) -> Iterator[tuple[int, np.ndarray]]:
        """All bands in order, each with its first row. The matrix is verified once the last one was taken."""
        ...

    def rows(self, first: int, count: int) -> np.ndarray:
        """Rows `first`, ..., `first + count - 1`, verified: [count, in]."""
        ...


@dataclasses.dataclass(frozen=True)
class OuterMemory:
    """What the weights outside of the blocks take.

    Attributes:
      held: bytes that an `Outer` holds.
      reading: bytes that are held on top while rows on disk are read.
      head_rows: rows of the output head whose logits are computed at a time.
    """

    held: int
    reading: int
    head_rows: int


@runtime_checkable
class LeanSource(BlockSource, Protocol):
    """A source that can leave large matrices outside of the blocks on disk."""

    def lean_outer(self) -> Outer:
        """As `outer`, with a `StoredMatrix` in place of each large dense matrix."""
        ...

    def outer_memory(self) -> OuterMemory:
        """What `lean_outer` takes; it reads no weights."""
        ...


def outer_memory(source: BlockSource) -> OuterMemory | None:
    """What `lean_outer` takes; None where it holds dense weights."""
    return source.outer_memory() if isinstance(source, LeanSource) else None


def lean_outer(source: BlockSource) -> Outer:
    """The weights outside of the blocks, for `embedded_rows` and `head_piece` only: what can stays on disk."""
    return source.lean_outer() if isinstance(source, LeanSource) else source.outer()


def pieces_of(weights: Sequence[Weight]) -> list[tuple[int, int]]:
    """As `row_pieces`, where matrices may be on disk.

    Returns:
      (first row, number of rows) of each piece: one piece of all rows if no matrix is packed or on disk.
    """
    stored = [weight for weight in weights if isinstance(weight, StoredMatrix)]
    if not stored or any(is_quantized(weight) for weight in weights):
        return row_pieces(weights)
    rows, band = stored[0].shape[0], min(matrix.band for matrix in stored)
    return [(first, min(band, rows - first)) for first in range(0, rows, band)]


def head_piece(config: DecoderConfig, outer: Outer, first: int, count: int, dtype: Any) -> Outer:
    """As `head_rows`, for one of `pieces_of`; the output head may be on disk."""
    head = getattr(outer, config.head_path)
    if not isinstance(head, StoredMatrix):
        return head_rows(config, outer, first, count, dtype)
    read = dataclasses.replace(outer, **{config.head_path: jnp.asarray(head.rows(first, count))})
    return head_rows(config, read, 0, count, dtype)


def embedded_rows(outer: Outer, batches: Sequence[np.ndarray]) -> list[Outer]:
    """As `embedding_rows`; the embedding may be on disk, or NumPy's. Then its rows keep its type."""
    embedding = outer.embed_tokens
    if isinstance(embedding, np.ndarray):
        rows_of = [embedding[np.clip(batch.reshape(-1), 0, len(embedding) - 1)] for batch in batches]
        return [Outer(jnp.asarray(table), None, embed_positions=outer.embed_positions) for table in rows_of]
    if not isinstance(embedding, StoredMatrix):
        return embedding_rows(outer, batches)
    tokens = [batch.reshape(-1) for batch in batches]
    tables = [np.empty((len(ids), embedding.shape[1]), embedding.dtype) for ids in tokens]
    for first, band in embedding.walk():
        for ids, table in zip(tokens, tables, strict=True):
            here = (first <= ids) & (ids < first + len(band))
            table[here] = band[ids[here] - first]
    positions = outer.embed_positions
    positions = positions.to_dense() if isinstance(positions, QuantizedMatrix) else positions
    return [Outer(jnp.asarray(table), None, embed_positions=positions) for table in tables]
