"""The native CPU kernels as a backend."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import cpu_kernels
from pallas_kernels import spqr_matmul
from spqr_jax.array import SpQRArray
from spqr_jax.errors import SpQRError
from spqr_jax.products.prepared import PreparedMatrix
from spqr_jax.products.statistics import packed_statistics


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class CpuMatrix(PreparedMatrix):
    """A matrix for the native kernels: one byte array, so matrices are not stacked.

    Attributes:
      packed: what the kernels read.
      shape: (out, in).
    """

    packed: cpu_kernels.Packed
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})

    @classmethod
    def multiply_all(cls, x: jax.Array, ws: Sequence[CpuMatrix]) -> list[jax.Array]:
        if len({w.packed.int8_activations for w in ws}) == 1:
            return cpu_kernels.matmul_all(x, [w.packed for w in ws])
        return [cpu_kernels.matmul(x, w.packed) for w in ws]

    def take_rows(self, index: jax.Array) -> jax.Array:
        return cpu_kernels.take_rows(self.packed, index)

    def to_dense(self, dtype: Any = jnp.float32) -> jax.Array:
        return cpu_kernels.take_rows(self.packed, jnp.arange(self.shape[0], dtype=jnp.int32)).astype(dtype)


class CpuBackend:
    """C++ kernels through XLA's FFI."""

    name = "cpu"
    stacks = False

    def why_not(self, array: SpQRArray | None, device: spqr_matmul.Target | None) -> str:
        """See `Backend`. The kernels read every format."""
        if device is None:
            return ""
        if device.platform != "cpu":
            return f"the native kernels run on CPUs, but this device is {device.kind}"
        return why_not_installed()

    def prepare(self, array: SpQRArray, *, int8_activations: bool = False) -> CpuMatrix:
        """A quantized weight in the layout of the native kernels.

        Raises:
          SpQRError: there are no kernels here, or the array breaks one of its invariants.
        """
        return CpuMatrix(pack_for_cpu(array, int8_activations), array.shape)


def why_not_installed() -> str:
    """Why the native kernels cannot be used here, and what to do; empty if they can.

    Raises:
      SpQRError: the environment names kernels that are not here.
    """
    try:
        return cpu_kernels.why_unavailable()
    except cpu_kernels.LibraryError as error:
        raise SpQRError(str(error)) from error


def pack_for_cpu(array: SpQRArray, int8_activations: bool = False) -> cpu_kernels.Packed:
    """A quantized weight in the raw layout of the native kernels, which must be there.

    Raises:
      SpQRError: they are not, or the array breaks one of its invariants.
    """
    array = jax.tree.map(np.asarray, array)  # packing is the host's work
    try:
        return cpu_kernels.pack(
            shape=array.shape,
            bits=array.bits,
            group_size=array.group_size,
            codes=array.codes,
            row_ptr=array.outlier_row_ptr,
            cols=array.outlier_cols,
            values=array.outlier_values,
            perm=array.perm,
            int8_activations=int8_activations,
            **packed_statistics(array),
        )
    except (cpu_kernels.LibraryError, ValueError) as error:
        raise SpQRError(f"a weight of shape {array.shape} cannot be prepared for the CPU kernels: {error}") from error
