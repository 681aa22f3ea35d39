#!/usr/bin/env python3
"""Checks the Pallas kernels on this machine's GPU or TPU and times them against dense 16-bit products.

    scripts/gpu_check.sh                                   sets up, runs this script and says what to send back
    benchmarks/accelerator_check.py --batch 1 8 --shapes 4096x4096

First it compares every kernel in every format with float32 products (relative error). Then it times the kernels and
dense bfloat16 and float16 products, which take turns in one process. It writes accelerator_report.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from accelerator import LAYOUTS, Shape, copies, prepared, product, relative_error, take_turns
from timings import AcceleratorRow, add_csv_options, check_csv, save

from pallas_kernels import spqr_matmul
from spqr_jax.cli.display import console, number, table

FORMATS = [(3, 16), (2, 16), (4, 16), (3, 32), (4, 32)]
MAX_ERROR = {"mosaic_gpu": 2e-3, "triton": 2e-3, "tpu": 8e-3, "xla": 8e-3}


def kernels() -> list[str]:
    """Names of the kernels that this device can run, the XLA product last."""
    target = spqr_matmul.target()
    names = []
    if target.platform == "gpu":
        names += [] if spqr_matmul.why_no_mosaic(target) else ["mosaic_gpu"]
        names += [] if spqr_matmul.why_no_triton() else ["triton"]
    if target.platform == "tpu":
        names.append("tpu")
    return [*names, "xla"]


def check(kernel: str, batch: int, bits: int, group_size: int, shape: Shape) -> dict[str, Any]:
    """Compares one product with the formula; returns an entry of the report."""
    entry: dict[str, Any] = {"kernel": kernel, "batch": batch, "bits": bits, "group_size": group_size}
    matrix = prepared((shape.out, shape.inner), LAYOUTS.get(kernel, "rows"), bits, group_size)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((batch, shape.inner)), jnp.float16)
    try:
        got = jax.jit(lambda x, w: spqr_matmul.matmul(x, w, implementation=kernel))(x, matrix)
    except NotImplementedError as error:
        return entry | {"not": str(error)}
    except Exception as error:  # errors of a compiler or a driver belong into the report
        return entry | {"failed": f"{type(error).__name__}: {error}"[:2000]}
    with jax.default_matmul_precision("highest"):
        want = spqr_matmul.matmul(x.astype(jnp.float32), matrix, implementation="xla")
    error = relative_error(got, np.asarray(want, np.float64))
    return entry | {"error": error, "right": error < MAX_ERROR[kernel]}


def timed(names: list[str], batch: int, shape: Shape, turns: int) -> dict[str, float]:
    """Seconds per product of every kernel and of the dense products."""
    rng = np.random.default_rng(0)
    dense = jnp.asarray(rng.standard_normal((shape.out, shape.inner)), jnp.float32)
    runs = {}
    for dtype in (jnp.bfloat16, jnp.float16):
        x = jnp.asarray(rng.standard_normal((batch, shape.inner)), dtype)
        runs[f"dense {jnp.dtype(dtype).name}"] = product(lambda x, w: x @ w.T, x, copies(dense.astype(dtype)))
    x = jnp.asarray(rng.standard_normal((batch, shape.inner)), jnp.bfloat16)
    for name in names:
        matrices = copies(prepared((shape.out, shape.inner), LAYOUTS.get(name, "rows")))
        run = product(lambda x, w, name=name: spqr_matmul.matmul(x, w, implementation=name), x, matrices)
        try:
            run[0]()
        except NotImplementedError:
            continue
        runs[name] = run
    return take_turns(runs, turns)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "11008x4096", "4096x11008"], help="OUTxIN")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 2, 8, 16, 64, 512], help="rows of activations")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("accelerator_report.json"), help="the report, a JSON file")
    add_csv_options(parser, "accelerator.csv")
    given = parser.parse_args()
    check_csv(parser, given.csv, AcceleratorRow)
    target, names = spqr_matmul.target(), kernels()
    given.machine = given.machine or target.kind
    console.print(f"{target.kind}, JAX {jax.__version__}; kernels {', '.join(names)}", markup=False)
    if names == ["xla"]:
        console.print("no Pallas kernel runs on this device: only the XLA product is checked", markup=False)
    shapes = [Shape.parse(text) for text in given.shapes]
    report: dict[str, Any] = {
        "device": target.kind,
        "capability": list(target.capability),
        "cores": target.cores,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "checks": [],
        "times": [],
    }
    batches = [b for b in given.batch if b <= 64]
    for kernel in names:
        for bits, group_size in FORMATS:
            report["checks"] += [check(kernel, batch, bits, group_size, shapes[0]) for batch in batches]
    show_checks(report["checks"])
    for shape in shapes:
        for batch in given.batch:
            seconds = timed(names, batch, shape, given.turns)
            report["times"].append({"shape": str(shape), "batch": batch, "seconds": seconds})
            # after every batch: an interrupted run keeps its finished part
            given.out.write_text(json.dumps(report, indent=1) + "\n")
    show_times(report["times"])
    save(given.csv, AcceleratorRow, given, rows_of(report["times"]))
    console.print(f"report: {given.out}", markup=False)
    return 1 if any(not c.get("right", "not" in c) for c in report["checks"]) else 0


def show_checks(checks: list[dict[str, Any]]) -> None:
    lines = []
    for kernel in dict.fromkeys(c["kernel"] for c in checks):
        of_kernel = [c for c in checks if c["kernel"] == kernel]
        errors = [c["error"] for c in of_kernel if "error" in c]
        bad = [c for c in of_kernel if "failed" in c or not c.get("right", True)]
        lines.append([kernel, str(len(errors)), f"{max(errors, default=0):.1e}", str(len(bad))])
        for c in bad:
            console.print(f"{kernel}, {c}", markup=False, style="red")
    table("compared with the formula", ["kernel", "products", "largest error", "wrong"], lines)


def rows_of(times: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The columns of `AcceleratorRow` for every product; ratios are to the faster dense product."""
    rows = []
    for entry in times:
        seconds = entry["seconds"]
        base = min(value for name, value in seconds.items() if name.startswith("dense"))
        for name, value in seconds.items():
            row = {"shape": entry["shape"], "batch": entry["batch"], "rival": name}
            rows.append(row | {"median_us": 1e6 * value, "ratio_to_dense_16bit": base / value})
    return rows


def show_times(times: list[dict[str, Any]]) -> None:
    lines = [
        [
            row["shape"],
            str(row["batch"]),
            row["rival"],
            number(row["median_us"], 1),
            number(row["ratio_to_dense_16bit"], 2),
        ]
        for row in rows_of(times)
    ]
    table("compared with dense 16-bit products", ["shape", "rows of x", "rival", "µs", "× dense"], lines)


if __name__ == "__main__":
    sys.exit(main())
