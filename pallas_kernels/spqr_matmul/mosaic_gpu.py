"""Tensor cores: decode and multiply, through Pallas's Mosaic GPU backend."""

from __future__ import annotations

from typing import Any

import jax

from pallas_kernels.spqr_matmul.formats import Format


def multiply(
    words: jax.Array,
    spans: jax.Array | None,
    entries: jax.Array,
    starts: jax.Array,
    index: jax.Array,
    x: jax.Array,
    *,
    rows: int,
    formats: tuple[Format, ...],
    config: Any,
    out_dtype: Any,
    interpret: Any = False,
) -> jax.Array:
    """The product with one matrix of a stack.

    Args:
      words, spans, entries, starts: the arrays of `Prepared`, see `fragments` and `entries`.
      index: int32 [1], which matrix of the stack.
      x: bfloat16 or float32 [n, columns], in the packed order, columns a multiple of 16.
      rows: of a matrix, padded.
      formats: of the tiles.
      config: how to cut the work; None for the best known.
      out_dtype: of the result: bfloat16 or float32.

    Returns:
      [n, rows].
    """
    raise NotImplementedError("this kernel does not read the layout yet")
