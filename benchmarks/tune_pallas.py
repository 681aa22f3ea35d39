#!/usr/bin/env python3
"""Finds the fastest configuration of each GPU kernel on this machine's GPU and writes it into the package's table.

    benchmarks/tune_pallas.py --shapes 4096x4096 11008x4096 --batch 1 8 16

The candidates for one problem take turns in one process, in loops on the device (device_loop.py). A candidate with a
wrong result is skipped. The fastest one is added to pallas_kernels/spqr_matmul/tuned.json under the device's name, and
the package uses it from then on.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import accelerator
from accelerator import Shape, configured, packed_rival
from device_loop import Timing, compare

from pallas_kernels import spqr_matmul
from pallas_kernels.spqr_matmul import entries, tuning
from pallas_kernels.spqr_matmul.formats import TILE, format_of
from pallas_kernels.spqr_matmul.mosaic import estimate
from pallas_kernels.spqr_matmul.mosaic.plan import MosaicConfig, Plan

MAX_ERROR = 2e-3
MOST = 16
"""Candidates for one problem, those that are expected to be fastest."""


def candidates(kernel: str, shape: Shape, rows: int, bits: int, group_size: int) -> dict[str, Any]:
    """{label: configuration} to try. The first is None: what the package chooses by itself."""
    chosen: dict[str, Any] = {"chosen by the package": None}
    if kernel == "triton":
        configs = [tuning.TritonConfig(b, s) for b, s in itertools.product((1, 2), (4, 8, 16, 24, 32, 48, 64))]
        configs = [c for c in configs if -(-shape.out // 64) * 64 % (128 * c.blocks) == 0]
    elif kernel == "mosaic_gpu":
        configs = mosaic_candidates(shape, rows, bits, group_size)
    else:
        configs = []
    return chosen | {label(config): config for config in configs}


def label(config: Any) -> str:
    """A configuration in words, without what is 0 or off."""
    return ", ".join(f"{key} {value}" for key, value in dataclasses.asdict(config).items() if value)


def mosaic_options(shape: Shape, rows: int, bits: int, group_size: int) -> list[MosaicConfig]:
    """The fastest expected way to cut a product with every option, and the fastest with clusters."""
    plans = mosaic_plans(shape, rows, bits, group_size)
    options: list[dict[str, Any]] = [{"pdl": True}, {"subnormal": True}, {"pdl": True, "subnormal": True}]
    options += [{"depth": depth} for depth in (1, 2, 3, 4)]
    configs = [dataclasses.replace(plan.config, **option) for plan in plans[:1] for option in options]
    clusters = [next((plan.config for plan in plans if plan.config.cluster == size), None) for size in (2, 4)]
    return [*configs, *(config for config in clusters if config is not None)]


def mosaic_candidates(shape: Shape, rows: int, bits: int, group_size: int) -> list[MosaicConfig]:
    """The ways to cut a product that are expected to be fastest, and the fastest of them with other options."""
    plans = mosaic_plans(shape, rows, bits, group_size)
    configs = [plan.config for plan in plans[:MOST]]
    return list(dict.fromkeys([*configs[:1], *mosaic_options(shape, rows, bits, group_size), *configs]))


def mosaic_plans(shape: Shape, rows: int, bits: int, group_size: int) -> list[Plan]:
    """All ways to cut a product that are possible here, those first that are expected to be fastest."""
    target = spqr_matmul.target()
    cuts = tuning.mosaic_cuts(target, any_plan(shape, rows, bits, group_size))
    return sorted(cuts, key=lambda plan: estimate.microseconds(plan, target))


def any_plan(shape: Shape, rows: int, bits: int, group_size: int) -> Plan:
    """A product with bfloat16 activations, cut in no sensible way."""
    form = format_of(bits, group_size, second_level=True)
    tiles = -(-shape.out // TILE)
    capacity = entries.capacity(int(accelerator.OUTLIERS * shape.out * shape.inner))
    return Plan(rows, TILE * tiles, shape.inner, (form,), False, capacity, 2, 2, MosaicConfig(blocks=tiles))


def table_key(kernel: str, rows: int, shape: Shape, bits: int, group_size: int) -> str:
    """Under which name the package looks a configuration up."""
    if kernel == "mosaic_gpu":
        return tuning.mosaic_key(any_plan(shape, rows, bits, group_size))
    return tuning.Problem(rows, shape.out, shape.inner, bits, group_size).key


def tune(kernel: str, rows: int, shape: Shape, bits: int, group_size: int, rounds: int) -> tuple[Any, list[list[str]]]:
    """Returns the fastest configuration (None: the package's choice), and the lines of a table of all."""
    from device_parts.right import product_error

    rivals, configs = [], candidates(kernel, shape, rows, bits, group_size)
    lines: dict[str, str] = {}
    packed = packed_rival(kernel, shape, bits=bits, group_size=group_size)
    for name, config in configs.items():
        try:
            if (error := product_error(kernel, shape, bits, group_size, rows, config)) > MAX_ERROR:
                lines[name] = f"wrong: relative error {error:.1e}"
                continue
        except Exception as failure:  # for example: too much shared memory
            lines[name] = f"{type(failure).__name__}: {failure}"[:80]
            continue
        rivals.append(configured(packed, kernel, config, name))
    x = accelerator.activations(rows, shape.inner)
    timings = compare([(rival, x) for rival in rivals], products=256, rounds=rounds)
    times = {r.name: t.elapsed for r, t in zip(rivals, timings, strict=True) if isinstance(t, Timing)}
    ranked = sorted(times, key=lambda name: times[name])
    table = [[name, f"{1e6 * times[name]:.1f}"] for name in ranked]
    return configs[ranked[0]] if ranked else None, [*table, *([name, reason] for name, reason in lines.items())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "11008x4096", "4096x11008"], help="OUTxIN")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 16], help="rows of activations")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--group-size", type=int, default=16)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--out", type=Path, default=tuning.TABLE)
    given = parser.parse_args()
    from spqr_jax.terminal.display import table

    target = spqr_matmul.target()
    if target.platform != "gpu":
        parser.exit(1, f"tune_pallas: needs a GPU; JAX runs on {target.platform} here\n")
    for text in given.shapes:
        shape = Shape.parse(text)
        for batch, kernel in itertools.product(given.batch, ("mosaic_gpu", "triton")):
            if (kernel == "triton" and batch > 2) or spqr_matmul.why_no_kernel(kernel, target):
                continue
            best, lines = tune(kernel, batch, shape, given.bits, given.group_size, given.turns)
            table(f"{kernel}, {shape}, {batch} rows of x", ["configuration", "µs"], lines)
            if best is None:
                continue
            whole = json.loads(given.out.read_text()) if given.out.exists() else {}
            entry = whole.setdefault(target.kind, {}).setdefault(kernel, {})
            entry[table_key(kernel, batch, shape, given.bits, given.group_size)] = dataclasses.asdict(best)
            given.out.write_text(json.dumps(whole, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
