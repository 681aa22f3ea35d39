"""`Prepared`: quantized matrices in the layout that one of the kernels reads."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.spqr_matmul import entries, fragments, spans
from pallas_kernels.spqr_matmul import pieces as pieces_
from pallas_kernels.spqr_matmul.formats import TILE, Format, format_of
from pallas_kernels.spqr_matmul.part import LAYOUTS, Layout, Outliers, Part, checked


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A stack of joined matrices for :func:`matmul`. Make one with :func:`prepare` and :func:`stack`.

    A *joined* matrix is several matrices that read one input, rows below each other. A *stack*
    is several joined matrices of one shape, for example of the layers of a model. The static
    attributes, and so the programs, depend on shapes and formats only.

    Attributes:
      words: codes and statistics, int32, see `fragments`; None in other layouts.
      spans: int32 [count, tiles, 2], where each tile's words begin; None if all have one format.
      entries: the outliers, int32 [count, capacity], see `entries`; None in other layouts.
      starts: int32 [count, 4 * rows + 1], where each row's begin; None in other layouts.
      order: int32 [count, in], the input that each packed column is; None if all are in order.
      pieces: the matrices of the other layouts; empty for "fragments".
      parts: rows of each of the joined matrices.
      inner: columns.
      formats: of the tiles of `words`.
      layout: whose arrays these are.
    """

    words: Any
    spans: Any
    entries: Any
    starts: Any
    order: Any
    pieces: tuple[pieces_.Piece, ...]
    parts: tuple[int, ...]
    inner: int
    formats: tuple[Format, ...]
    layout: Layout

    @property
    def count(self) -> int:
        """Matrices of the stack."""
        return 1 if self.starts is None else self.starts.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(rows of all parts, in) of one matrix of the stack."""
        return sum(self.parts), self.inner

    @property
    def ndim(self) -> int:
        """Always 2."""
        return 2

    @property
    def dtype(self) -> np.dtype:
        """The type in which the matrix is defined: float32."""
        return np.dtype(np.float32)

    @property
    def rows(self) -> int:
        """Rows of one matrix, each part's padded to whole tiles of 16."""
        return sum(-(-part // TILE) * TILE for part in self.parts)

    @property
    def nbytes(self) -> int:
        """Bytes that are held, paddings included."""
        return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(self))


jax.tree_util.register_dataclass(
    Prepared,
    data_fields=["words", "spans", "entries", "starts", "order", "pieces"],
    meta_fields=["parts", "inner", "formats", "layout"],
)


def prepare(layout: Layout, parts: Sequence[Part], perm: Any = None) -> Prepared:
    """Turns matrices that read one input into a kernel's layout.

    Args:
      layout: `fragments` for mosaic_gpu, `rows` for triton, `lanes` for tpu.
      parts: one matrix, or several of as many columns.
      perm: integers [in], or None for the identity: packed column j is input perm[j].

    Returns:
      A stack of one.

    Raises:
      NotImplementedError: the layout cannot hold this format; says why.
      ValueError: arrays that do not fit together.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    if not parts:
        raise ValueError("there must be at least one part")
    inner = parts[0].shape[1]
    if len(columns := {part.shape[1] for part in parts}) > 1:
        raise ValueError(f"joined parts must have one number of columns, got {sorted(columns)}")
    outliers = [checked(layout, part) for part in parts]
    order = None
    if perm is not None:
        perm = np.asarray(perm).astype(np.int32)
        if perm.shape != (inner,) or not np.array_equal(np.sort(perm), np.arange(inner)):
            raise ValueError(f"perm of shape {perm.shape} is not a permutation of {inner} columns")
        order = jax.device_put(perm[None])
    empty = Prepared(None, None, None, None, order, (), tuple(part.shape[0] for part in parts), inner, (), layout)
    if layout == "fragments":
        return _fragments(empty, parts, outliers)
    packed = (
        pieces_.pack(
            layout,
            shape=part.shape,
            bits=part.bits,
            group_size=part.group_size,
            codes=part.codes,
            statistics=part.statistics,
            row_ptr=sparse.row_ptr,
            columns=sparse.columns,
            values=sparse.values,
        )
        for part, sparse in zip(parts, outliers, strict=True)
    )
    return dataclasses.replace(empty, pieces=tuple(packed))


def _fragments(empty: Prepared, parts: Sequence[Part], outliers: Sequence[Outliers]) -> Prepared:
    sections: list[spans.Section] = []
    for part in parts:
        form = format_of(part.bits, part.group_size, second_level=part.scale is None)
        words = fragments.pack(
            part.codes,
            part.statistics,
            shape=part.shape,
            bits=part.bits,
            group_size=part.group_size,
            form=form,
        )
        sections.append((words, None, (form,)))
    words, tile_spans, formats = spans.concatenated(sections, axis=1)
    counts = [
        np.pad(np.diff(sparse.row_ptr), (0, -part.shape[0] % TILE))
        for part, sparse in zip(parts, outliers, strict=True)
    ]
    packed, starts = entries.pack(
        np.concatenate([[0], np.cumsum(np.concatenate(counts))]),
        np.concatenate([sparse.columns for sparse in outliers]),
        np.concatenate([sparse.values for sparse in outliers]),
        rows=empty.rows,
        inner=empty.inner,
    )
    packed = np.pad(packed, (0, entries.capacity(len(packed)) - len(packed))).view(np.int32)
    held, starts = jax.device_put((packed[None], starts[None]))
    return dataclasses.replace(empty, words=words, spans=tile_spans, entries=held, starts=starts, formats=formats)


def stack(matrices: Sequence[Prepared]) -> Prepared:
    """Matrices of one shape as one stack, in order; their formats may differ.

    The new arrays are copies: those of `matrices` can be dropped.

    Raises:
      NotImplementedError: the matrices have another layout than "fragments".
      ValueError: the matrices differ in shape, or there is none.
    """
    if not matrices:
        raise ValueError("a stack needs at least one matrix")
    first = matrices[0]
    if layouts := {matrix.layout for matrix in matrices} - {"fragments"}:
        raise NotImplementedError(f"only the fragments layout can be stacked, not {', '.join(sorted(layouts))}")
    for matrix in matrices:
        if (matrix.parts, matrix.inner) != (first.parts, first.inner):
            raise ValueError(
                f"matrices of a stack must have one shape, got parts of {first.parts} rows x {first.inner} "
                f"and of {matrix.parts} rows x {matrix.inner}"
            )
    words, tile_spans, formats = spans.concatenated([(m.words, m.spans, m.formats) for m in matrices], axis=0)
    held, starts, order = _stacked(
        [matrix.entries for matrix in matrices],
        [matrix.starts for matrix in matrices],
        [matrix.order for matrix in matrices],
        inner=first.inner,
    )
    return dataclasses.replace(
        first, words=words, spans=tile_spans, entries=held, starts=starts, order=order, formats=formats
    )


@functools.partial(jax.jit, static_argnames="inner")
def _stacked(
    held: list[jax.Array], starts: list[jax.Array], orders: list[jax.Array | None], *, inner: int
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Entries to one capacity, starts, and orders: None if all are."""
    capacity = max(array.shape[1] for array in held)
    held = [jnp.pad(array, ((0, 0), (0, capacity - array.shape[1]))) for array in held]
    order = None
    if any(array is not None for array in orders):
        in_order = [jnp.broadcast_to(jnp.arange(inner, dtype=jnp.int32), (array.shape[0], inner)) for array in held]
        order = jnp.concatenate([o if o is not None else i for o, i in zip(orders, in_order, strict=True)])
    return jnp.concatenate(held), jnp.concatenate(starts), order
