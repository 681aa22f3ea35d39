"""The functions that know whether a weight is dense or quantized; nothing else does."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import cpu_kernels
from pallas_kernels import spqr_matmul
from spqr_jax.array import SpQRArray
from spqr_jax.errors import SpQRError
from spqr_jax.packing import unpack_codes

Implementation = Literal["cpu", "mosaic_gpu", "triton", "tpu", "xla"]
Weight = jax.Array | SpQRArray | cpu_kernels.Packed | spqr_matmul.Prepared

_LAYOUTS: dict[str, spqr_matmul.Layout] = {"mosaic_gpu": "fragments", "triton": "rows", "tpu": "lanes"}
"""What each of the Pallas kernels reads."""


def linear(w: Weight, x: jax.Array) -> jax.Array:
    """Multiplies activations by a matrix: y = x Wᵀ.

    Args:
      w: the matrix [out, in]: dense, a `SpQRArray`, or the result of `prepare`.
      x: activations [..., in].

    Returns:
      [..., out], in the type of ``x``.

    Raises:
      SpQRError: the last axis of ``x`` is not ``in``.

    Example:
      >>> w = jax.random.normal(jax.random.key(0), (64, 32))
      >>> array = spqr_jax.quantize_weight(w, None, spqr_jax.SpQRConfig.rtn(bits=4))
      >>> spqr_jax.linear(array, jnp.ones((2, 32))).shape
      (2, 64)
    """
    if x.shape[-1] != w.shape[1]:
        raise SpQRError(f"linear: activations {x.shape} do not fit a weight of shape {w.shape} [out, in]")
    if isinstance(w, cpu_kernels.Packed):
        return cpu_kernels.matmul(x, w)
    if isinstance(w, spqr_matmul.Prepared):
        return spqr_matmul.matmul(x, w)
    if isinstance(w, SpQRArray):
        w = w.to_dense(x.dtype)
    return jax.lax.dot_general(x, w.astype(x.dtype), (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=x.dtype)


def linear_all(ws: Sequence[Weight], x: jax.Array) -> list[jax.Array]:
    """`linear` of several weights that read one input; prepared ones in one go.

    Raises:
      SpQRError: as `linear`.
    """
    if wrong := [w.shape for w in ws if x.shape[-1] != w.shape[1]]:
        raise SpQRError(f"linear: activations {x.shape} do not fit a weight of shape {wrong[0]} [out, in]")
    packed = [w for w in ws if isinstance(w, cpu_kernels.Packed)]
    if len(packed) == len(ws) and len({w.int8_activations for w in packed}) == 1:
        return cpu_kernels.matmul_all(x, packed)
    return [linear(w, x) for w in ws]


def take_rows(w: Weight, index: jax.Array) -> jax.Array:
    """Rows of a matrix, as an embedding is read: [out, in], int [...] -> [..., in].

    Indices outside 0..out-1 are clipped. Rows of a quantized matrix are float32.
    """
    if isinstance(w, cpu_kernels.Packed):
        return cpu_kernels.take_rows(w, index)
    if isinstance(w, spqr_matmul.Prepared):
        return spqr_matmul.take_rows(w, index)
    return jnp.take(w.to_dense() if isinstance(w, SpQRArray) else w, index, axis=0, mode="clip")


def default_implementation() -> Implementation:
    """The kernels for the device that JAX runs on: ``xla`` where there are none.

    ``mosaic_gpu`` on NVIDIA GPUs from compute capability 8.0 with a JAX that has it,
    ``triton`` on others while JAX has that; ``tpu`` on TPUs; ``cpu`` where the native
    kernels are there.

    Raises:
      SpQRError: the environment names CPU kernels that are not here.
    """
    target = spqr_matmul.target()
    if target.platform == "cpu":
        return "xla" if why_no_kernels() else "cpu"
    if why_no_pallas():
        return "xla"
    if target.platform == "tpu":
        return "tpu"
    return "triton" if spqr_matmul.why_no_mosaic(target) else "mosaic_gpu"


def why_no_kernels() -> str:
    """Why products with quantized weights do not run through native kernels here, and what to do; empty if they do.

    Raises:
      SpQRError: as `default_implementation`.
    """
    try:
        return cpu_kernels.why_unavailable()
    except cpu_kernels.LibraryError as error:
        raise SpQRError(str(error)) from error


def why_no_pallas() -> str:
    """Why no Pallas kernel runs on the device that JAX runs on; empty if one does."""
    target = spqr_matmul.target()
    if target.platform == "tpu":
        return ""
    if target.platform != "gpu" or target.capability < (8, 0):
        return (
            "Pallas kernels need a TPU or an NVIDIA GPU of compute capability 8.0 or higher, but this device is "
            f"{target.kind}"
        )
    mosaic, triton = spqr_matmul.why_no_mosaic(target), spqr_matmul.why_no_triton()
    return f"{mosaic}; {triton}" if mosaic and triton else ""


def prepare(
    params: Any, dtype: Any = None, implementation: Implementation | None = None, *, int8_activations: bool = False
) -> Any:
    """Brings every quantized weight of a tree into the layout that a fast kernel reads.

    Do this once, after loading. `Generator` and `perplexity` do it for you.

    Args:
      params: any tree with `SpQRArray` leaves, for example a `Decoder`.
      dtype: type of the weights that ``xla`` dequantizes; None for float32.
      implementation: the kernels to prepare for. ``cpu``: native CPU kernels. ``mosaic_gpu``, ``triton`` and ``tpu``:
        Pallas kernels. All of these read packed weights. ``xla``: dense weights, dequantized here. None: the
        best for this machine. A weight in a format that the Pallas kernels do not read becomes dense, with a warning.
      int8_activations: with ``cpu`` only: round activations to 8 bits for up to 16 rows of activations. This is
        faster, with a relative error of about 0.5% per product.

    Returns:
      The same tree with a prepared weight in place of each `SpQRArray`. `linear` takes it.

    Raises:
      SpQRError: the implementation is not available here, or cannot do what was asked.

    Example:
      >>> w = jax.random.normal(jax.random.key(0), (64, 32))
      >>> layer = {"w": spqr_jax.quantize_weight(w, None, spqr_jax.SpQRConfig.rtn(bits=4))}
      >>> ready = spqr_jax.prepare(layer)
      >>> spqr_jax.linear(ready["w"], jnp.ones((2, 32))).shape
      (2, 64)
    """
    implementation = implementation or default_implementation()
    if implementation not in ("cpu", "xla", *_LAYOUTS):
        raise SpQRError(f"implementation must be cpu, {', '.join(_LAYOUTS)} or xla, got {implementation!r}")
    if implementation != "cpu" and int8_activations:
        raise SpQRError(
            "int8 activations need the native CPU kernels: "
            f"{cpu_kernels.why_unavailable() or 'another implementation was chosen'}"
        )

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, SpQRArray):
            return leaf
        if implementation == "cpu":
            return pack_for_cpu(leaf, int8_activations)
        if implementation in _LAYOUTS:
            why = why_not_pallas(leaf, _LAYOUTS[implementation])
            if not why:
                return pack_for_pallas(leaf, _LAYOUTS[implementation])
            warnings.warn(
                f"a weight of shape {leaf.shape} is dequantized, since the Pallas kernels do not support {why}",
                stacklevel=2,
            )
        return leaf.to_dense(dtype or jnp.float32)

    return jax.tree.map(one, params, is_leaf=lambda leaf: isinstance(leaf, SpQRArray))


def why_not_pallas(array: SpQRArray, layout: spqr_matmul.Layout) -> str:
    """Why a layout of the Pallas kernels cannot hold a weight's format; empty if it can."""
    return spqr_matmul.why_unsupported(
        layout,
        bits=array.bits,
        group_size=array.group_size,
        inner=array.shape[1],
        statistics_bits=max(array.scale_bits, array.zero_bits) if array.quantized_stats else None,
        tile_rows=array.stats_group_size,
    )


