"""`matmul`: the product with a prepared matrix, by the best kernel that can do it.

| implementation | runs on | layout | rows of x | by |
|---|---|---|---|---|
| mosaic_gpu | NVIDIA from capability 8.0, JAX from 0.11 | fragments | up to 64 | tensor cores |
| triton | NVIDIA, while JAX has the backend | rows | 1, 2 | ordinary cores |
| tpu | TPU from v5e | lanes | up to 64, 16 at a time | matrix unit |
| xla | everywhere | any | any | one dense product after dequantizing |

Activations are float32, bfloat16 or float16. `mosaic_gpu` multiplies in float16, after
each row is divided by a power of two so that it cannot overflow; `tpu` in bfloat16;
`triton` in float32; `xla` in the type of the activations, on CPUs in float32. All add up
in float32.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.spqr_matmul import device as devices
from pallas_kernels.spqr_matmul import outliers, tuning, xla
from pallas_kernels.spqr_matmul.formats import BLOCK
from pallas_kernels.spqr_matmul.pieces import Piece
from pallas_kernels.spqr_matmul.prepared import Prepared

MAX_ROWS = 64
"""Rows of activations up to which `mosaic_gpu` and `tpu` are faster than dequantizing."""

MAX_TRITON_ROWS = 2

_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
_LAYOUTS = {"mosaic_gpu": "fragments", "triton": "rows", "tpu": "lanes"}
_PLATFORMS = {"mosaic_gpu": "gpu", "triton": "gpu", "tpu": "tpu"}

IMPLEMENTATIONS = (*_LAYOUTS, "xla")
"""Names; at most one kernel reads a layout, and `xla` reads all of them."""


# ---- what can run where ---------------------------------------------------------------------------------------------


def why_no_mosaic(target: devices.Target) -> str:
    """Why `mosaic_gpu` cannot run on a device with the installed JAX; empty if it can."""
    try:
        from jax.experimental.pallas import mosaic_gpu
    except ImportError as error:
        return f"JAX {jax.__version__} cannot load Pallas's Mosaic GPU backend: {error}"
    if not hasattr(mosaic_gpu, "mma"):
        return f"JAX {jax.__version__} has no mma in Mosaic GPU; JAX 0.11 or later is needed"
    if target.platform == "gpu" and target.capability < (8, 0):
        return f"{target.kind} has compute capability {target.capability}, but at least (8, 0) is needed"
    return ""


def why_no_triton() -> str:
    """Why `triton` cannot be compiled with the installed JAX, and what to do; empty if it can."""
    if importlib.util.find_spec("jax.experimental.pallas.triton") is None:
        return f"JAX {jax.__version__} no longer has Pallas's Triton backend: use the mosaic_gpu kernel"
    return ""


def why_no_kernel(name: str, target: devices.Target) -> str:
    """Why a kernel cannot run on a device with the installed JAX; empty if it can.

    Args:
      name: one of `IMPLEMENTATIONS`; `xla` always runs.
      target: the device.

    Raises:
      ValueError: another name.
    """
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, got {name!r}")
    if name == "xla":
        return ""
    if target.platform != _PLATFORMS[name]:
        return f"{name} needs a {_PLATFORMS[name].upper()}, but this device is a {target.platform}"
    if name == "tpu":
        return ""
    if target.capability < (8, 0):
        return f"{target.kind} has compute capability {target.capability}, but at least (8, 0) is needed"
    return why_no_mosaic(target) if name == "mosaic_gpu" else why_no_triton()


def _chosen(prepared: Prepared, rows: int, target: devices.Target, implementation: str | None) -> str:
    """The implementation of a product; an error if the one that was named cannot do it."""
    if implementation is None:
        for name, layout in _LAYOUTS.items():
            if layout == prepared.layout and rows <= _most_rows(name) and not why_no_kernel(name, target):
                return name
        return "xla"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}")
    if implementation == "xla":
        return implementation
    if prepared.layout != _LAYOUTS[implementation]:
        raise NotImplementedError(
            f"{implementation}: the matrix was prepared as {prepared.layout!r}, "
            f"but {_LAYOUTS[implementation]!r} is needed"
        )
    if rows > _most_rows(implementation):
        raise NotImplementedError(
            f"{implementation}: {rows} rows of activations, but this kernel takes at most {_most_rows(implementation)}"
        )
    # the platform is not checked: a named kernel may be lowered for another device than the one here
    if implementation == "mosaic_gpu" and (why := why_no_mosaic(target)):
        raise NotImplementedError(f"mosaic_gpu: {why}")
    if implementation == "triton" and (why := why_no_triton()):
        raise NotImplementedError(f"triton: {why}")
    return implementation


def _most_rows(name: str) -> int:
    return MAX_TRITON_ROWS if name == "triton" else MAX_ROWS


# ---- products -------------------------------------------------------------------------------------------------------


def matmul(
    x: jax.Array,
    prepared: Prepared,
    index: Any = None,
    *,
    implementation: str | None = None,
    config: Any = None,
    interpret: Any = False,
) -> jax.Array:
    """y = x W' with a prepared matrix.

    Args:
      x: activations [..., in], float32, bfloat16 or float16.
      prepared: W [out, in], from :func:`prepare`, or a stack of them, from :func:`stack`.
      index: integer or int32 scalar, which may be traced: which matrix of the stack. It must be
        given if the stack has more than one.
      implementation: a name, which is then taken even if the product is lowered for another
        device than the one here. None: the kernel that reads the layout if it can run on the
        default device and takes so many rows; otherwise `xla`.
      config: how the kernel cuts the work; None for the best known.
      interpret: run the kernel in Pallas's interpreter, on any device: True, or what
        `pl.pallas_call` takes. `mosaic_gpu` needs `plgpu.force_gpu_interpret_mode` around it.

    Returns:
      [..., out] in the type of `x`: the results of all parts behind each other.

    Raises:
      ValueError: an argument that no implementation could take.
      NotImplementedError: the implementation that was named cannot do it; says why.
    """
    parts = matmul_parts(x, prepared, index, implementation=implementation, config=config, interpret=interpret)
    return jnp.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]


def matmul_parts(
    x: jax.Array,
    prepared: Prepared,
    index: Any = None,
    *,
    implementation: str | None = None,
    config: Any = None,
    interpret: Any = False,
) -> list[jax.Array]:
    """`matmul`, with the result of each part by itself: [..., rows of the part]."""
    if x.dtype not in _DTYPES:
        raise ValueError(f"activations must be float32, bfloat16 or float16, got {x.dtype}")
    if x.ndim < 1 or x.shape[-1] != prepared.inner:
        raise ValueError(f"activations {x.shape} do not fit a matrix of shape {prepared.shape} [out, in]")
    index = _index(prepared, index)
    target = devices.target()
    rows = x.size // prepared.inner
    name = _chosen(prepared, rows, target, implementation)
    return _product(x, prepared, index, name=name, config=config, interpret=interpret, target=target)


def take_rows(prepared: Prepared, rows: Any, index: Any = None) -> jax.Array:
    """Rows of the matrix, outliers included, with their columns in the original order.

    Args:
      prepared, index: as for :func:`matmul`.
      rows: integers [...]; they are clipped to 0..out-1. Rows of all parts are counted on.

    Returns:
      float32 [..., in].
    """
    return _take_rows(prepared, jnp.asarray(rows), _index(prepared, index))


def dequantize(prepared: Prepared, index: Any = None, dtype: Any = jnp.float32) -> jax.Array:
    """The matrix, outliers included, with its columns in the original order: `dtype` [out, in]."""
    return _dequantize(prepared, _index(prepared, index), dtype=jnp.dtype(dtype))


def _index(prepared: Prepared, index: Any) -> jax.Array:
    if index is None and prepared.count > 1:
        raise ValueError(f"a stack of {prepared.count} matrices needs an index")
    return jnp.int32(0 if index is None else index)


# Programs inside of other programs: equal products are traced and lowered once.


@functools.partial(jax.jit, static_argnames=("name", "config", "interpret", "target"))
def _product(
    x: jax.Array,
    prepared: Prepared,
    index: jax.Array,
    *,
    name: str,
    config: Any,
    interpret: Any,
    target: devices.Target,
) -> list[jax.Array]:
    flat = x.reshape(-1, prepared.inner)
    if prepared.order is not None:
        flat = flat.at[:, prepared.order[index]].get(mode="promise_in_bounds", unique_indices=True)
    if name == "xla":
        # CPUs have no products of 16-bit numbers that add up in float32
        parts = xla.multiply(flat.astype(jnp.float32) if target.platform == "cpu" else flat, prepared, index)
    elif name == "mosaic_gpu":
        parts = _mosaic_gpu(flat, prepared, index, config, interpret)
    else:
        kernel = _triton if name == "triton" else _tpu
        parts = [kernel(flat, piece, config, target, interpret) for piece in prepared.pieces]
    return [part.astype(x.dtype).reshape(*x.shape[:-1], -1) for part in parts]


_take_rows = jax.jit(
    lambda prepared, rows, index: xla.take_rows(
        prepared, jnp.clip(rows.reshape(-1), 0, prepared.shape[0] - 1).astype(jnp.int32), index
    ).reshape(*rows.shape, prepared.inner)
)
_dequantize = jax.jit(xla.dequantize, static_argnames="dtype")


def _mosaic_gpu(x: jax.Array, prepared: Prepared, index: jax.Array, config: Any, interpret: Any) -> list[jax.Array]:
    from pallas_kernels.spqr_matmul import mosaic_gpu

    if x.dtype == jnp.float16:
        x = x.astype(jnp.float32)
    result = mosaic_gpu.multiply(
        prepared.words,
        prepared.spans,
        prepared.entries,
        prepared.starts,
        index[None],
        columns_padded(x, -(-prepared.inner // BLOCK) * BLOCK),
        rows=prepared.rows,
        formats=prepared.formats,
        config=config,
        out_dtype=x.dtype,
        interpret=interpret,
    )
    return list(xla.split(result, prepared.parts, axis=1))


def _triton(x: jax.Array, piece: Piece, config: Any, target: devices.Target, interpret: Any) -> jax.Array:
    from pallas_kernels.spqr_matmul import triton

    codes, statistics, tiles = piece.arrays
    dense = triton.multiply(
        codes,
        statistics,
        tiles,
        columns_padded(x, piece.padded_inner),
        bits=piece.bits,
        group_size=piece.group_size,
        config=config or tuning.triton_config(target, tuning.problem(piece, x.shape[0])),
        interpret=interpret is not False,
    )
    return dense.sum(0)[:, : piece.shape[0]] + outliers.multiply(piece.sparse, x)


def _tpu(x: jax.Array, piece: Piece, config: Any, target: devices.Target, interpret: Any) -> jax.Array:
    del target
    from pallas_kernels.spqr_matmul import tpu

    padded = columns_padded(x.astype(jnp.bfloat16), piece.padded_inner)
    codes, statistics, tiles = piece.arrays
    dense = [
        tpu.multiply(
            codes,
            statistics,
            tiles,
            padded[first : first + tpu.MAX_BATCH],
            bits=piece.bits,
            group_size=piece.group_size,
            block=piece.block,
            depth=config or tuning.tpu_depth(tuning.problem(piece, x.shape[0]), piece.block),
            interpret=interpret,
        )
        for first in range(0, x.shape[0], tpu.MAX_BATCH)
    ]
    return jnp.concatenate(dense)[:, : piece.shape[0]] + outliers.multiply(piece.sparse, x)


def columns_padded(x: jax.Array, columns: int) -> jax.Array:
    """Zeros behind each row of x, up to so many columns."""
    return jnp.pad(x, ((0, 0), (0, columns - x.shape[1]))) if x.shape[1] < columns else x
