#!/usr/bin/env python3
"""Predicts an upper limit for the speed of the GPU and TPU kernels from counted bytes and instructions (a roofline).

    scripts/setup && .venv/bin/python benchmarks/gpu_model.py

This is a PREDICTION, not a measurement. Bandwidth and issue rate are the manufacturers' figures. Bytes are those of the
prepared layout and of the partial sums, as if these went through memory. Instructions are those of the compiled inner
loop (tests/aot/budgets.json). Latency, kernel launches, activations and power limits are not modelled. The dense
product is assumed to reach the full bandwidth.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "aot")]

import targets  # noqa: E402

from pallas_kernels.spqr_matmul import Target, fragments, tuning  # noqa: E402
from spqr_jax.cli.display import number, table  # noqa: E402

OUTLIERS = 0.01
SIZE = 4096  # rows and columns of the matrix
TITLES = {"a100": "A100 80GB", "rtx4090": "RTX 4090", "h100": "H100 SXM", "b200": "B200", "v5e": "TPU v5e"}
TPU_BANDWIDTH = {"v5e": 819e9}
TPU_CLOCK = {"v5e": 1.5e9}  # bundles per second


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One kernel on one device, in weights per second."""

    memory: float  # weights per second that the memory can deliver
    issue: float  # weights per second that the cores can process
    dense: float  # weights per second of a dense 16-bit product at full bandwidth

    @property
    def ceiling(self) -> float:
        """Speed relative to dense 16-bit."""
        return min(self.memory, self.issue) / self.dense


def bits_a_weight(layout: str) -> float:
    """Bits read per weight at 3 bits and groups of 16, with outliers and their padding."""
    # the other layouts: codes, one byte of scale and zero code, four float16 per tile
    dense = fragments.bits_a_weight(3, 16) if layout == "fragments" else 3 + 8 / 16 + 64 / 256
    filling = 1.5 * 32 / SIZE  # padding: on average half a chunk of four per row
    starts = 32 / SIZE
    return dense + 32 * OUTLIERS + filling + starts


def bits_of_sums(name: str, kernel: str, batch: int) -> float:
    """Bits per weight of partial sums, written and read again because several thread blocks share a row."""
    device = targets.GPUS[name]
    target = Target("gpu", device.name, device.capability, device.cores)
    problem = tuning.Problem(batch, SIZE, SIZE, 3, 16)
    config = (tuning.mosaic_config if kernel == "mosaic_gpu" else tuning.triton_config)(target, problem)
    return 2 * 32 * batch * config.splits / SIZE


def gpu(name: str, kernel: str, batch: int, instructions: float) -> Prediction:
    """From instructions per weight: a core issues the instructions of four warps per clock."""
    device = targets.GPUS[name]
    issue = device.cores * 4 * 32 * device.clock * 1e9 / instructions
    bits = bits_a_weight("fragments") + bits_of_sums(name, kernel, batch)
    return Prediction(device.bandwidth * 8 / bits, issue, device.bandwidth / 2)


def tpu(name: str, weights_per_bundle: float) -> Prediction:
    """From weights per bundle: a core issues one bundle per clock."""
    memory = TPU_BANDWIDTH[name] * 8 / bits_a_weight("lanes")
    return Prediction(memory, weights_per_bundle * TPU_CLOCK[name], TPU_BANDWIDTH[name] / 2)


def predictions() -> list[tuple[str, str, int, str, Prediction]]:
    """(device, kernel, batch, counted, prediction) for the cases of budgets.json with 3 bits and groups of 16."""
    budgets = json.loads((ROOT / "tests" / "aot" / "budgets.json").read_text())["cases"]
    rows = []
    for case, budget in budgets.items():
        name, kernel, *options = case.split()
        given = dict(zip(options[::2], options[1::2], strict=True))
        if set(given) - {"--batch", "--splits"} or name not in TITLES:
            continue
        batch = int(given.get("--batch", 1))
        if kernel == "tpu":
            rate = budget["weights_per_bundle"]
            rows.append((name, kernel, batch, f"{rate:.0f} weights per bundle", tpu(name, rate)))
        else:
            count = budget["instructions_per_weight"]
            rows.append((name, kernel, batch, f"{count:.2f} instructions per weight", gpu(name, kernel, batch, count)))
    return sorted(rows, key=lambda row: (list(TITLES).index(row[0]), row[1], row[2]))


HEADER = ["device", "kernel", "rows of x", "counted", "memory allows", "instruction issue allows", "predicted ceiling"]


def rows_of_table() -> list[list[str]]:
    """The predictions as text, under `HEADER`."""
    return [
        [
            TITLES[name],
            kernel,
            str(batch),
            counted,
            f"{number(p.memory / p.dense, 2)}×",
            f"{number(p.issue / p.dense, 2)}×",
            f"{number(p.ceiling, 2)}×",
        ]
        for name, kernel, batch, counted, p in predictions()
    ]


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    bits = f"{bits_a_weight('fragments'):.2f}"
    table(
        f"PREDICTED speed, × a dense 16-bit product; {bits} bits per weight with 1% outliers", HEADER, rows_of_table()
    )


if __name__ == "__main__":
    main()
