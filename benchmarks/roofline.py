"""The roofline figure: how fast products are beside what memory and arithmetic allow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from timings import ProductRow


def operations(row: ProductRow) -> float:
    """Multiplications and additions of a product."""
    out, _, inner = row.shape.partition("x")
    return 2.0 * row.batch * int(out) * int(inner)


def roofline(rows: Sequence[ProductRow], path: Path) -> None:
    """Draws operations per second against operations per byte of weights.

    The sloped line is the memory's bandwidth. The flat line is the fastest dense float32 product.

    Args:
      rows: of one machine and run, with times, bytes and the memory's bandwidth.
      path: PNG file to write.

    Raises:
      ValueError: there is no dense float32 product, or no bandwidth.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    points = [row for row in rows if row.median_ms and row.weight_bytes]
    dense = [_reached(row) for row in points if row.rival.startswith("dense float32")]
    if not dense or points[0].memory_gb_per_s is None:
        raise ValueError("the rows need a dense float32 product and the bandwidth of the memory")
    bandwidth, flat = points[0].memory_gb_per_s, max(dense)
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    intensity = np.geomspace(0.2, 4000, 200)
    axes.plot(intensity, np.minimum(bandwidth * intensity, flat), color="black", linewidth=1, label="upper limit")
    shown = [row for row in points if not row.rival.endswith("1 thread") and "transposed" not in row.rival]
    rivals = list(dict.fromkeys(row.rival for row in shown))
    for rival, colour, marker in zip(rivals, matplotlib.color_sequences["tab10"], "osD^vPX*<>", strict=False):
        series = [row for row in shown if row.rival == rival]
        per_byte = [operations(row) / row.weight_bytes for row in series if row.weight_bytes]
        reached = [_reached(row) for row in series]
        axes.scatter(per_byte, reached, s=22, color=colour, marker=marker, alpha=0.8, label=rival)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte of weights", ylabel="10⁹ operations per second")
    axes.set_title(f"memory {bandwidth:.0f} GB/s; fastest dense float32 product {flat:.0f}·10⁹/s", fontsize=10)
    axes.grid(which="both", alpha=0.2)
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def _reached(row: ProductRow) -> float:
    """10⁹ operations per second."""
    assert row.median_ms is not None
    return operations(row) / row.median_ms / 1e6
