#!/usr/bin/env python3
"""The native CPU kernels against dense products, at the shapes of real models.

    python benchmarks/cpu_matmul.py                       # SmolLM2-135M and Llama-7B shapes, batch 1, 4, 16, 512
    python benchmarks/cpu_matmul.py --shapes 4096x4096 --batch 1 8 --bits 4 --plot roofline.png

All rivals run in one process, one after the other, round after round; a ratio is of
medians. A turn lasts some 50 ms after a warm-up, as generation goes on for a while, too.
A rival multiplies as many different matrices as exceed the cache, so batch 1 measures
memory as well. The plot sets what was reached beside what memory and arithmetic allow. The
dense float32 rival is the faster of XLA's two layouts.
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

import cpu_kernels
from spqr_jax import SpQRArray
from spqr_jax.cli.display import console, number, table
from spqr_jax.layout import array_layout
from spqr_jax.linear import linear, pack_for_cpu
from spqr_jax.packing import pack_codes
from spqr_jax.speed import read_bandwidth

SHAPES = {"SmolLM2-135M": ["576x576", "1536x576", "576x1536"], "Llama-7B": ["4096x4096", "11008x4096", "4096x11008"]}
OUTLIERS = 0.01
TURN = 0.05  # seconds


def random_array(shape: tuple[int, int], bits: int, seed: int = 0) -> SpQRArray:
    """Codes, statistics and outliers at random in the format of the presets: what they say does not change the time."""
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
        nnz=len(rows),
    ).validate()


def copies(shape: tuple[int, int], batch: int, megabytes: int) -> int:
    """Matrices a rival goes through: packed ones to exceed the cache at small batches."""
    packed = shape[0] * shape[1] * 4.6 / 8
    return max(1, round(megabytes * 1e6 / packed)) if batch <= 16 else max(1, round(megabytes * 1e5 / packed))


def rivals(
    shape: tuple[int, int], batch: int, bits: int, count: int
) -> tuple[dict[str, Callable[[], Any]], dict[str, float]]:
    """What runs, and the bytes of weights that each reads."""
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
    """Seconds of each rival's every run, turn after turn."""
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


@dataclasses.dataclass(frozen=True)
class Point:
    """A rival at one shape and batch: seconds a product (median), bytes of weights and operations in it."""

    shape: str
    batch: int
    name: str
    seconds: float
    read: float
    operations: float


def roofline(points: list[Point], bandwidth: float, path: Path) -> None:
    """Operations a second against operations a byte of weights, under the roof of this machine's memory.

    The flat part is the best dense float32 product of the largest batch: what XLA gets out of the arithmetic.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    flat = max(p.operations / p.seconds for p in points if p.name.startswith("dense float32")) / 1e9
    intensity = np.geomspace(0.2, 4000, 200)
    axes.plot(intensity, np.minimum(bandwidth * intensity, flat), color="black", linewidth=1, label="roof")
    shown = [p for p in points if not p.name.endswith("1 thread") and "transposed" not in p.name]
    names = list(dict.fromkeys(p.name for p in shown))
    for name, colour, marker in zip(names, pyplot.get_cmap("tab10").colors, "osD^vPX*<>", strict=False):
        own = [p for p in shown if p.name == name]
        reached = [p.operations / p.seconds / 1e9 for p in own]
        intensity = [p.operations / p.read for p in own]
        axes.scatter(intensity, reached, s=22, color=colour, marker=marker, alpha=0.8, label=name)
    axes.set(xscale="log", yscale="log", xlabel="operations a byte of weights", ylabel="10⁹ operations a second")
    axes.set_title(f"{bandwidth:.0f} GB/s of memory; flat: best dense float32 product, {flat:.0f}", fontsize=10)
    axes.grid(which="both", alpha=0.2)
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=[s for group in SHAPES.values() for s in group])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4, 16, 512])
    parser.add_argument("--bits", type=int, default=3, choices=[2, 3, 4])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--megabytes", type=int, default=64, help="of packed weights that a rival goes through")
    parser.add_argument("--out", type=Path, help="write the table here as Markdown")
    parser.add_argument("--plot", type=Path, help="write the roofline plot here (needs matplotlib)")
    given = parser.parse_args()
    if why := cpu_kernels.why_unavailable():
        parser.exit(1, f"cpu_matmul: {why}\n")
    bandwidth = read_bandwidth()
    machine = f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}, {bandwidth:.1f} GB/s of memory"
    console.print(f"{machine}; kernels {', '.join(cpu_kernels.kernel_names())}")
    lines: list[list[str]] = []
    points: list[Point] = []
    for text in given.shapes:
        out, _, inner = text.partition("x")
        shape = (int(out), int(inner))
        for batch in given.batch:
            count = copies(shape, batch, given.megabytes)
            runs, read = rivals(shape, batch, given.bits, count)
            seconds = measure(runs, given.rounds)
            base = min(float(np.median(seconds[name])) for name in runs if name.startswith("dense float32"))
            for name, values in seconds.items():
                median, least = float(np.median(values)), float(values.min())
                operations = 2.0 * batch * shape[0] * shape[1]
                points.append(Point(text, batch, name, median / count, read[name] / count, operations))
                lines.append(
                    [
                        text,
                        str(batch),
                        name,
                        number(median / count * 1e3, 3),
                        number(least / count * 1e3, 3),
                        number(base / median, 2),
                        number(read[name] / median / 1e9, 1),
                    ]
                )
            console.print(f"{text}, batch {batch}: {count} matrices, done")
    columns = ["shape", "batch", "what", "median ms", "least ms", "× dense float32", "GB/s of weights"]
    table(f"{given.bits}-bit weights, {100 * OUTLIERS:.0f}% outliers", columns, lines)
    if given.out:
        ruler = "|---|---:|---|" + "---:|" * 4
        rows = ["| " + " | ".join(line) + " |" for line in [columns, *lines]]
        given.out.write_text("\n".join([machine, "", rows[0], ruler, *rows[1:]]) + "\n")
    if given.plot:
        roofline(points, bandwidth, given.plot)


if __name__ == "__main__":
    main()
