"""Outliers by rows: one fused gather for all of them, balanced however much rows differ.

A row's entries are cut into chunks of four, the last filled up with zeros. The first pass
makes one sum a chunk; each further pass adds up to `FAN` sums of a row, until a row has
no more than that, and the last adds what is left. Almost always there is no further pass;
a row with 65536 outliers needs two. No atomics, so results do not change from run to run.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.spqr_matmul.entries import capacity

CHUNK = 4
"""Entries a chunk: of 1% of 4096 inputs, filling up adds 4%."""

FAN = 32
"""Sums that one further pass adds up."""


@dataclasses.dataclass(frozen=True)
class Outliers:
    """The sparse part of a matrix.

    Attributes:
      columns: uint16 (int32 above 65536 inputs) [4, chunks], in the packed order.
      values: float16 [4, chunks].
      merges: int32 [32, sums] each: which sums of the pass before go into one of this;
        their number stands for none.
      starts: int32 [out + 1], the first sum of each row after the last pass.
      chunk_starts: the same of the first pass; None if there is no further one.
      widest: sums that a row has at most after the last pass, rounded up to a power of two.
      row_chunks: chunks that a row has at most, rounded up to a power of two.

    The programs depend on `widest`, `row_chunks` and the number of passes. Rounded, they are
    the same for most matrices of a model.
    """

    columns: Any
    values: Any
    merges: tuple[Any, ...]
    starts: Any
    chunk_starts: Any
    widest: int
    row_chunks: int

    @property
    def first_chunks(self) -> Any:
        """int32 [out + 1], the first chunk of each row."""
        return self.starts if self.chunk_starts is None else self.chunk_starts


jax.tree_util.register_dataclass(
    Outliers,
    data_fields=["columns", "values", "merges", "starts", "chunk_starts"],
    meta_fields=["widest", "row_chunks"],
)


def pack(row_ptr: np.ndarray, columns: np.ndarray, values: np.ndarray) -> Outliers:
    """From entries sorted by row.

    Args:
      row_ptr: int [out + 1].
      columns: unsigned integers, at least row_ptr[-1].
      values: float16, as many.
    """
    row_ptr = np.asarray(row_ptr).astype(np.int64)
    counts = np.diff(row_ptr)
    chunks = -(-counts // CHUNK)
    starts = np.concatenate([[0], np.cumsum(chunks)])
    rows = np.repeat(np.arange(len(counts)), counts)
    place = CHUNK * starts[rows] + np.arange(row_ptr[-1]) - row_ptr[rows]
    total = capacity(int(starts[-1]))  # few sizes, so that matrices share programs
    packed_columns = np.zeros(CHUNK * total, np.asarray(columns).dtype)
    packed_values = np.zeros(CHUNK * total, np.float16)
    packed_columns[place] = np.asarray(columns)[: row_ptr[-1]]
    packed_values[place] = np.asarray(values)[: row_ptr[-1]]
    chunk_starts, merges = starts, []
    while np.diff(starts).max(initial=0) > FAN:
        merge, starts = _merge(starts)
        merges.append(merge.astype(np.int32))
    packed = Outliers(
        columns=packed_columns.reshape(total, CHUNK).T,
        values=packed_values.reshape(total, CHUNK).T,
        merges=tuple(merges),
        starts=starts.astype(np.int32),
        chunk_starts=chunk_starts.astype(np.int32) if merges else None,
        widest=_power_of_two(int(np.diff(starts).max(initial=0))),
        row_chunks=_power_of_two(int(chunks.max(initial=0))),
    )
    return jax.device_put(packed)


def _power_of_two(number: int) -> int:
    """Rounded up; 1 at least."""
    return 1 << max(number - 1, 0).bit_length()


def _merge(starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One pass: which sums make each new one, [FAN, sums], and where rows then begin."""
    counts = np.diff(starts)
    groups = -(-counts // FAN)
    new = np.concatenate([[0], np.cumsum(groups)])
    rows = np.repeat(np.arange(len(counts)), counts)
    index = np.full(FAN * int(new[-1]), starts[-1])
    index[FAN * new[rows] + np.arange(starts[-1]) - starts[rows]] = np.arange(starts[-1])
    return index.reshape(-1, FAN).T, new


def multiply(outliers: Outliers, x: jax.Array) -> jax.Array:
    """The sparse part times activations.

    Args:
      x: [batch, in], in the packed order.

    Returns:
      float32 [batch, out].
    """
    if x.shape[0] == 1:  # vectors: with an axis of one row, a TPU would fill up all of them to eight
        return _multiply(outliers, x[0])[None]
    return jax.vmap(lambda row: _multiply(outliers, row))(x)


def _multiply(outliers: Outliers, x: jax.Array) -> jax.Array:
    """The same for one row."""

    def take(source: jax.Array, index: jax.Array) -> jax.Array:
        return source.at[index.astype(jnp.int32)].get(mode="promise_in_bounds").astype(jnp.float32)

    sums = jnp.zeros(outliers.columns.shape[1], jnp.float32)
    for values, columns in zip(outliers.values, outliers.columns, strict=True):
        sums += values.astype(jnp.float32) * take(x, columns)
    for merge in outliers.merges:
        padded = jnp.pad(sums, (0, 1))
        sums = functools.reduce(jnp.add, (take(padded, index) for index in merge))
    first, last = outliers.starts[:-1], outliers.starts[1:]
    total = jnp.zeros(first.shape[0], jnp.float32)
    for i in range(outliers.widest):
        there = first + i < last
        total += jnp.where(there, take(sums, jnp.where(there, first + i, 0)), 0.0)
    return total


def add_to(outliers: Outliers, dense: jax.Array, first: jax.Array) -> jax.Array:
    """Adds the outliers of some rows to their dense part.

    Args:
      dense: [some rows, columns], rows from `first` on, in the packed order.
      first: int32, which row of the matrix is row 0 of `dense`.
    """
    chunk = jnp.arange(outliers.columns.shape[1], dtype=jnp.int32)
    row = jnp.searchsorted(outliers.first_chunks, chunk, side="right", method="scan").astype(jnp.int32) - 1
    row = jnp.where(row < first, dense.shape[0], row - first)  # negative ones would count from the end
    # Filling has value 0 and column 0, which another entry may have too: the scatter must add.
    at = (jnp.broadcast_to(row, outliers.columns.shape), outliers.columns.astype(jnp.int32))
    return dense.at[at].add(outliers.values.astype(dense.dtype), mode="drop")


def row(outliers: Outliers, index: jax.Array, inner: int) -> jax.Array:
    """The sparse part of one row, float32 [inner] in the packed order."""
    dense = jnp.zeros(inner, jnp.float32)
    first, last = outliers.first_chunks[index], outliers.first_chunks[index + 1]
    chunk = first + jnp.arange(outliers.row_chunks, dtype=jnp.int32)
    columns = jnp.take(outliers.columns, chunk, axis=1, mode="clip").astype(jnp.int32)
    values = jnp.take(outliers.values, chunk, axis=1, mode="clip").astype(jnp.float32)
    return dense.at[columns].add(jnp.where(chunk < last, values, 0.0), mode="promise_in_bounds")
