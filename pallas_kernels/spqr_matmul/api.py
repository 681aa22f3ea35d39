"""`matmul`: the product with a prepared matrix, by the best kernel that can do it.

| implementation | runs on | layout | rows of x | by |
|---|---|---|---|---|
| mosaic_gpu | NVIDIA from capability 8.0, JAX from 0.11 | fragments | up to 64, 16 at a time | tensor cores |
| triton | NVIDIA, while JAX has the backend | rows | 1, 2 | ordinary cores |
| tpu | TPU from v5e | lanes | up to 64, 16 at a time | matrix unit |
| xla | everywhere | any | any | dequantized rows, 512 at a time |

Activations are float32, bfloat16 or float16. `mosaic_gpu` multiplies in float16, after
each row is divided by a power of two so that it cannot overflow; `tpu` in bfloat16;
`triton` in float32; `xla` in the type of the activations. All add up in float32.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.spqr_matmul import device as devices
from pallas_kernels.spqr_matmul import outliers, tuning, xla
from pallas_kernels.spqr_matmul.prepared import Prepared

MAX_ROWS = 64
"""Rows of activations up to which a kernel is called once for 16; dequantizing is dearer till there."""

_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


_forced: dict[str, Any] = {}


@contextlib.contextmanager
def using(kernel: str, config: Any) -> Iterator[None]:
    """Products that are traced inside take this configuration of a kernel: what a search for the best one needs."""
    _forced[kernel] = config
    try:
        yield
    finally:
        del _forced[kernel]


@dataclasses.dataclass(frozen=True)
class _Call:
    """One product: `x` [batch, in] is in the packed order."""

    x: jax.Array
    prepared: Prepared
    target: devices.Target
    interpret: Any
    named: bool  # the one implementation asked for: it may be lowered where it cannot run

    def require(self, layout: str, platform: str, most: int) -> None:
        """Raises NotImplementedError unless the matrix, the device and the batch fit."""
        if self.prepared.layout != layout:
            raise NotImplementedError(f"the matrix was prepared as {self.prepared.layout!r}, but {layout!r} is needed")
        if self.interpret is False and not self.named and self.target.platform != platform:
            raise NotImplementedError(f"needs a {platform.upper()}, but this device is a {self.target.platform}")
        if self.x.shape[0] > most:
            raise NotImplementedError(f"{self.x.shape[0]} rows of activations, but this kernel takes at most {most}")

    @property
    def problem(self) -> tuning.Problem:
        """What a configuration is looked up by."""
        out, inner = self.prepared.shape
        return tuning.Problem(self.x.shape[0], out, inner, self.prepared.bits, self.prepared.group_size)


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


def _mosaic_gpu(call: _Call) -> jax.Array:
    call.require("fragments", "gpu", MAX_ROWS)
    if why := why_no_mosaic(call.target):
        raise NotImplementedError(why)
    from pallas_kernels.spqr_matmul import mosaic_gpu

    codes, statistics = call.prepared.arrays
    config = _forced.get("mosaic_gpu") or tuning.mosaic_config(call.target, call.problem)
    if not config.stages:
        raise NotImplementedError(
            f"a step with groups of {call.prepared.group_size} does not fit into {call.target.shared_bytes} bytes of "
            "shared memory"
        )
    exponent = _power_of_two(call.x)
    x = (call.x.astype(jnp.float32) / exponent).astype(jnp.float16)
    pieces = []
    for first in range(0, x.shape[0], mosaic_gpu.MAX_BATCH):
        piece = x[first : first + mosaic_gpu.MAX_BATCH]
        sums = mosaic_gpu.multiply(
            codes,
            statistics,
            piece,
            bits=call.prepared.bits,
            group_size=call.prepared.group_size,
            config=config,
            tma=call.target.platform != "gpu" or call.target.capability >= (9, 0),
            interpret=call.interpret is not False,
        ).sum(0)  # [tiles, rows, columns]
        pieces.append(sums.transpose(0, 2, 1).reshape(-1, sums.shape[1])[: piece.shape[0]])
    return jnp.concatenate(pieces) * exponent


def _power_of_two(x: jax.Array) -> jax.Array:
    """For each row the power of two just below its largest magnitude, float32 [batch, 1]; 1 for zeros."""
    largest = jnp.abs(x.astype(jnp.float32)).max(axis=1, keepdims=True)
    power = lax.bitcast_convert_type(lax.bitcast_convert_type(largest, jnp.int32) & 0x7F800000, jnp.float32)
    return jnp.where((power > 0) & jnp.isfinite(power), power, 1.0)


def _triton(call: _Call) -> jax.Array:
    if why := why_no_triton():
        raise NotImplementedError(why)
    from pallas_kernels.spqr_matmul import triton

    call.require("rows", "gpu", triton.MAX_BATCH)
    codes, statistics, tiles = call.prepared.arrays
    return triton.multiply(
        codes,
        statistics,
        tiles,
        rows_padded(call.x, call.prepared.padded_inner),
        bits=call.prepared.bits,
        group_size=call.prepared.group_size,
        config=_forced.get("triton") or tuning.triton_config(call.target, call.problem),
        interpret=call.interpret is not False,
    ).sum(0)


def _tpu(call: _Call) -> jax.Array:
    call.require("lanes", "tpu", MAX_ROWS)
    from pallas_kernels.spqr_matmul import tpu

    prepared = call.prepared
    x = rows_padded(call.x.astype(jnp.bfloat16), prepared.padded_inner)
    codes, statistics, tiles = prepared.arrays
    pieces = [
        tpu.multiply(
            codes,
            statistics,
            tiles,
            x[first : first + tpu.MAX_BATCH],
            bits=prepared.bits,
            group_size=prepared.group_size,
            block=prepared.block,
            depth=tuning.tpu_depth(call.problem, prepared.block),
            interpret=call.interpret,
        )
        for first in range(0, x.shape[0], tpu.MAX_BATCH)
    ]
    return jnp.concatenate(pieces)


def rows_padded(x: jax.Array, inner: int) -> jax.Array:
    """Zeros behind each row of x, up to `inner` columns."""
    return jnp.pad(x, ((0, 0), (0, inner - x.shape[1])))


_IMPLEMENTATIONS: dict[str, Callable[[_Call], jax.Array] | None] = {
    "mosaic_gpu": _mosaic_gpu,
    "triton": _triton,
    "tpu": _tpu,
    "xla": None,
}
IMPLEMENTATIONS = tuple(_IMPLEMENTATIONS)
"""Names, best first."""


def matmul(
    x: jax.Array,
    prepared: Prepared,
    implementation: str | Sequence[str] | None = None,
    *,
    interpret: Any = False,
) -> jax.Array:
    """y = x W' with a prepared matrix.

    Args:
      x: activations [..., in], float32, bfloat16 or float16.
      prepared: W [out, in], from :func:`prepare`.
      implementation: a name, which is taken even if the product is lowered for another
        device than the one here; names to try in turn; None for all, best first.
      interpret: run kernels in Pallas's interpreter, on any device: True, or what
        `pl.pallas_call` takes. `mosaic_gpu` needs `plgpu.force_gpu_interpret_mode` around it.

    Returns:
      [..., out] in the type of `x`.

    Raises:
      ValueError: an argument that no implementation could take.
      NotImplementedError: none of those asked for can do it; says why for each.
    """
    return matmul_all(x, [prepared], implementation, interpret=interpret)[0]


def matmul_all(
    x: jax.Array,
    matrices: Sequence[Prepared],
    implementation: str | Sequence[str] | None = None,
    *,
    interpret: Any = False,
) -> list[jax.Array]:
    """`matmul` with several matrices that read one input; it is permuted once for all that share an order."""
    names = _names(implementation)
    if x.dtype not in _DTYPES:
        raise ValueError(f"activations must be float32, bfloat16 or float16, got {x.dtype}")
    if wrong := [m.shape for m in matrices if x.ndim < 1 or x.shape[-1] != m.shape[1]]:
        raise ValueError(f"activations {x.shape} do not fit a matrix of shape {wrong[0]} [out, in]")
    flat = x.reshape(-1, x.shape[-1])
    ordered: dict[str, jax.Array] = {"": flat}
    target, results = devices.target(), []
    for matrix in matrices:
        if matrix.order_key not in ordered:
            ordered[matrix.order_key] = flat.at[:, matrix.order].get(mode="promise_in_bounds", unique_indices=True)
        result = _first_that_can(
            names, _Call(ordered[matrix.order_key], matrix, target, interpret, isinstance(implementation, str))
        )
        results.append(result.astype(x.dtype).reshape(*x.shape[:-1], matrix.shape[0]))
    return results


def _names(implementation: str | Sequence[str] | None) -> Sequence[str]:
    names = IMPLEMENTATIONS if implementation is None else implementation
    names = [names] if isinstance(names, str) else list(names)
    if not names or any(name not in _IMPLEMENTATIONS for name in names):
        raise ValueError(f"implementation must be one or more of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}")
    return names


def _first_that_can(names: Sequence[str], call: _Call) -> jax.Array:
    reasons = []
    out = call.prepared.shape[0]
    for name in names:
        kernel = _IMPLEMENTATIONS[name]
        if kernel is None:
            # CPUs have no products of 16-bit numbers that add up in float32
            return xla.multiply(call.prepared, call.x.astype(jnp.float32) if call.target.platform == "cpu" else call.x)
        try:
            dense = kernel(call)[:, :out]
        except NotImplementedError as error:
            reasons.append(f"{name}: {error}")
            continue
        return dense + outliers.multiply(call.prepared.sparse, call.x)
    raise NotImplementedError("; ".join(reasons))
