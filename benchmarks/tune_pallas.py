#!/usr/bin/env python3
"""Finds the fastest configuration of each GPU kernel on this machine's GPU and writes it into the package's table.

    benchmarks/tune_pallas.py --shapes 4096x4096 11008x4096 --batch 1 8 16

The candidates for one problem take turns in one process. A candidate with a wrong result is skipped. The fastest one is
added to pallas_kernels/spqr_matmul/tuned.json under the device's name, and the package uses it from then on.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from accelerator import LAYOUTS, Shape, copies, prepared, product, relative_error, take_turns

from pallas_kernels import spqr_matmul
from pallas_kernels.spqr_matmul import tuning
from spqr_jax.cli.display import console, number, table

MAX_ERROR = 2e-3


def candidates(kernel: str, problem: tuning.Problem, target: spqr_matmul.Target) -> list[Any]:
    """Configurations to try. The first is the one that the rule in tuning.py chooses."""
    if kernel == "triton":
        rule: Any = tuning.triton_config(target, problem)
        triton = [tuning.TritonConfig(b, s) for b, s in itertools.product((1, 2), (4, 8, 16, 24, 32, 48, 64))]
        return list(dict.fromkeys([rule, *(c for c in triton if _fits_rows(problem, 128 * c.blocks))]))
    raise NotImplementedError(f"{kernel} has no configurations to try")


def _fits_rows(problem: tuning.Problem, rows: int) -> bool:
    return -(-problem.out // 64) * 64 % rows == 0


def tune(kernel: str, batch: int, shape: Shape, bits: int, group_size: int, turns: int) -> tuple[Any, list[list[str]]]:
    """Returns the fastest configuration, and the lines of a table of all."""
    target = spqr_matmul.target()
    problem = tuning.Problem(batch, shape.out, shape.inner, bits, group_size)
    matrix = prepared((shape.out, shape.inner), LAYOUTS[kernel], bits, group_size)
    matrices = copies(matrix)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((batch, shape.inner)), jnp.float16)
    want = np.asarray(spqr_matmul.matmul(x.astype(jnp.float32), matrix, implementation="xla"), np.float64)
    runs: dict[str, Any] = {}
    configs = {}
    for config in candidates(kernel, problem, target):
        label = ", ".join(f"{k} {v}" for k, v in dataclasses.asdict(config).items())

        def multiply(x: jax.Array, w: Any, config: Any = config) -> jax.Array:
            return spqr_matmul.matmul(x, w, implementation=kernel, config=config)

        try:
            if relative_error(jax.jit(multiply)(x, matrix), want) > MAX_ERROR:
                console.print(f"{label}: wrong result, skipped", markup=False, style="red")
                continue
        except Exception as error:  # for example: too much shared memory
            console.print(f"{label}: {type(error).__name__}", markup=False, style="dim")
            continue
        runs[label], configs[label] = product(multiply, x, matrices), config
    seconds = take_turns(runs, turns)
    first = next(iter(seconds.values()))
    ranked = sorted(seconds, key=lambda label: seconds[label])
    lines = [[label, number(1e6 * seconds[label], 1), number(first / seconds[label], 2)] for label in ranked]
    return configs[ranked[0]], lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "11008x4096", "4096x11008"], help="OUTxIN")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 16], help="rows of activations")
    parser.add_argument("--bits", type=int, default=3, choices=[2, 3, 4])
    parser.add_argument("--group-size", type=int, default=16)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--out", type=Path, default=tuning.TABLE)
    given = parser.parse_args()
    target = spqr_matmul.target()
    if target.platform != "gpu":
        parser.exit(1, f"tune_pallas: needs a GPU; JAX runs on {target.platform} here\n")
    for text in given.shapes:
        shape = Shape.parse(text)
        for batch, kernel in itertools.product(given.batch, ("mosaic_gpu", "triton")):
            if kernel == "triton" and (batch > 2 or spqr_matmul.why_no_triton()):
                continue
            if kernel == "mosaic_gpu" and spqr_matmul.why_no_mosaic(target):
                continue
            best, lines = tune(kernel, batch, shape, given.bits, given.group_size, given.turns)
            table(f"{kernel}, {shape}, {batch} rows of x", ["configuration", "µs", "speed, × the rule's choice"], lines)
            problem = tuning.Problem(batch, shape.out, shape.inner, given.bits, given.group_size)
            whole = json.loads(given.out.read_text()) if given.out.exists() else {}
            entry = whole.setdefault(target.kind, {}).setdefault(kernel, {})
            entry[problem.key] = dataclasses.asdict(best)
            given.out.write_text(json.dumps(whole, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
