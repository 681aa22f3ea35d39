#!/usr/bin/env python3
"""Predicts microseconds of products on GPUs from counted bytes, instructions and launches, beside what was measured.

    scripts/setup && .venv/bin/python benchmarks/gpu_model.py

A PREDICTION, unless a column says "measured". A product takes

    launches + layer's number + the longest of (first words + bytes, instruction issue, shared memory) + end

Bytes are those of the prepared layout. Instructions, and accesses of shared memory where they were counted, come from
tests/aot/budgets.json. The end is half of a warp's last step, and the sum over warps. The model knows nothing of
clocks under load, of waits between phases, or of dependent instructions. For TPUs, and for `triton`, it gives an upper
limit only: memory or instruction issue, whichever is slower.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests" / "aot")]

import targets  # noqa: E402
from timings import AcceleratorRow, read  # noqa: E402

from pallas_kernels.spqr_matmul.formats import BLOCK, STEP_COLUMNS, TILE, format_of  # noqa: E402

OUTLIERS = 0.01
SIZE = 4096  # rows and columns of the matrix in the table of all devices
SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))
TITLES = {"a100": "A100 80GB", "rtx4090": "RTX 4090", "h100": "H100 SXM", "b200": "B200", "v5e": "TPU v5e"}
TPU_BANDWIDTH = {"v5e": 819e9}
TPU_CLOCK = {"v5e": 1.5e9}  # bundles per second
MEASURED = ROOT / "benchmarks" / "results" / "accelerator.csv"

LAUNCH = 2.2e-6  # a kernel in a CUDA graph, from its begin to the begin of the next, if it does nothing
NUMBER = 0.3e-6  # to read the layer's number before a kernel knows where its words are
FIRST = 0.7e-6  # until the first words are there
END = 0.4e-6  # sum over warps, store
CLUSTER = 0.4e-6  # sum over a cluster
READING = 3.1 / 3.352  # bandwidth that an H100 reaches, of what its maker says
ISSUING = 0.8  # instructions issued, of four a clock and multiprocessor


@dataclasses.dataclass(frozen=True)
class Work:
    """What one product does.

    Attributes:
      bytes: read from memory.
      launches: kernels.
      instructions: of all warps together.
      wavefronts: of shared memory, of a multiprocessor's blocks together.
      numbered: whether the kernel reads the layer's number.
      clustered: whether thread blocks of a cluster add up.
      last: share of the instructions that runs after the last words came.
    """

    bytes: float
    launches: int = 1
    instructions: float = 0.0
    wavefronts: float = 0.0
    numbered: bool = False
    clustered: bool = False
    last: float = 0.0


@dataclasses.dataclass(frozen=True)
class Terms:
    """Seconds of a product, term by term."""

    launch: float
    memory: float
    issue: float
    shared: float
    end: float

    @property
    def total(self) -> float:
        """Of the three in the middle the longest counts."""
        return self.launch + max(FIRST + self.memory, self.issue, self.shared) + self.end


def predict(name: str, work: Work) -> Terms:
    """Seconds on a GPU of `targets.GPUS`."""
    device = targets.GPUS[name]
    clock = device.clock * 1e9
    issue = work.instructions / (device.cores * 4 * clock * ISSUING)
    return Terms(
        launch=work.launches * LAUNCH + work.numbered * NUMBER,
        memory=work.bytes / (device.bandwidth * READING),
        issue=issue,
        shared=work.wavefronts / clock,
        end=work.last * issue + END + work.clustered * CLUSTER,
    )


def dense(out: int, inner: int) -> Work:
    """A dense 16-bit product."""
    return Work(bytes=2 * out * inner)


def bits_a_weight(columns: int = SIZE) -> float:
    """Bits read per weight at 3 bits and groups of 16, with outliers: 32 each, and where those of a row begin."""
    words = format_of(3, BLOCK, second_level=True).step_words
    return 32 * words / (TILE * STEP_COLUMNS) + 32 * OUTLIERS + 4 * 32 / columns


def packed(out: int, inner: int, budget: dict[str, Any]) -> Work:
    """A product by the kernel of which `budget` was counted."""
    warps, blocks = budget.get("warps", 16), budget.get("blocks", 128)
    steps = -(-inner // STEP_COLUMNS)
    tiles = -(-out // TILE)
    around = budget.get("prepare_instructions", 0) + budget.get("end_instructions", 0)
    return Work(
        bytes=out * inner * bits_a_weight(inner) / 8,
        launches=budget.get("launches", 1),
        instructions=budget["instructions_per_weight"] * out * inner / 32 + around * warps * blocks,
        wavefronts=budget.get("shared_wavefronts", 0),
        numbered=True,
        clustered=budget.get("cluster", 1) > 1,
        last=0.5 * warps * blocks / (tiles * steps),
    )


def budgets() -> Iterator[tuple[str, str, dict[str, str], dict[str, Any]]]:
    """(device, kernel, options, budget) of the cases with 3 bits and groups of 16."""
    for case, budget in json.loads((ROOT / "tests" / "aot" / "budgets.json").read_text())["cases"].items():
        name, kernel, *options = case.split()
        given = dict(zip(options[::2], options[1::2], strict=True))
        if name in TITLES and not {"--bits", "--group-size", "--row-blocks"} & set(given):
            yield name, kernel, given, budget


HEADER = [
    "device",
    "kernel",
    "rows of x",
    "counted",
    "memory µs",
    "issue µs",
    "predicted µs",
    "dense: predicted",
    "× dense",
]


def rows_of_table() -> list[list[str]]:
    """Predictions for 4096 x 4096 on every device, as text under `HEADER`."""
    rows = []
    for name, kernel, given, budget in budgets():
        batch = given.get("--batch", "1")
        if kernel == "tpu":
            counted = f"{budget['weights_per_bundle']:.0f} weights per bundle"
            rows.append([TITLES[name], kernel, batch, counted, *_limit_of_tpu(name, budget["weights_per_bundle"])])
        elif kernel in ("mosaic_gpu", "triton"):
            counted = f"{budget['instructions_per_weight']:.2f} instructions per weight"
            terms, base = predict(name, packed(SIZE, SIZE, budget)), predict(name, dense(SIZE, SIZE))
            if kernel == "triton":  # XLA adds up its partial sums and the outliers: launches were not counted
                figures = _limit(terms.memory, terms.issue, base.memory)
            else:
                figures = [*_microseconds(terms.memory, terms.issue, terms.total, base.total)]
                figures.append(f"{base.total / terms.total:.1f}×")
            rows.append([TITLES[name], kernel, batch, counted, *figures])
    order = list(TITLES.values())
    return sorted(rows, key=lambda row: (order.index(row[0]), row[1], int(row[2])))


def _microseconds(*seconds: float) -> list[str]:
    return [f"{1e6 * value:.1f}" for value in seconds]


def _limit(memory: float, issue: float, base: float) -> list[str]:
    """Memory or issue alone: no launches, no latency."""
    longest = max(memory, issue)
    return [
        *_microseconds(memory, issue),
        f"at least {1e6 * longest:.1f}",
        *_microseconds(base),
        f"≤ {base / longest:.1f}×",
    ]


def _limit_of_tpu(name: str, rate: float) -> list[str]:
    weights = SIZE * SIZE
    memory, base = (weights * bits / 8 / TPU_BANDWIDTH[name] for bits in (bits_a_weight(), 16))
    return _limit(memory, weights / (rate * TPU_CLOCK[name]), base)


PRODUCTS_HEADER = [
    *("shape", "rows of x", "predicted µs", "measured µs"),
    *("dense: predicted", "dense: measured", "tinygemm int4 g128: measured", "spqr_quant: measured"),
]
RIVALS = ("cuBLAS", "tinygemm int4 g128", "spqr_quant")


def products_of_h100() -> list[list[str]]:
    """Products on an H100 as text under `PRODUCTS_HEADER`, predictions beside measurements."""
    measured = measurements()
    counted = {int(given.get("--batch", 1)): b for name, kernel, given, b in budgets() if (name, kernel) == OURS}
    rows = []
    for out, inner in SHAPES:
        for batch, budget in sorted(counted.items()):
            predicted = predict("h100", packed(out, inner, budget)).total
            base = predict("h100", dense(out, inner)).total
            of_shape = {rival: measured.get((f"{out}x{inner}", batch, rival)) for rival in ("mosaic_gpu", *RIVALS)}
            seen = {rival: "not measured" if us is None else f"{us:.1f}" for rival, us in of_shape.items()}
            ours = [f"{1e6 * predicted:.1f}", seen["mosaic_gpu"], f"{1e6 * base:.1f}"]
            rows.append([f"{out} × {inner}", str(batch), *ours, *(seen[rival] for rival in RIVALS)])
    return rows


OURS = ("h100", "mosaic_gpu")


def measurements() -> dict[tuple[str, int, str], float]:
    """{(shape, rows of x, rival): µs} of the last run on an H100."""
    rows = [row for row in read(MEASURED, AcceleratorRow) if "H100" in row.machine] if MEASURED.exists() else []
    return {(row.shape, row.batch, row.rival): row.median_us for row in rows if row.median_us is not None}


# The release before layers in a loop: a decoding step of two layers of Llama-7B's shape, context 161, on an H100
LAYER_WEIGHTS = 4 * 4096 * 4096 + 3 * 4096 * 11008
OLD_INSTRUCTIONS = 3.16  # per weight
OLD_LAYERS = {"dense bfloat16": (266.0, 16.0, 23), "packed, first release": (222.0, 4.09, 40)}
"""{model: (measured µs a layer, bits per weight, launches a layer counted in the optimized HLO)}"""
TINYGEMM_BITS = {32: 5.0, 128: 4.25}
CHECK_HEADER = ["what", "rows of x", "predicted µs", "measured µs", "measured / predicted"]


def check() -> list[list[str]]:
    """The model against what was measured on an H100, as text under `CHECK_HEADER`."""
    measured = measurements()
    rows = []
    for out, inner in SHAPES:
        works = {"cuBLAS": dense(out, inner)}
        works |= {f"tinygemm int4 g{g}": Work(bytes=out * inner * bits / 8) for g, bits in TINYGEMM_BITS.items()}
        for rival, work in works.items():
            if (us := measured.get((f"{out}x{inner}", 1, rival))) is not None:
                rows.append(_compared(f"{rival}, {out} × {inner}", "1", 1e6 * predict("h100", work).total, us))
    for name, (us, bits, launches) in OLD_LAYERS.items():
        instructions = OLD_INSTRUCTIONS * LAYER_WEIGHTS / 32 if bits < 16 else 0.0
        work = Work(bytes=LAYER_WEIGHTS * bits / 8, launches=launches, instructions=instructions)
        terms = predict("h100", work)
        rows.append(_compared(f"a layer, {name}: products and launches", "1", 1e6 * terms.total, us))
    return rows


def _compared(what: str, batch: str, predicted: float, us: float) -> list[str]:
    return [what, batch, f"{predicted:.1f}", f"{us:.1f}", f"{us / predicted:.2f}"]


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    from spqr_jax.cli.display import table

    bits = f"{bits_a_weight():.2f}"
    table(f"PREDICTED, 4096 x 4096; {bits} bits per weight with 1% outliers", HEADER, rows_of_table())
    table("products on an H100", PRODUCTS_HEADER, products_of_h100())
    table("the model against measurements on an H100", CHECK_HEADER, check())


if __name__ == "__main__":
    main()
