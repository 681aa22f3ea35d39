#!/usr/bin/env python3
"""Predicts microseconds of products on GPUs from counted bytes, instructions and launches, beside what was measured.

    scripts/setup && .venv/bin/python benchmarks/gpu_model.py

A PREDICTION, unless a column says "measured". A product takes

    launches + layer's number + the longest of (first words + bytes, instruction issue, a multiprocessor) + end

Bytes are those of the prepared layout. Instructions of the loop come from tests/aot/budgets.json. "A multiprocessor" is
the package's own estimate (mosaic/estimate.py) of the way in which it cuts the product: all phases of a thread block,
preparing x and outliers included. The end is the sum over warps. The model knows nothing of clocks under load, or of
dependent instructions. For TPUs, and for `triton`, it gives an upper limit only: memory or instruction issue, whichever
is slower.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests" / "aot")]

import targets  # noqa: E402
from accelerator import Shape  # noqa: E402
from timings import AcceleratorRow, read  # noqa: E402
from tune_pallas import any_plan  # noqa: E402

from pallas_kernels.spqr_matmul import Target, tuning  # noqa: E402
from pallas_kernels.spqr_matmul.formats import BLOCK, STEP_COLUMNS, TILE, format_of  # noqa: E402
from pallas_kernels.spqr_matmul.mosaic import estimate  # noqa: E402

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
READING = 3.1 / 3.352  # bandwidth that an H100 reaches, of what its maker says
ISSUING = 0.8  # instructions issued, of four a clock and multiprocessor


@dataclasses.dataclass(frozen=True)
class Work:
    """What one product does.

    Attributes:
      bytes: read from memory.
      launches: kernels.
      instructions: of all warps together.
      multiprocessor: seconds that one multiprocessor needs for its thread blocks.
      numbered: whether the kernel reads the layer's number.
    """

    bytes: float
    launches: int = 1
    instructions: float = 0.0
    multiprocessor: float = 0.0
    numbered: bool = False


@dataclasses.dataclass(frozen=True)
class Terms:
    """Seconds of a product, term by term."""

    launch: float
    memory: float
    issue: float
    multiprocessor: float

    @property
    def total(self) -> float:
        """Of the three in the middle the longest counts."""
        return self.launch + max(FIRST + self.memory, self.issue, self.multiprocessor) + END


def predict(name: str, work: Work) -> Terms:
    """Seconds on a GPU of `targets.GPUS`."""
    device = targets.GPUS[name]
    return Terms(
        launch=work.launches * LAUNCH + work.numbered * NUMBER,
        memory=work.bytes / (device.bandwidth * READING),
        issue=work.instructions / (device.cores * 4 * device.clock * 1e9 * ISSUING),
        multiprocessor=work.multiprocessor,
    )


def dense(out: int, inner: int) -> Work:
    """A dense 16-bit product."""
    return Work(bytes=2 * out * inner)


def bits_a_weight(columns: int = SIZE) -> float:
    """Bits read per weight at 3 bits and groups of 16, with outliers: 32 each, and where those of a row begin."""
    words = format_of(3, BLOCK, second_level=True).step_words
    return 32 * words / (TILE * STEP_COLUMNS) + 32 * OUTLIERS + 4 * 32 / columns


def packed(name: str, out: int, inner: int, rows: int, budget: dict[str, Any]) -> Work:
    """A product by `mosaic_gpu` in one launch; `budget` was counted for so many rows of x."""
    return Work(
        bytes=out * inner * bits_a_weight(inner) / 8,
        launches=budget.get("launches", 1),
        instructions=budget["instructions_per_weight"] * out * inner / 32,
        multiprocessor=of_a_multiprocessor(name, out, inner, rows),
        numbered=True,
    )


@functools.cache
def of_a_multiprocessor(name: str, out: int, inner: int, rows: int) -> float:
    """Seconds that a multiprocessor needs for its thread blocks, as the package cuts this product."""
    device = targets.GPUS[name]
    target = Target("gpu", "", device.capability, device.cores)  # no name: what was tuned on a device is left out
    plan = any_plan(Shape(out, inner), rows, 3, BLOCK)
    cut = dataclasses.replace(plan, config=tuning.mosaic_config(target, plan))
    return 1e-6 * estimate.microseconds(cut, target)


def options_of(case: str) -> tuple[str, str, dict[str, str]]:
    """A case of budgets.json: device, kernel and options; an option without a value has an empty one."""
    name, kernel, *options = case.split()
    given: dict[str, str] = {}
    for option in options:
        if option.startswith("--"):
            given[option] = ""
        else:
            given[list(given)[-1]] = option
    return name, kernel, given


def budgets() -> Iterator[tuple[str, str, dict[str, str], dict[str, Any]]]:
    """(device, kernel, options, budget) of the cases with 3 bits and groups of 16."""
    for case, budget in json.loads((ROOT / "tests" / "aot" / "budgets.json").read_text())["cases"].items():
        name, kernel, given = options_of(case)
        if name in TITLES and not {"--bits", "--group-size", "--halves"} & set(given):
            yield name, kernel, given, budget


HEADER = [
    *("device", "kernel", "rows of x", "counted", "memory µs", "issue µs", "a multiprocessor µs", "predicted µs"),
    *("dense: predicted", "× dense"),
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
            terms = predict(name, packed(name, SIZE, SIZE, int(batch), budget))
            base = predict(name, dense(SIZE, SIZE))
            if kernel == "triton":  # XLA adds up its partial sums and the outliers: launches were not counted
                figures = _limit(terms.memory, terms.issue, base.memory)
            else:
                seconds = (terms.memory, terms.issue, terms.multiprocessor, terms.total, base.total)
                figures = [*_microseconds(*seconds), f"{base.total / terms.total:.1f}×"]
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
        "",
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
            predicted = predict("h100", packed("h100", out, inner, batch, budget)).total
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
    from spqr_jax.terminal.display import table

    bits = f"{bits_a_weight():.2f}"
    table(f"PREDICTED, 4096 x 4096; {bits} bits per weight with 1% outliers", HEADER, rows_of_table())
    table("products on an H100", PRODUCTS_HEADER, products_of_h100())
    table("the model against measurements on an H100", CHECK_HEADER, check())


if __name__ == "__main__":
    main()
