"""Shared by the accelerator benchmarks: random matrices, the rivals of a product, and what the card's memory does."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from device_loop import MOST, Rival, matrices_for
from jax import lax

from pallas_kernels import spqr_matmul
from spqr_jax.packing import pack_codes, unpack_codes

LAYOUTS: dict[str, spqr_matmul.Layout] = {
    "mosaic_gpu": "fragments",
    "triton": "rows",
    "tpu": "lanes",
    "xla": "fragments",
}
OUTLIERS = 0.01
REFERENCE_BANDWIDTH = 3.1e12
"""Bytes per second that an H100 reads; times scaled to it can be compared between cards."""
_DISTINCT_ROWS = 1024  # random rows of a matrix; they repeat, for drawing more takes seconds and changes no time


@dataclasses.dataclass(frozen=True)
class Shape:
    """A matrix shape, ``OUTxIN`` on the command line."""

    out: int
    inner: int

    @staticmethod
    def parse(text: str) -> Shape:
        """Raises ValueError: the text is not OUTxIN."""
        out, _, inner = text.partition("x")
        return Shape(int(out), int(inner))

    def __str__(self) -> str:
        return f"{self.out}x{self.inner}"


def random_part(shape: Shape, bits: int = 3, group_size: int = 16, seed: int = 0) -> spqr_matmul.Part:
    """Random codes, statistics and outliers of one matrix."""
    rng = np.random.default_rng(seed)
    distinct = min(shape.out, _DISTINCT_ROWS)
    repeats = -(-shape.out // distinct)
    groups = -(-shape.inner // group_size)

    def rows_of(array: np.ndarray, rows: int) -> np.ndarray:
        return np.tile(array, (repeats, *[1] * (array.ndim - 1)))[:rows]

    counts = rng.binomial(shape.inner, OUTLIERS, distinct)
    columns = [np.sort(rng.choice(shape.inner, count, replace=False)) for count in counts]
    columns = [columns[row % distinct] for row in range(shape.out)]
    entries = sum(map(len, columns))
    tiles = rng.uniform((0.001, -9, 0.2, -9), (0.01, -1, 0.6, -1), (-(-distinct // 16), groups, 4))
    codes = rng.integers(0, 1 << bits, (distinct, groups * group_size), dtype=np.uint8)
    return spqr_matmul.Part(
        shape=(shape.out, shape.inner),
        bits=bits,
        group_size=group_size,
        codes=rows_of(pack_codes(codes, bits), shape.out),
        scale_codes=rows_of(rng.integers(0, 8, (distinct, groups), dtype=np.uint8), shape.out),
        zero_codes=rows_of(rng.integers(0, 8, (distinct, groups), dtype=np.uint8), shape.out),
        tile_stats=rows_of(tiles.astype(np.float16), -(-shape.out // 16)),
        scale=None,
        zero=None,
        row_ptr=np.concatenate([[0], np.cumsum([len(row) for row in columns])]).astype(np.int32),
        cols=np.concatenate(columns).astype(np.uint16 if shape.inner <= 1 << 16 else np.int32),
        values=rng.standard_normal(entries).astype(np.float16),
    )


def formula(part: spqr_matmul.Part, order: np.ndarray | None) -> np.ndarray:
    """The matrix [out, in] by the definition of the format, float64, in NumPy."""
    out, inner = part.shape
    codes = unpack_codes(part.codes, part.bits)[:out, :inner].astype(np.float64)
    step, origin, zero_step, zero_origin = np.moveaxis(
        np.repeat(part.tile_stats.astype(np.float64), 16, 0)[:out], -1, 0
    )
    scale, zero = step * (part.scale_codes - origin), zero_step * (part.zero_codes - zero_origin)
    scale, zero = (np.repeat(each, part.group_size, axis=1)[:, :inner] for each in (scale, zero))
    packed = scale * (codes - zero)
    packed[np.repeat(np.arange(out), np.diff(part.row_ptr)), part.cols] += part.values.astype(np.float64)
    matrix = np.empty_like(packed)
    matrix[:, slice(None) if order is None else order] = packed
    return matrix


def random_order(inner: int) -> np.ndarray:
    """A permutation of the columns, int32."""
    return np.random.default_rng(2).permutation(inner).astype(np.int32)


def packed_rival(
    name: str,
    shape: Shape,
    *,
    bits: int = 3,
    group_size: int = 16,
    most: int = MOST,
) -> Rival:
    """A kernel with a stack of equal random matrices. x is in their order already, by the operation before."""
    matrix = spqr_matmul.prepare(LAYOUTS[name], [random_part(shape, bits, group_size)], None)
    count = matrices_for(matrix.nbytes, most)
    multiply = functools.partial(_multiply, name=name, config=None)
    if matrix.layout == "fragments":
        return Rival(name, multiply, spqr_matmul.stack([matrix] * count), count, matrix.nbytes)
    copies = [jax.tree.map(jnp.copy, matrix) for _ in range(count)]
    return Rival(name, _of_a_list(multiply), copies, count, matrix.nbytes)


def configured(rival: Rival, name: str, config: Any, label: str) -> Rival:
    """A `packed_rival` of kernel `name` with another configuration, and the same matrices."""
    multiply = functools.partial(_multiply, name=name, config=config)
    return dataclasses.replace(
        rival, name=label, multiply=_of_a_list(multiply) if isinstance(rival.matrices, list) else multiply
    )


def _multiply(x: jax.Array, matrices: Any, index: Any, *, name: str, config: Any) -> jax.Array:
    index = None if index is None else jnp.asarray(index, jnp.int32)
    return spqr_matmul.matmul(x, matrices, index, implementation=name, config=config)


def _of_a_list(multiply: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    return lambda x, matrices, index: multiply(x, matrices[index], None)


def dense_rival(shape: Shape, most: int = MOST) -> Rival:
    """Dense bfloat16 products by XLA. Each matrix is an argument: XLA would copy those of a stack."""
    size = 2 * shape.out * shape.inner
    count = matrices_for(size, most)
    draw = jax.jit(lambda key: jax.random.normal(key, (shape.out, shape.inner), jnp.bfloat16) * shape.inner**-0.5)
    matrices = [draw(key) for key in jax.random.split(jax.random.key(0), count)]
    return Rival("dense bfloat16", lambda x, w, i: x @ w[i].T, matrices, count, size)


def activations(rows: int, inner: int, dtype: Any = jnp.bfloat16) -> jax.Array:
    """Random x [rows, in]."""
    return jnp.asarray(np.random.default_rng(1).standard_normal((rows, inner)), dtype)


def relative_error(result: jax.Array, expected: np.ndarray) -> float:
    """Frobenius norm of the difference, divided by the norm of `expected`."""
    return float(np.linalg.norm(np.asarray(result, np.float64) - expected) / np.linalg.norm(expected))


def bandwidth(megabytes: int = 1024, rounds: int = 5) -> dict[str, float]:
    """Bytes per second of the device's memory: ``copy`` counts what is read and written, ``read`` what is read."""
    x = jnp.ones((megabytes << 18,), jnp.float32)

    @functools.partial(jax.jit, donate_argnums=0, static_argnums=1)
    def copy(x: jax.Array, turns: int) -> jax.Array:
        return lax.fori_loop(0, turns, lambda i, x: lax.optimization_barrier(x * 1.0001), x)

    @functools.partial(jax.jit, static_argnums=1)
    def read(x: jax.Array, turns: int) -> jax.Array:
        return lax.fori_loop(0, turns, lambda i, least: jnp.min(x + least) * 0.5, jnp.float32(0))

    def seconds(run: Any) -> float:
        jax.block_until_ready(run(4)), jax.block_until_ready(run(8))  # compiled before the clock runs
        taken = []
        for _ in range(rounds):
            times = []
            for turns in (4, 8):
                begun = time.perf_counter()
                jax.block_until_ready(run(turns))
                times.append(time.perf_counter() - begun)
            taken.append(max(times[1] - times[0], 1e-9) / 4)
        return float(np.median(taken))

    size = x.nbytes
    reading = size / seconds(lambda turns: read(x, turns))
    state = [x]

    def copied(turns: int) -> jax.Array:
        state[0] = copy(state[0], turns)
        return state[0]

    return {"read": reading, "copy": 2 * size / seconds(copied)}
