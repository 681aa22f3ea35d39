"""Shared by the accelerator benchmarks: random matrices, and timed products that take turns."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import spqr_matmul
from spqr_jax.packing import pack_codes

LAYOUTS: dict[str, spqr_matmul.Layout] = {"mosaic_gpu": "fragments", "triton": "rows", "tpu": "lanes"}
CACHE_BYTES = 256 << 20  # all matrices of a rival together exceed any cache, as in a model
OUTLIERS = 0.01


def prepared(
    shape: tuple[int, int], layout: spqr_matmul.Layout, bits: int = 3, group_size: int = 16, seed: int = 0
) -> spqr_matmul.Prepared:
    """Random codes, statistics and outliers. Their values do not change the time."""
    rng = np.random.default_rng(seed)
    out, inner = shape
    groups = -(-inner // group_size)
    counts = rng.binomial(inner, OUTLIERS, out)
    columns = np.concatenate([np.sort(rng.choice(inner, n, replace=False)) for n in counts])
    tiles = rng.uniform((0.001, -9, 0.2, -9), (0.01, -1, 0.6, -1), (-(-out // 16), groups, 4))
    codes = rng.integers(0, 1 << bits, (out, groups * group_size), dtype=np.uint8)
    part = spqr_matmul.Part(
        shape=shape,
        bits=bits,
        group_size=group_size,
        codes=pack_codes(codes, bits),
        scale_codes=rng.integers(0, 8, (out, groups), dtype=np.uint8),
        zero_codes=rng.integers(0, 8, (out, groups), dtype=np.uint8),
        tile_stats=tiles.astype(np.float16),
        scale=None,
        zero=None,
        row_ptr=np.concatenate([[0], np.cumsum(counts)]),
        cols=columns.astype(np.uint16 if inner <= 1 << 16 else np.int32),
        values=rng.standard_normal(len(columns)).astype(np.float16),
    )
    return spqr_matmul.prepare(layout, [part], rng.permutation(inner).astype(np.int32))


def copies(matrix: Any, most: int = 64) -> list[Any]:
    """Copies of a matrix, enough to exceed the caches."""
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(matrix))
    count = int(min(most, max(1, -(-CACHE_BYTES // size))))
    return [jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), matrix) for _ in range(count)]


def product(
    multiply: Callable[[jax.Array, Any], jax.Array], x: jax.Array, matrices: Sequence[Any]
) -> tuple[Callable[[], Any], int]:
    """A compiled function that multiplies by all matrices, and its number of products."""
    program = jax.jit(lambda x, ws: [multiply(x, w) for w in ws])
    return lambda: jax.block_until_ready(program(x, list(matrices))), len(matrices)


def take_turns(runs: dict[str, tuple[Callable[[], Any], int]], turns: int, seconds: float = 0.05) -> dict[str, float]:
    """Seconds per product of each rival: the median over all its runs, in turns, after a run to warm up."""
    for run, _ in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(turns):
        for name, (run, count) in runs.items():
            until = time.perf_counter() + seconds
            while (begun := time.perf_counter()) < until or not times[name]:
                run()
                times[name].append((time.perf_counter() - begun) / count)
    return {name: float(np.median(values)) for name, values in times.items()}


def relative_error(got: jax.Array, want: np.ndarray) -> float:
    """Frobenius norm of the difference, divided by the norm of `want`."""
    return float(np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want))


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
