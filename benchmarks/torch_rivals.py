#!/usr/bin/env python3
"""Times the same products with PyTorch, in CUDA graphs: cuBLAS, tinygemm int4, and the CUDA kernel of spqr_quant.

    benchmarks/torch_rivals.py 4096x4096 1

prints one line of JSON: {rival: seconds per product}, or the reason in place of seconds. Without arguments it answers
one such line for each line of standard input, so that another process can take turns with it. Needs PyTorch with CUDA.
Packages spqr_quant and spqr_jax are used if they are there.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["JAX_PLATFORMS"] = "cpu"  # JAX only packs matrices here

import numpy as np  # noqa: E402

CACHE_BYTES = 256 << 20
REPEATS = 9
GROUP_SIZES = (32, 128)


def graph_seconds(calls: list[Callable[[], Any]]) -> float:
    """Median seconds of one call: all of them in one CUDA graph that is replayed."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(REPEATS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3 / len(calls))
    return float(np.median(times))


def copies(array: Any) -> list[Any]:
    """Copies of a tensor that exceed the cache together."""
    return [array.clone() for _ in range(min(64, max(2, CACHE_BYTES // array.nbytes + 1)))]


def cublas(out: int, inner: int, rows: int) -> float:
    """A dense bfloat16 product."""
    import torch

    matrices = copies(torch.randn(out, inner, device="cuda", dtype=torch.bfloat16) * 0.02)
    x = torch.randn(rows, inner, device="cuda", dtype=torch.bfloat16)
    return graph_seconds([functools.partial(torch.nn.functional.linear, x, w) for w in matrices])


def tinygemm(out: int, inner: int, rows: int, group: int) -> float:
    """PyTorch's int4 product: bfloat16 scale and zero point of every group."""
    import torch

    codes = torch.randint(0, 256, (out, inner // 2), device="cuda", dtype=torch.uint8)
    matrices = copies(torch.ops.aten._convert_weight_to_int4pack(codes, 8))
    statistics = torch.randn(inner // group, out, 2, device="cuda", dtype=torch.bfloat16) * 0.01
    x = torch.randn(rows, inner, device="cuda", dtype=torch.bfloat16)
    multiply = torch.ops.aten._weight_int4pack_mm
    return graph_seconds([functools.partial(multiply, x, w, group, statistics) for w in matrices])


def spqr_quant(out: int, inner: int, rows: int) -> float:
    """The CUDA kernel of the SpQR authors; it takes one row of x."""
    import torch
    from spqr_quant import inference
    from support.arrays import random_array

    from spqr_jax.formats.hf_spqr import pack_words

    if rows != 1:
        raise NotImplementedError("it multiplies one row at a time")
    packed = pack_words(random_array((out, inner), outliers=0.01))
    fields = (packed.dense_weights, packed.row_offsets, packed.col_vals, packed.in_perm)
    words, offsets, sparse, order = (torch.from_numpy(np.ascontiguousarray(field)).cuda() for field in fields)
    x = torch.randn(inner, device="cuda", dtype=torch.float16)
    y = torch.empty(out, device="cuda", dtype=torch.float16)
    flag = int(inference.FeatureFlags.SPARSE_FUSED_FP32_ASYNC)

    def multiply(words: Any) -> None:
        inference.call_spqr_mul_fused(
            out, inner, 3, 16, 16, order, words, offsets, sparse, sparse.shape[0], x, flag, y, y
        )

    return graph_seconds([functools.partial(multiply, each) for each in copies(words)])


@functools.cache
def rivals() -> dict[str, Callable[[int, int, int], float]]:
    """What can be measured here, by name."""
    import importlib.util

    chosen: dict[str, Callable[[int, int, int], float]] = {"cuBLAS bfloat16": cublas}
    chosen |= {f"tinygemm int4 g{group}": functools.partial(tinygemm, group=group) for group in GROUP_SIZES}
    if importlib.util.find_spec("spqr_quant"):
        chosen["spqr_quant"] = spqr_quant
    return chosen


def answer(line: str) -> dict[str, float | str]:
    """Seconds of every rival for ``OUTxIN ROWS``."""
    shape, rows = line.split()
    out, inner = map(int, shape.split("x"))
    results: dict[str, float | str] = {}
    for name, rival in rivals().items():
        try:
            results[name] = rival(out, inner, int(rows))
        except Exception as error:  # one rival that fails must not hide the others
            results[name] = f"{type(error).__name__}: {error}"[:300]
    import torch

    torch.cuda.empty_cache()
    return results


def main() -> int:
    import torch

    if not torch.cuda.is_available():
        print(f"torch_rivals: PyTorch {torch.__version__} finds no CUDA device", file=sys.stderr)
        return 1
    lines = [" ".join(sys.argv[1:3])] if len(sys.argv) == 3 else sys.stdin
    for line in lines:
        print(json.dumps(answer(line)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
