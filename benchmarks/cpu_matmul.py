#!/usr/bin/env python3
"""Times the CPU kernels' matrix products against dense products, at the shapes of real models.

    python benchmarks/cpu_matmul.py                       # SmolLM2-135M and Llama-7B shapes, batch 1, 4, 16, 512
    python benchmarks/cpu_matmul.py --shapes 4096x4096 --batch 1 8 --bits 4 --plot roofline.png --csv products.csv

All rivals run in one process and take turns. A turn is one pass to warm up and then about 50 ms of products. Ratios are
ratios of medians, relative to the faster of XLA's two layouts of the dense float32 weight. Each rival cycles through
more matrices than fit into the cache, so at batch 1 the weights come from memory. The plot (a roofline) shows the
speeds beside the limits that memory and arithmetic set.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from roofline import roofline
from timings import UNKNOWN, ProductRow, add_csv_options, check_csv, save

import cpu_kernels
from spqr_jax import SpQRArray
from spqr_jax.layout import array_layout
from spqr_jax.packing import pack_codes
from spqr_jax.products import linear
from spqr_jax.products.cpu import pack_for_cpu
from spqr_jax.speed import read_bandwidth
from spqr_jax.terminal.display import console, number, table

SHAPES = {"SmolLM2-135M": ["576x576", "1536x576", "576x1536"], "Llama-7B": ["4096x4096", "11008x4096", "4096x11008"]}
OUTLIERS = 0.01
TURN = 0.05  # seconds


def random_array(shape: tuple[int, int], bits: int, seed: int = 0) -> SpQRArray:
    """Random codes, statistics and outliers in the format of the presets. Their values do not change the time."""
    rng = np.random.default_rng(seed)
    out, inner = shape
    layout = array_layout(shape, 16, 16)
    rows, cols = np.nonzero(rng.random(shape) < OUTLIERS)
    codes = rng.integers(0, 1 << bits, (out, layout.padded_in)).astype(np.uint8)
    stats_codes = [rng.integers(0, 8, (layout.groups, layout.padded_out)).astype(np.uint16) for _ in range(2)]
    stats = rng.uniform((0.001, -9, 0.2, -9), (0.01, -1, 0.6, -1), (layout.padded_out // 16, layout.groups, 4))
    return SpQRArray(
        codes=pack_codes(codes, bits),
        scale_codes=pack_codes(stats_codes[0], 3),
        zero_codes=pack_codes(stats_codes[1], 3),
        tile_stats=stats.astype(np.float16),
        outlier_cols=cols.astype(np.uint16),
        outlier_values=rng.standard_normal(len(rows)).astype(np.float16),
        outlier_row_ptr=np.searchsorted(rows, np.arange(out + 1)).astype(np.int32),
        perm=rng.permutation(inner).astype(np.uint16),
        shape=shape,
        bits=bits,
        group_size=16,
        stats_group_size=16,
        scale_bits=3,
        zero_bits=3,
    ).validate()


def copies(shape: tuple[int, int], batch: int, megabytes: float) -> int:
    """How many matrices a rival cycles through: at small batches, packed ones exceed the cache."""
    packed = shape[0] * shape[1] * 4.6 / 8
    return max(1, round(megabytes * 1e6 / packed)) if batch <= 16 else max(1, round(megabytes * 1e5 / packed))


def rivals(
    shape: tuple[int, int], batch: int, bits: int, count: int
) -> tuple[dict[str, Callable[[], Any]], dict[str, float]]:
    """The rivals as functions, and the bytes of weights that each reads."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((batch, shape[1])), jnp.float32)
    dense = [jnp.asarray(rng.standard_normal(shape, np.float32)) for _ in range(count)]
    packed = pack_for_cpu(random_array(shape, bits))
    packed_copies = [jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), packed) for _ in range(count)]
    rounded = [dataclasses.replace(w, int8_activations=True) for w in packed_copies]
    runs, read = {}, {}

    def add(name: str, product: Callable[[jax.Array, Any], jax.Array], weights: list[Any]) -> None:
        program = jax.jit(lambda x, weights: [product(x, w) for w in weights])
        runs[name] = lambda: jax.block_until_ready(program(x, weights))
        read[name] = float(sum(leaf.nbytes for leaf in jax.tree.leaves(weights)))

    add("dense float32", lambda x, w: linear(w, x), dense)
    add("dense float32, transposed", lambda x, w: x @ w, [w.T.copy() for w in dense])
    add("dense bfloat16", lambda x, w: linear(w, x.astype(jnp.bfloat16)), [w.astype(jnp.bfloat16) for w in dense])
    for kernels in cpu_kernels.kernel_names():
        for threads in (1, 0):
            label = f"{kernels}, {'1 thread' if threads else 'all threads'}"
            add(label, lambda x, w, k=kernels, t=threads: cpu_kernels.matmul(x, w, kernels=k, threads=t), packed_copies)
    best = cpu_kernels.kernel_names()[0]
    if batch <= 16:
        add(f"{best}, int8 activations", lambda x, w: cpu_kernels.matmul(x, w), rounded)
    return runs, read


