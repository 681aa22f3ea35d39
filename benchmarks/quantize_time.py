"""Times quantization and its parts.

    python benchmarks/quantize_time.py                     the demo model, two layers, growth (a few minutes)
    python benchmarks/quantize_time.py --layer 4096x4096   one layer only
    python benchmarks/quantize_time.py --target-bits 4.3   with the plan for a size
    python benchmarks/quantize_time.py --commands          whole commands, the default and 3 bits, nothing compiled

Shows wall-clock seconds and CPU seconds of all threads. Each problem runs twice: the difference between the first and
the second run is the time of compilation. The second run is split into parts. To time a part, the script waits for its
result. A real run does not wait, so the parts add up to a little more than a real run takes. Peak memory is the largest
resident size of the process until then.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from timings import QuantizeRow, add_csv_options, check_csv, save

import spqr_jax.planning.curves
import spqr_jax.planning.sensitivity
import spqr_jax.solver.solve
import spqr_jax.stream.activations
from spqr_jax import SpQRConfig, accumulate_hessian, empty_hessian
from spqr_jax.compile_cache import CACHE_VARIABLE
from spqr_jax.job.job import Job
from spqr_jax.methods import quantize_weight
from spqr_jax.resolve import open_model
from spqr_jax.stream.blocks import TreeSink, TreeSource, collect
from spqr_jax.stream.windows import batched
from spqr_jax.terminal.display import console, say, table

PARTS: dict[str, list[tuple[Any, str]]] = {
    "forward": [(spqr_jax.stream.activations, "run_stage")],
    "Hessians": [(spqr_jax.stream.activations, "accumulate_stage")],
    "factorization": [(spqr_jax.solver.solve, "factor_hessian")],
    "columns": [(spqr_jax.solver.solve, "solve_columns")],
    "stacking, packing, statistics": [(spqr_jax.solver.solve, name) for name in ("_stack", "cut", "_result")],
    "plan: forward": [(spqr_jax.planning.sensitivity, "run_stage")],
    "plan: gradients": [(spqr_jax.planning.sensitivity, name) for name in ("loss_gradient", "_backward")],
    "plan: trials": [(spqr_jax.planning.curves, "try_choices")],
}


class Clock:
    """Wall-clock and CPU seconds since its creation."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> np.ndarray:
        return np.array([time.perf_counter() - self._wall, time.process_time() - self._cpu])


@contextmanager
def timed_parts(times: dict[str, np.ndarray]) -> Iterator[None]:
    """Adds the seconds of each of `PARTS` to `times`; waits for the results."""
    originals = []

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            clock = Clock()
            result = jax.block_until_ready(function(*arguments, **keywords))
            times[part] = times.get(part, np.zeros(2)) + clock.read()
            return result

        return call

    for part, functions in PARTS.items():
        for module, name in functions:
            originals.append((module, name, getattr(module, name)))
            setattr(module, name, timed(part, getattr(module, name)))
    try:
        yield
    finally:
        for module, name, function in originals:
            setattr(module, name, function)


def twice(run: Callable[[], Any]) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Seconds of the first and the second run, and the second's parts."""
    clock = Clock()
    jax.block_until_ready(run())
    cold = clock.read()
    times: dict[str, np.ndarray] = {}
    clock = Clock()
    with timed_parts(times):
        jax.block_until_ready(run())
    return cold, clock.read(), times


