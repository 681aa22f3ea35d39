"""Are the results right? Every kernel against the formula in float64, computed by NumPy."""

from __future__ import annotations

import functools
import time
from typing import Any

import accelerator
import jax
import jax.numpy as jnp
import numpy as np
from accelerator import LAYOUTS, Shape, relative_error
from report import Report
from tune_pallas import label, mosaic_options

from device_parts.products import kernel_name
from pallas_kernels import spqr_matmul

MAX_ERROR = 2e-3
"""Of a product with float16 operands and a float32 or float16 result."""
FORMATS = [(3, 16), (2, 16), (4, 16), (8, 16), (3, 32), (4, 128)]
ROWS = (1, 8, 16, 5, 33, 64)


def measure(report: Report, small: bool) -> None:
    """The question of subnormals first, for it decides about every kernel; then products, then attention."""
    report.line(check="tensor cores take float16 subnormals", **subnormals())
    name = kernel_name()
    shape = Shape(96, 256) if small else Shape(1040, 2816)
    plan = [(*FORMATS[0], rows) for rows in ROWS] + [(*form, rows) for form in FORMATS[1:] for rows in (1, 16)]
    for bits, group_size, rows in plan[:2] if small else plan:
        report.line(check="product", kernel=name, bits=bits, group_size=group_size, rows=rows, shape=str(shape),
                    **_checked(functools.partial(product_error, name, shape, bits, group_size, rows)))  # fmt: skip
    if name == "mosaic_gpu":
        for config in [] if small else mosaic_options(shape, 5, *FORMATS[0]):
            error_of = functools.partial(product_error, name, shape, *FORMATS[0], 5, config)
            report.line(check="product", kernel=name, rows=5, config=label(config), **_checked(error_of))
    report.line(check="stack of mixed bits", kernel=name, **_checked(functools.partial(mixed_error, name, small)))
    for batch in (1, 2) if small else (1, 16):
        report.line(check="attention", batch=batch, **_checked(functools.partial(attention_error, batch, small)))


def _checked(error_of: Any) -> dict[str, Any]:
    begun = time.perf_counter()
    try:
        error = error_of()
    except Exception as failure:  # errors of a compiler or a driver belong into the report
        return {"failed": f"{type(failure).__name__}: {failure}"[:800]}
    return {"error": error, "right": bool(error < MAX_ERROR), "seconds": time.perf_counter() - begun}


def subnormals() -> dict[str, Any]:
    """A float16 product of subnormal numbers by XLA: exact if the tensor cores keep them, zero if they do not."""
    small = jnp.full((64, 64), 2.0**-20, jnp.float16)
    product = jax.jit(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.float32))
    result = np.asarray(product(small, jnp.full((64, 64), 1024.0, jnp.float16)))
    return {"kept": bool(np.all(result == 64 * 2.0**-10))}


def product_error(name: str, shape: Shape, bits: int, group_size: int, rows: int, config: Any = None) -> float:
    """Relative error of the worst row of x; rows differ in size by powers of two."""
    part, order = accelerator.random_part(shape, bits, group_size), accelerator.random_order(shape.inner)
    matrix = spqr_matmul.prepare(LAYOUTS[name], [part], order)
    return _worst_row(name, matrix, None, accelerator.formula(part, order), rows, config)


def mixed_error(name: str, small: bool) -> float:
    """Two matrices of different bits in one stack; the second one counts."""
    shape = Shape(96, 256) if small else Shape(1024, 2048)
    parts = [accelerator.random_part(shape, bits, seed=bits) for bits in (2, 3)]
    stack = spqr_matmul.stack([spqr_matmul.prepare("fragments", [part], None) for part in parts])
    return _worst_row(name, stack, jnp.int32(1), accelerator.formula(parts[1], None), 4, None)


def _worst_row(name: str, matrix: Any, index: Any, expected: np.ndarray, rows: int, config: Any) -> float:
    sizes = jnp.asarray([2.0 ** (5 * row % 21 - 10) for row in range(rows)])[:, None]
    x = accelerator.activations(rows, matrix.inner, jnp.float32) * sizes
    multiply = jax.jit(lambda x, w, i: spqr_matmul.matmul(x, w, i, implementation=name, config=config))
    result = np.asarray(multiply(x, matrix, index), np.float64)
    wanted = np.asarray(x, np.float64) @ expected.T
    return max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(result, wanted, strict=True))


def attention_error(batch: int, small: bool) -> float:
    """The attention kernel of this device, in bfloat16, against the same formula in float32; and its cache."""
    from pallas_kernels import attention

    heads, head_dim, length, start = (2, 16, 64, 33) if small else (32, 128, 2048, 1500)
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)

    qkv = draw(batch, 3 * heads * head_dim)
    keys, values = (draw(2, batch, heads, length, head_dim) for _ in range(2))
    angles = jnp.asarray(rng.uniform(0, 6, (batch, head_dim // 2)), jnp.float32)
    first = jnp.asarray(rng.integers(0, 20, batch), jnp.int32)
    sizes = {"heads": heads, "kv_heads": heads, "head_dim": head_dim, "rotated": head_dim, "scale": head_dim**-0.5}
    attend = jax.jit(functools.partial(attention.attend, **sizes), static_argnames="implementation")
    at = (jnp.cos(angles), jnp.sin(angles)), (jnp.int32(1), first, jnp.int32(start))
    result, new_keys, _ = attend(qkv, *at[0], keys, values, *at[1])
    with jax.default_matmul_precision("highest"):
        exact = [array.astype(jnp.float32) for array in (qkv, keys, values)]
        expected, expected_keys, _ = attend(exact[0], *at[0], *exact[1:], *at[1], implementation="xla")
    in_cache = relative_error(new_keys[1, :, :, start], np.asarray(expected_keys[1, :, :, start], np.float64))
    if in_cache > 8e-3:  # rounding to bfloat16 is 2e-3
        raise ValueError(f"the new keys in the cache are wrong: relative error {in_cache:.1e}")
    return relative_error(result, np.asarray(expected, np.float64)) / 4  # results are bfloat16, not float16