def measure(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, np.ndarray]:
    """Seconds of every run of each rival."""
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            run()
            until = time.perf_counter() + TURN
            while (begun := time.perf_counter()) < until:
                run()
                seconds[name].append(time.perf_counter() - begun)
    return {name: np.array(values) for name, values in seconds.items()}


def measured(text: str, batch: int, given: argparse.Namespace, bandwidth: float) -> list[dict[str, Any]]:
    """The columns of `ProductRow` for all rivals at one shape and batch."""
    out, _, inner = text.partition("x")
    shape = (int(out), int(inner))
    count = copies(shape, batch, given.megabytes)
    runs, read = rivals(shape, batch, given.bits, count)
    seconds = measure(runs, given.rounds)
    base = min(float(np.median(seconds[name])) for name in runs if name.startswith("dense float32"))
    console.print(f"{text}, batch {batch}: {count} matrices, done")
    return [
        {
            "memory_gb_per_s": bandwidth,
            "bits": given.bits,
            "shape": text,
            "batch": batch,
            "rival": name,
            "median_ms": float(np.median(values)) / count * 1e3,
            "least_ms": float(values.min()) / count * 1e3,
            "ratio_to_dense_f32": base / float(np.median(values)),
            "gb_per_s": read[name] / float(np.median(values)) / 1e9,
            "weight_bytes": round(read[name] / count),
        }
        for name, values in seconds.items()
    ]


def show(rows: list[dict[str, Any]], bits: int) -> None:
    """Prints the table."""
    columns = ["shape", "batch", "rival", "median ms", "least ms", "× dense float32", "GB/s of weights"]
    lines = [
        [
            row["shape"],
            str(row["batch"]),
            row["rival"],
            number(row["median_ms"], 3),
            number(row["least_ms"], 3),
            number(row["ratio_to_dense_f32"], 2),
            number(row["gb_per_s"], 1),
        ]
        for row in rows
    ]
    table(f"{bits}-bit weights, {100 * OUTLIERS:.0f}% outliers", columns, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=[s for group in SHAPES.values() for s in group], help="OUTxIN")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4, 16, 512], help="rows of activations")
    parser.add_argument("--bits", type=int, default=3, choices=[2, 3, 4])
    parser.add_argument("--rounds", type=int, default=9, help="turns of each rival")
    parser.add_argument(
        "--megabytes", type=float, default=64, help="size of the packed weights that a rival cycles through"
    )
    parser.add_argument("--plot", type=Path, help="write the roofline plot to this PNG file (needs matplotlib)")
    add_csv_options(parser, "products.csv")
    given = parser.parse_args()
    check_csv(parser, given.csv, ProductRow)
    if why := cpu_kernels.why_unavailable():
        parser.exit(1, f"cpu_matmul: {why}\n")
    bandwidth = read_bandwidth()
    machine = f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}, {bandwidth:.1f} GB/s of memory"
    console.print(f"{machine}; kernels {', '.join(cpu_kernels.kernel_names())}")
    rows = [row for shape in given.shapes for batch in given.batch for row in measured(shape, batch, given, bandwidth)]
    show(rows, given.bits)
    save(given.csv, ProductRow, given, rows)
    if given.plot:
        unnamed = dict.fromkeys(
            ("machine", "processor", "kernels", "jax", "python", "date", "revision", "run"), UNKNOWN
        )
        roofline([ProductRow(cores=None, **unnamed, **row) for row in rows], given.plot)


if __name__ == "__main__":
    main()