def pack_for_pallas(array: SpQRArray, layout: spqr_matmul.Layout) -> spqr_matmul.Prepared:
    """A quantized weight in the layout of a Pallas kernel.

    Raises:
      SpQRError: its format is none that they read, or the array breaks one of its invariants.
    """
    if why := why_not_pallas(array, layout):
        raise SpQRError(f"a weight of shape {array.shape} cannot be prepared for the Pallas kernels: {why}")
    try:
        return spqr_matmul.prepare(layout, [part_for_pallas(array)], array.perm)
    except ValueError as error:
        raise SpQRError(
            f"a weight of shape {array.shape} cannot be prepared for the Pallas kernels: {error}"
        ) from error


def part_for_pallas(array: SpQRArray) -> spqr_matmul.Part:
    """A quantized weight's arrays as the Pallas kernels' packing takes them."""
    form: dict[str, Any] = dict.fromkeys(("scale_codes", "zero_codes", "tile_stats", "scale", "zero"))
    tile = array.stats_group_size
    if array.quantized_stats and max(array.scale_bits, array.zero_bits) <= 4 and tile % spqr_matmul.TILE == 0:
        form |= {
            "scale_codes": unpack_codes(np.asarray(array.scale_codes), array.scale_bits).T,
            "zero_codes": unpack_codes(np.asarray(array.zero_codes), array.zero_bits).T,
            "tile_stats": np.repeat(np.asarray(array.tile_stats), tile // spqr_matmul.TILE, axis=0),
        }
    else:
        form["scale"], form["zero"] = array.statistics()
    return spqr_matmul.Part(
        shape=array.shape,
        bits=array.bits,
        group_size=array.group_size,
        codes=array.codes,
        row_ptr=array.outlier_row_ptr,
        cols=array.outlier_cols,
        values=array.outlier_values,
        **form,
    )


def pack_for_cpu(array: SpQRArray, int8_activations: bool = False) -> cpu_kernels.Packed:
    """A quantized weight in the layout of the native kernels, which must be there.

    Raises:
      SpQRError: they are not, or the array breaks one of its invariants.
    """
    form: dict[str, Any] = dict.fromkeys(("scale_codes", "zero_codes", "tile_stats", "scale", "zero"))
    array = jax.tree.map(np.asarray, array)  # packing is the host's work
    tile, stats = array.stats_group_size, array.tile_stats
    if not array.quantized_stats:
        form |= {"scale": stats[..., 0], "zero": stats[..., 1]}
    elif max(array.scale_bits, array.zero_bits) <= 4 and tile % cpu_kernels.TILE == 0:
        form |= {
            "scale_codes": unpack_codes(array.scale_codes, array.scale_bits).T,
            "zero_codes": unpack_codes(array.zero_codes, array.zero_bits).T,
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
