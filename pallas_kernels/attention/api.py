"""The call: which implementation, and what the kernel cannot do."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention.plan import LOAD_BYTES, Plan, choose_plan
from pallas_kernels.attention.xla import attend_by_xla, combine
from pallas_kernels.spqr_matmul import device as devices

_DTYPES = tuple(jnp.dtype(t) for t in (jnp.bfloat16, jnp.float16, jnp.float32))
_MAX_HEAD_DIM = 256
_HEAD_DIM_UNIT = 16
_LENGTH_UNIT = 64


def attend(
    qkv: jax.Array,
    cos: jax.Array | None,
    sin: jax.Array | None,
    keys: jax.Array,
    values: jax.Array,
    layer: jax.Array,
    first: jax.Array,
    start: jax.Array,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    rotated: int,
    scale: float,
    softcap: float | None = None,
    implementation: str | None = None,
    plan: Plan | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rotates one token's queries and key, writes key and value into the cache, and attends to all that is seen.

    Query head h reads KV head h // (heads / kv_heads). Its scores s(i) are scale · q · k(i), or
    softcap · tanh(scale · q · k(i) / softcap), for `first` ≤ i ≤ `start`; the output is softmax(s) · values. The token
    sees itself always. Softmax and sums are in float32. Under `jit` with the cache donated, and in loops, the
    cache is written in place. Works under `jit`; has no gradient in the kernel.

    Args:
      qkv: bfloat16, float16 or float32 [batch, (heads + 2 · kv_heads) · head_dim]: queries, then keys, then values.
      cos: float32 [batch, rotated / 2], cosines of the token's rotary angles; None where nothing is rotated.
      sin: the same, sines.
      keys: bfloat16, float16 or float32 [layers, batch, kv_heads, length, head_dim], rotated.
      values: the same.
      layer: int32 scalar, the layer whose cache is read and written.
      first: int32 [batch], the first position that is seen.
      start: int32 scalar, the token's position, below length.
      heads: query heads, a multiple of kv_heads.
      kv_heads: heads of keys and values.
      head_dim: dimensions of a head.
      rotated: dimensions that are rotated, the first and second half of them paired; 0 for none.
      scale: factor on scores.
      softcap: bound on scores, None for none.
      implementation: "mosaic_gpu", "xla", or None for the kernel wherever it can run.
      plan: the kernel's cut into thread blocks; None for `choose_plan`'s.

    Returns:
      [batch, heads · head_dim] of qkv's dtype, and keys and values with the token's.

    Raises:
      ValueError: shapes or dtypes do not fit together, or an unknown implementation.
      NotImplementedError: "mosaic_gpu" is asked for and cannot run; the message says why.
    """
    static: dict[str, Any] = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "rotated": rotated}
    _check(qkv, cos, sin, keys, values, first, **static)
    if implementation not in (None, "mosaic_gpu", "xla"):
        raise ValueError(f'attend: implementation must be "mosaic_gpu", "xla" or None, got {implementation!r}')
    target = devices.target()
    layer, first, start = (jnp.asarray(a, jnp.int32) for a in (layer, first, start))
    given = (qkv, cos, sin, keys, values, layer, first, start)
    if implementation is None:
        can = target.platform == "gpu" and not _why_unsupported(qkv, keys, static, target)
        implementation = "mosaic_gpu" if can else "xla"
    if implementation == "xla":
        return attend_by_xla(*given, **static, scale=scale, softcap=softcap)
    if why := _why_unsupported(qkv, keys, static, target):
        raise NotImplementedError(why)
    return _attend_by_kernel(given, static, scale, softcap, plan, target)


