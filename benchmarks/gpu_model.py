#!/usr/bin/env python3
"""What the GPU and TPU kernels could reach at most: a roofline from counted bytes and counted instructions.

    scripts/setup && .venv/bin/python benchmarks/gpu_model.py

A PREDICTION, not a measurement: bandwidth and issue rate are the makers' figures, bytes are those of the
prepared layout and of the sums over splits, as if these went through memory; instructions those of the compiled
inner loop (tests/aot/budgets.json). Latency, launches, activations and power limits are left out; a dense rival
is granted its full bandwidth.
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
SIZE = 4096  # rows and columns of the matrix that is reckoned with
TITLES = {"a100": "A100 80GB", "rtx4090": "RTX 4090", "h100": "H100 SXM", "b200": "B200", "v5e": "TPU v5e"}
TPU_BANDWIDTH = {"v5e": 819e9}
TPU_CLOCK = {"v5e": 1.5e9}  # bundles a second


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One kernel on one device, in weights a second and as ratios."""

    memory: float  # weights a second that memory could deliver
    issue: float  # weights a second that the cores could go through
    dense: float  # weights a second of a dense 16-bit product at full bandwidth

    @property
    def ceiling(self) -> float:
        """Times dense 16-bit."""
        return min(self.memory, self.issue) / self.dense


def bits_a_weight(layout: str) -> float:
    """What is read for a weight of 3 bits in groups of 16, outliers and their filling included."""
    # the other layouts hold the same: codes, a byte and four float16 a group of 16 rows
    dense = fragments.bits_a_weight(3, 16) if layout == "fragments" else 3 + 8 / 16 + 64 / 256
    filling = 1.5 * 32 / SIZE  # half a chunk of four a row is filled up
    starts = 32 / SIZE
    return dense + 32 * OUTLIERS + filling + starts


def bits_of_sums(name: str, kernel: str, batch: int) -> float:
    """What a GPU kernel writes and reads again for a weight, because several thread blocks share a row."""
    device = targets.GPUS[name]
    target = Target("gpu", device.name, device.capability, device.cores)
    problem = tuning.Problem(batch, SIZE, SIZE, 3, 16)
    config = (tuning.mosaic_config if kernel == "mosaic_gpu" else tuning.triton_config)(target, problem)
    return 2 * 32 * batch * config.splits / SIZE


def gpu(name: str, kernel: str, batch: int, instructions: float) -> Prediction:
    """From instructions a weight: a core issues four warps' instructions a clock."""
    device = targets.GPUS[name]
    issue = device.cores * 4 * 32 * device.clock * 1e9 / instructions
    bits = bits_a_weight("fragments") + bits_of_sums(name, kernel, batch)
    return Prediction(device.bandwidth * 8 / bits, issue, device.bandwidth / 2)


def tpu(name: str, weights_per_bundle: float) -> Prediction:
    """From weights a bundle: a core issues one a clock."""
    memory = TPU_BANDWIDTH[name] * 8 / bits_a_weight("lanes")
    return Prediction(memory, weights_per_bundle * TPU_CLOCK[name], TPU_BANDWIDTH[name] / 2)


def predictions() -> list[tuple[str, str, int, str, Prediction]]:
    """(device, kernel, batch, what was counted, prediction) for what budgets.json holds of 3 bits, groups of 16."""
    budgets = json.loads((ROOT / "tests" / "aot" / "budgets.json").read_text())["cases"]
    found = []
    for case, budget in budgets.items():
        name, kernel, *options = case.split()
        given = dict(zip(options[::2], options[1::2], strict=True))
        if set(given) - {"--batch", "--splits"} or name not in TITLES:
            continue
        batch = int(given.get("--batch", 1))
        if kernel == "tpu":
            rate = budget["weights_per_bundle"]
            found.append((name, kernel, batch, f"{rate:.0f} weights a bundle", tpu(name, rate)))
        else:
            count = budget["instructions_per_weight"]
            found.append((name, kernel, batch, f"{count:.2f} instructions a weight", gpu(name, kernel, batch, count)))
    return sorted(found, key=lambda row: (list(TITLES).index(row[0]), row[1], row[2]))


HEADER = ["device", "kernel", "rows of x", "counted", "memory allows", "issue allows", "predicted ceiling"]


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
    table(f"PREDICTED, times a dense 16-bit product; {bits} bits a weight at 1% outliers", HEADER, rows_of_table())


if __name__ == "__main__":
    main()
