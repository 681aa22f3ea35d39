"""The Pallas kernels for GPUs and TPUs as backends."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import spqr_matmul
from spqr_jax.array import SpQRArray
from spqr_jax.errors import SpQRError
from spqr_jax.products.prepared import PreparedMatrix
from spqr_jax.products.statistics import packed_statistics


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class PallasMatrix(PreparedMatrix):
    """A matrix for a Pallas kernel.

    It may be several matrices with one input, joined along their rows, and it may be one of a stack of such matrices:
    the same weight of all layers.

    Attributes:
      raw: what the kernel reads: one joined matrix, or a stack of them.
      index: int32 scalar, which matrix of the stack this is; None if `raw` holds one.
    """

    raw: spqr_matmul.Prepared
    index: Any = None

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        """(out, in), all joined matrices together."""
        return sum(self.raw.parts), self.raw.inner

    def at(self, index: jax.Array) -> PallasMatrix:
        """Matrix number `index` (int32 scalar, may be traced) of a stack. Nothing is copied."""
        return dataclasses.replace(self, index=index)

    def multiply_parts(self, x: jax.Array) -> list[jax.Array]:
        """The product with each joined matrix: [..., in] -> [..., rows of the part] each."""
        self._check_input(x)
        return spqr_matmul.matmul_parts(x, self.raw, self.index)

    @classmethod
    def multiply_all(cls, x: jax.Array, ws: Sequence[PallasMatrix]) -> list[jax.Array]:
        return [spqr_matmul.matmul(x, w.raw, w.index) for w in ws]

    def take_rows(self, index: jax.Array) -> jax.Array:
        return spqr_matmul.take_rows(self.raw, index, self.index)

    def to_dense(self, dtype: Any = jnp.float32) -> jax.Array:
        return spqr_matmul.dequantize(self.raw, self.index, dtype=dtype)


class PallasBackend:
    """One of the Pallas kernels.

    Args:
      name: of the kernel, as `spqr_matmul.matmul` knows it.
      layout: what it reads.
      stacks: whether it reads a stack of matrices by an index that is data, so that layers can run in a loop.
    """

    def __init__(self, name: str, layout: spqr_matmul.Layout, stacks: bool = False) -> None:
        self.name, self.layout, self.stacks = name, layout, stacks

    def why_not(self, array: SpQRArray | None, device: spqr_matmul.Target | None) -> str:
        """See `Backend`."""
        if device is not None and (why := spqr_matmul.why_no_kernel(self.name, device)):
            return why
        if array is None:
            return ""
        return spqr_matmul.why_unsupported(
            self.layout,
            bits=array.bits,
            group_size=array.group_size,
            inner=array.shape[1],
            statistics_bits=max(array.scale_bits, array.zero_bits) if array.quantized_stats else None,
            tile_rows=array.stats_group_size,
        )

    def prepare(self, array: SpQRArray) -> PallasMatrix:
        """A quantized weight in the kernel's layout.

        Raises:
          SpQRError: the kernel does not read its format, or the array breaks one of its invariants.
        """
        return self.join([array])

    def join(self, arrays: Sequence[SpQRArray]) -> PallasMatrix:
        """Matrices with one input and one input order as one, rows stacked.

        Raises:
          SpQRError: as `prepare`, or the matrices' inputs differ in number or in order.
        """
        try:
            raw = spqr_matmul.prepare(self.layout, [part_of(array) for array in arrays], arrays[0].perm)
        except (ValueError, NotImplementedError) as error:
            shapes = ", ".join(str(array.shape) for array in arrays)
            raise SpQRError(f"weights of shape {shapes} cannot be prepared for {self.name}: {error}") from error
        return PallasMatrix(raw)


def part_of(array: SpQRArray) -> spqr_matmul.Part:
    """The canonical arrays of a matrix, as the kernels' packing takes them."""
    return spqr_matmul.Part(
        shape=array.shape,
        bits=array.bits,
        group_size=array.group_size,
        codes=array.codes,
        row_ptr=array.outlier_row_ptr,
        cols=array.outlier_cols,
        values=array.outlier_values,
        **packed_statistics(array),
    )


def stack_matrices(matrices: Sequence[PallasMatrix]) -> PallasMatrix:
    """Prepared matrices of one shape as a stack; formats may differ."""
    return PallasMatrix(spqr_matmul.stack([matrix.raw for matrix in matrices]))