def show(title: str, cold: np.ndarray, warm: np.ndarray, parts: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Prints the table and returns its rows."""
    lines = [("total, with compilation", cold), ("compilation", cold - warm), ("total, without compilation", warm)]
    lines += [(f"  {part}", parts[part]) for part in PARTS if part in parts]
    lines += [("  other", warm - sum(parts.values()))]
    rows = [[name, f"{wall:.2f}", f"{cpu:.2f}"] for name, (wall, cpu) in lines]
    table(title, ["", "wall s", "CPU s"], rows, notes=f"peak memory so far {peak_gib():.2f} GiB")
    return [
        {"problem": title, "part": name.strip(), "wall_s": wall, "cpu_s": cpu, "peak_gib": peak_gib()}
        for name, (wall, cpu) in lines
    ]


_RSS_UNIT = (1 if sys.platform == "darwin" else 1024) / 2**30  # GiB in what the system counts resident sizes in


def peak_gib() -> float:
    """Largest resident size of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT


def model_time(model: str, windows: np.ndarray, config: SpQRConfig) -> list[dict[str, Any]]:
    params = collect(open_model(model, "float32", say).source)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 2**30

    def run() -> Any:
        sink = TreeSink(params.config)
        Job(TreeSource(params), sink, batched(windows), config).run()
        return sink.params()

    title = f"{model}: {windows.shape[0]} x {windows.shape[1]} tokens, model in memory {size:.2f} GiB"
    return show(title, *twice(run))


COMMANDS = {"default": [], "3 bits": ["--bits", "3", "--outlier-threshold", "0.2"]}


def command_times(model: str, nsamples: int, seqlen: int) -> list[dict[str, Any]]:
    """Runs `spqr quantize` in processes of their own, each with an empty cache of programs: unset JAX's own."""
    rows = []
    for name, options in COMMANDS.items():
        with tempfile.TemporaryDirectory() as scratch:
            words = ["--out", f"{scratch}/out", "--calib", "pydoc", f"--nsamples={nsamples}", f"--seqlen={seqlen}"]
            command = [sys.executable, "-m", "spqr_jax", "quantize", model, *words, *options]
            clock = time.perf_counter()
            child = subprocess.Popen(command, env={**os.environ, CACHE_VARIABLE: f"{scratch}/programs"})
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            sys.exit(f"{' '.join(command)} failed")
        wall, cpu, peak = time.perf_counter() - clock, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * _RSS_UNIT
        rows.append(
            {
                "problem": f"spqr quantize {model}, {name}, {nsamples} x {seqlen} tokens",
                "part": "total, with compilation",
                "wall_s": wall,
                "cpu_s": cpu,
                "peak_gib": peak,
            }
        )
    cells = [[r["problem"], f"{r['wall_s']:.0f}", f"{r['cpu_s']:.0f}", f"{r['peak_gib']:.2f}"] for r in rows]
    table("Whole commands", ["", "wall s", "CPU s", "peak GiB"], cells)
    return rows


def problem(out: int, inner: int, tokens: int) -> tuple[jax.Array, jax.Array]:
    """A weight with heavy tails and the Hessian of correlated inputs."""
    keys = jax.random.split(jax.random.key(0), 3)
    w = 0.05 * jax.random.t(keys[0], 4.0, (out, inner))
    low = jax.random.normal(keys[1], (tokens, max(inner // 8, 1))) @ jax.random.normal(
        keys[2], (max(inner // 8, 1), inner)
    )
    x = low / np.sqrt(inner // 8) + jax.random.normal(keys[2], (tokens, inner))
    hessian = accumulate_hessian(empty_hessian(inner), x * jnp.exp(0.5 * jax.random.normal(keys[1], (inner,))))
    return w, hessian.matrix()


def layer_time(out: int, inner: int) -> list[dict[str, Any]]:
    w, h = jax.block_until_ready(problem(out, inner, 2 * inner))
    return show(f"one layer, {out} x {inner}, with a given Hessian", *twice(lambda: quantize_weight(w, h)))


def growth() -> list[dict[str, Any]]:
    """Times the parts for more tokens, rows and columns."""
    lines = []
    for tokens in (1024, 4096, 16384):
        x = jax.block_until_ready(jnp.ones((tokens, 1024)))
        seconds = twice(partial(accumulate_hessian, empty_hessian(1024), x))
        lines.append(("Hessian", f"{tokens} tokens x 1024", seconds))
    for out, inner in ((512, 1024), (1024, 1024), (4096, 1024), (1024, 512), (1024, 2048), (1024, 4096)):
        w, h = jax.block_until_ready(problem(out, inner, 2 * inner))
        lines.append(("solver", f"{out} x {inner}", twice(partial(quantize_weight, w, h))))
    rows = [[what, size, f"{cold[1]:.2f}", f"{warm[1]:.3f}"] for what, size, (cold, warm, _) in lines]
    table("Growth, CPU seconds", ["", "size", "with compilation", "without"], rows)
    return [
        {"problem": f"{what}, {size}", "part": part, "wall_s": values[0], "cpu_s": values[1]}
        for what, size, (cold, warm, _) in lines
        for part, values in (("total, with compilation", cold), ("total, without compilation", warm))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--calib", help=".npy file of token ids [windows, length]; default: random ids")
    parser.add_argument("--nsamples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--target-bits", type=float, help="plan for so many stored bits; default: 3 bits, tau 0.2")
    parser.add_argument("--layer", action="append", help="OUTxIN: time only this layer; repeatable")
    parser.add_argument("--commands", action="store_true", help="time whole commands only")
    add_csv_options(parser, "quantize_time.csv")
    arguments = parser.parse_args()
    check_csv(parser, arguments.csv, QuantizeRow)
    rows = []
    console.print(f"{platform.processor() or platform.machine()}, {jax.devices()}, jax {jax.__version__}")
    if arguments.commands:
        rows += command_times(arguments.model, arguments.nsamples, arguments.seqlen)
        save(arguments.csv, QuantizeRow, arguments, rows)
        return
    if arguments.layer is None:
        if arguments.calib:
            windows = np.load(arguments.calib, allow_pickle=False)[: arguments.nsamples, : arguments.seqlen]
        else:
            shape = (arguments.nsamples, arguments.seqlen)
            windows = np.random.default_rng(0).integers(0, 32000, shape).astype(np.int32)
        rows += model_time(arguments.model, windows, SpQRConfig(target_bits=arguments.target_bits))
    for layer in arguments.layer or ["4096x4096", "11008x4096"]:
        rows += layer_time(*(int(side) for side in layer.split("x")))
    if arguments.layer is None:
        rows += growth()
    save(arguments.csv, QuantizeRow, arguments, rows)


if __name__ == "__main__":
    main()