def _attend_by_kernel(
    given: tuple[Any, ...],
    static: dict[str, Any],
    scale: float,
    softcap: float | None,
    plan: Plan | None,
    target: devices.Target,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    from pallas_kernels.attention import mosaic_gpu
    from pallas_kernels.attention.problem import Problem

    qkv, keys = given[0], given[3]
    _, batch, kv_heads, length, head_dim = keys.shape
    sizes = (batch, static["heads"], kv_heads, head_dim, length, keys.dtype.itemsize)
    plan = plan or choose_plan(*sizes, target.cores, target.capability >= (9, 0))
    heads_read, bytes_read = plan.parts * plan.block_heads, plan.lanes * plan.chunks * LOAD_BYTES
    if heads_read * kv_heads < static["heads"] or bytes_read < head_dim * keys.dtype.itemsize:
        raise ValueError(f"attend: {plan} does not cover {static['heads']} heads of {head_dim} dimensions")
    problem = Problem(
        **static, batch=batch, length=length, scale=scale, softcap=softcap, dtype=qkv.dtype,
        cache_dtype=keys.dtype,
    )  # fmt: skip
    results, keys, values = mosaic_gpu.attend(problem, plan, *given)
    if plan.sums == 1:
        return results[0], keys, values
    return combine(*results).astype(qkv.dtype).reshape(batch, -1), keys, values


def why_unsupported(
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    length: int,
    rotated: int,
    dtype: Any,
    cache_dtype: Any,
    target: devices.Target | None = None,
) -> str:
    """Why the kernel cannot do this on a device (the default one), in a sentence; empty if it can."""
    target = target or devices.target()
    if target.platform != "gpu":
        return f"the attention kernel runs on NVIDIA GPUs only, not on {target.platform}"
    if target.capability < (8, 0):
        return f"{target.kind} has compute capability {target.capability}, but at least (8, 0) is needed"
    if why := why_no_mosaic():
        return why
    for name, given in (("qkv", dtype), ("the cache", cache_dtype)):
        if jnp.dtype(given) not in _DTYPES:
            return f"{name} must be bfloat16, float16 or float32, got {jnp.dtype(given)}"
    if head_dim % _HEAD_DIM_UNIT or not 0 < head_dim <= _MAX_HEAD_DIM:
        return f"head_dim must be a multiple of {_HEAD_DIM_UNIT} up to {_MAX_HEAD_DIM}, got {head_dim}"
    if heads % kv_heads:
        return f"heads must be a multiple of kv_heads, got {heads} and {kv_heads}"
    if length % _LENGTH_UNIT:
        return f"the length of the cache must be a multiple of {_LENGTH_UNIT}, got {length}"
    if rotated % 2 or rotated > head_dim:
        return f"rotated must be even and at most head_dim ({head_dim}), got {rotated}"
    return ""


def why_no_mosaic() -> str:
    """Why the kernel cannot be compiled with the installed JAX; empty if it can."""
    try:
        from jax.experimental.pallas import mosaic_gpu
    except ImportError as error:
        return f"JAX {jax.__version__} cannot load Pallas's Mosaic GPU backend: {error}"
    missing = [name for name in ("inline_mgpu", "kernel") if not hasattr(mosaic_gpu, name)]
    missing += [name for name in ("new_ref", "freeze") if not hasattr(jax, name)]
    return f"JAX {jax.__version__} has no {' and no '.join(missing)}" if missing else ""


def _why_unsupported(qkv: jax.Array, keys: jax.Array, static: dict[str, Any], target: devices.Target) -> str:
    return why_unsupported(**static, length=keys.shape[3], dtype=qkv.dtype, cache_dtype=keys.dtype, target=target)


def _check(
    qkv: jax.Array,
    cos: jax.Array | None,
    sin: jax.Array | None,
    keys: jax.Array,
    values: jax.Array,
    first: jax.Array,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    rotated: int,
) -> None:
    batch = qkv.shape[0]
    if heads % kv_heads:
        raise ValueError(f"attend: heads must be a multiple of kv_heads, got {heads} and {kv_heads}")
    if qkv.shape != (batch, (heads + 2 * kv_heads) * head_dim):
        raise ValueError(f"attend: qkv must be {(batch, (heads + 2 * kv_heads) * head_dim)}, got {qkv.shape}")
    if keys.ndim != 5 or (*keys.shape[1:3], keys.shape[4]) != (batch, kv_heads, head_dim):
        shape = f"[layers, {batch}, {kv_heads}, length, {head_dim}]"
        raise ValueError(f"attend: keys must be {shape}, got {keys.shape}")
    if values.shape != keys.shape or values.dtype != keys.dtype:
        raise ValueError(
            f"attend: values must be as keys, {keys.dtype} {keys.shape}, got {values.dtype} {values.shape}"
        )
    if (cos is None) != (rotated == 0) or (sin is None) != (rotated == 0):
        raise ValueError(f"attend: cos and sin are needed if and only if dimensions are rotated, here {rotated}")
    for name, table in (("cos", cos), ("sin", sin)):
        if table is not None and (table.shape != (batch, rotated // 2) or table.dtype != jnp.float32):
            wanted = (batch, rotated // 2)
            raise ValueError(f"attend: {name} must be float32 {wanted}, got {table.dtype} {table.shape}")
    if jnp.shape(first) != (batch,):
        raise ValueError(f"attend: first must be {(batch,)}, got {jnp.shape(first)}")
