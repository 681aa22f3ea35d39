"""The functions that know whether a weight is dense or quantized; nothing else does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import cpu_kernels
from spqr_jax.array import SpQRArray
from spqr_jax.errors import SpQRError
from spqr_jax.packing import unpack_codes

Implementation = Literal["cpu", "xla"]


def linear(w: jax.Array | SpQRArray | cpu_kernels.Packed, x: jax.Array) -> jax.Array:
    """y = x · Wᵀ.

    Args:
      w: [out, in], dense, quantized, or quantized and prepared.
      x: activations [..., in].

    Returns:
      [..., out] in the type of `x`.

    Raises:
      SpQRError: the last axis of `x` is not `in`.
    """
    if x.shape[-1] != w.shape[1]:
        raise SpQRError(f"linear: activations {x.shape} do not fit a weight of shape {w.shape} [out, in]")
    if isinstance(w, cpu_kernels.Packed):
        return cpu_kernels.matmul(x, w)
    if isinstance(w, SpQRArray):
        w = w.to_dense(x.dtype)
    return jax.lax.dot_general(x, w.astype(x.dtype), (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=x.dtype)


def linear_all(ws: Sequence[jax.Array | SpQRArray | cpu_kernels.Packed], x: jax.Array) -> list[jax.Array]:
    """`linear` of several weights that read one input; prepared ones in one go.

    Raises:
      SpQRError: as `linear`.
    """
    packed = [w for w in ws if isinstance(w, cpu_kernels.Packed)]
    if len(packed) == len(ws) and len({w.int8_activations for w in packed}) == 1:
        if wrong := [w.shape for w in packed if x.shape[-1] != w.shape[1]]:
            raise SpQRError(f"linear: activations {x.shape} do not fit a weight of shape {wrong[0]} [out, in]")
        return cpu_kernels.matmul_all(x, packed)
    return [linear(w, x) for w in ws]


def take_rows(w: jax.Array | SpQRArray | cpu_kernels.Packed, index: jax.Array) -> jax.Array:
    """Rows of a matrix, as an embedding is read: [out, in], int [...] -> [..., in].

    Indices outside 0..out-1 are clipped. Rows of a quantized matrix are float32.
    """
    if isinstance(w, cpu_kernels.Packed):
        return cpu_kernels.take_rows(w, index)
    return jnp.take(w.to_dense() if isinstance(w, SpQRArray) else w, index, axis=0, mode="clip")


def default_implementation() -> Implementation:
    """``cpu`` where JAX runs on a CPU and the native kernels are there, else ``xla``.

    Raises:
      SpQRError: the environment names kernels that are not here.
    """
    return "cpu" if jax.default_backend() == "cpu" and not why_no_kernels() else "xla"


def why_no_kernels() -> str:
    """Why products with quantized weights do not run through native kernels here, and what to do; empty if they do.

    Raises:
      SpQRError: as `default_implementation`.
    """
    try:
        return cpu_kernels.why_unavailable()
    except cpu_kernels.LibraryError as error:
        raise SpQRError(str(error)) from error


def prepare(
    params: Any, dtype: Any = None, implementation: Implementation | None = None, *, int8_activations: bool = False
) -> Any:
    """Brings every quantized weight of a tree into the layout its matmul reads.

    Done once at load, never in a step.

    Args:
      params: a tree with `SpQRArray` leaves.
      dtype: type of the weights that ``xla`` dequantizes; None for float32.
      implementation: ``cpu``, the native kernels, which read packed weights; ``xla``,
        which reads dense ones; None for `default_implementation`.
      int8_activations: with ``cpu``, round activations to 8 bits where up to 16 rows of
        them meet a weight: faster, with a relative error of some 0.5% a product.

    Raises:
      SpQRError: `implementation` is not there, or cannot do what is asked.
    """
    implementation = implementation or default_implementation()
    if implementation not in ("cpu", "xla"):
        raise SpQRError(f"implementation must be cpu or xla, got {implementation!r}")
    if implementation == "xla" and int8_activations:
        raise SpQRError(
            f"int8 activations need the native CPU kernels: {cpu_kernels.why_unavailable() or 'not chosen'}"
        )

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, SpQRArray):
            return leaf
        if implementation == "xla":
            return leaf.to_dense(dtype or jnp.float32)
        return pack_for_cpu(leaf, int8_activations)

    return jax.tree.map(one, params, is_leaf=lambda leaf: isinstance(leaf, SpQRArray))


def pack_for_cpu(array: SpQRArray, int8_activations: bool = False) -> cpu_kernels.Packed:
    """A quantized weight in the layout of the native kernels, which must be there.

    Raises:
      SpQRError: they are not, or the array breaks one of its invariants.
    """
    form: dict[str, Any] = dict.fromkeys(("scale_codes", "zero_codes", "tile_stats", "scale", "zero"))
    tile, stats = array.stats_group_size, np.asarray(array.tile_stats)
    if not array.quantized_stats:
        form |= {"scale": stats[..., 0], "zero": stats[..., 1]}
    elif max(array.scale_bits, array.zero_bits) <= 4 and tile % cpu_kernels.TILE == 0:
        form |= {
            "scale_codes": unpack_codes(np.asarray(array.scale_codes), array.scale_bits).T,
            "zero_codes": unpack_codes(np.asarray(array.zero_codes), array.zero_bits).T,
            "tile_stats": np.repeat(stats, tile // cpu_kernels.TILE, axis=0),
        }
    else:
        form["scale"], form["zero"] = array.statistics()
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
            **form,
        )
    except (cpu_kernels.LibraryError, ValueError) as error:
        raise SpQRError(f"a weight of shape {array.shape} cannot be prepared for the CPU kernels: {error}") from error
