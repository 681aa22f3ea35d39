"""`linear` and its relatives: the functions that take any weight."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import spqr_matmul
from spqr_jax.errors import SpQRError
from spqr_jax.products.prepared import PreparedMatrix
from spqr_jax.products.table import BACKENDS, Implementation, backend_named, default_implementation
from spqr_jax.products.xla import multiply_dense
from spqr_jax.quantized import QuantizedMatrix

Weight = jax.Array | QuantizedMatrix


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
    _check_inputs([w], x)
    return w.multiply(x) if isinstance(w, QuantizedMatrix) else multiply_dense(x, w)


def linear_all(ws: Sequence[Weight], x: jax.Array) -> list[jax.Array]:
    """`linear` of several weights that read one input, in one call of the backend where that is possible.

    Raises:
      SpQRError: as `linear`.
    """
    _check_inputs(ws, x)
    kinds = {type(w) for w in ws}
    if len(kinds) == 1 and issubclass(kind := kinds.pop(), PreparedMatrix):
        return kind.multiply_all(x, ws)
    return [linear(w, x) for w in ws]


def _check_inputs(ws: Sequence[Weight], x: jax.Array) -> None:
    for w in ws:
        if x.ndim < 1 or x.shape[-1] != w.shape[1]:
            raise SpQRError(f"linear: activations {x.shape} do not fit a weight of shape {w.shape} [out, in]")


def take_rows(w: Weight, index: jax.Array) -> jax.Array:
    """Rows of a matrix, as an embedding is read: [out, in], int [...] -> [..., in].

    Indices outside 0..out-1 are clipped. Rows of a quantized matrix are float32.
    """
    return w.take_rows(index) if isinstance(w, QuantizedMatrix) else jnp.take(w, index, axis=0, mode="clip")


def prepare(
    params: Any, dtype: Any = None, implementation: Implementation | None = None, *, int8_activations: bool = False
) -> Any:
    """Brings every quantized weight of a tree into the layout that a fast kernel reads.

    Do this once, after loading. `Generator` does it for you.

    Args:
      params: any tree with `SpQRArray` leaves, for example a `Decoder`.
      dtype: type of the weights that ``xla`` dequantizes, such as `jnp.bfloat16`; None for float32.
      implementation: the backend to prepare for. ``cpu``: native CPU kernels. ``mosaic_gpu``, ``triton`` and ``tpu``:
        Pallas kernels. All of these read packed weights. ``xla``: dense weights, dequantized here. None: the
        best for this machine; a weight in a format that it does not read becomes dense, with a warning.
      int8_activations: with ``cpu`` only: round activations to 8 bits for up to 16 rows of activations. This is
        faster, with a relative error of about 0.5% per product.

    Returns:
      The same tree with a prepared weight in place of each `SpQRArray`. `linear` takes it.

    Raises:
      SpQRError: the named implementation cannot run on this device or does not read a weight's format.

    Example:
      >>> w = jax.random.normal(jax.random.key(0), (64, 32))
      >>> layer = {"w": spqr_jax.quantize_weight(w, None, spqr_jax.SpQRConfig.rtn(bits=4))}
      >>> ready = spqr_jax.prepare(layer)
      >>> spqr_jax.linear(ready["w"], jnp.ones((2, 32))).shape
      (2, 64)
    """
    backend = backend_named(implementation or default_implementation())
    device = spqr_matmul.target()
    if implementation is not None and (why := backend.why_not(None, device)):
        raise SpQRError(f"{implementation} cannot run here: {why}")
    if int8_activations and backend.name != "cpu":
        raise SpQRError(
            "int8 activations need the native CPU kernels: "
            f"{BACKENDS['cpu'].why_not(None, device) or 'another implementation was chosen'}"
        )
    options = {"int8_activations": True} if int8_activations else {}
    return prepare_for(backend, params, dtype, strict=implementation is not None, **options)


def prepare_for(backend: Any, params: Any, dtype: Any, *, strict: bool = False, **options: Any) -> Any:
    """`prepare` for one of the `BACKENDS`, whatever the device.

    Args:
      backend: the backend.
      params, dtype: as in `prepare`.
      strict: refuse a weight in a format that the backend does not read; otherwise it becomes dense, with a warning.
      options: of the backend's `prepare`.
    """

    def prepared(weight: Any) -> Any:
        if not isinstance(weight, QuantizedMatrix) or isinstance(weight, PreparedMatrix):
            return weight
        if backend.name == "xla":
            return backend.prepare(weight, dtype=dtype)
        if not (why := backend.why_not(weight, None)):
            return backend.prepare(weight, **options)
        if strict:
            raise SpQRError(f"{backend.name} does not read a weight of shape {weight.shape}: {why}")
        warnings.warn(
            f"a weight of shape {weight.shape} is dequantized, since {backend.name} does not read it: {why}",
            stacklevel=2,
        )
        return BACKENDS["xla"].prepare(weight, dtype=dtype)

    return jax.tree.map(prepared, params, is_leaf=lambda leaf: isinstance(leaf, QuantizedMatrix))
