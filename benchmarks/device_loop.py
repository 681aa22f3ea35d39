"""Times products on an accelerator, not Python's dispatch of them.

A program multiplies in a loop on the device. Each product depends on the one before, and reads another matrix; all
matrices together are larger than the cache. What the loop itself costs ("glue": its counter, and the sum that makes the
dependency) is measured with a loop without products, and taken off.

    elapsed   from the host's clock: many calls in a row, minus half as many
    busy      from a trace: the duration of every kernel, told apart by its name
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import launches
import numpy as np
from jax import lax

CACHE_BYTES = 256 << 20
"""All matrices of a stack together exceed any cache, as in a model."""
LEAST, MOST = 8, 64
"""Matrices of a rival. Each turn of the loop multiplies by all: many hide what a turn costs the host."""
_GLUE = "glue"
_NO_GRAPHS = {"xla_gpu_enable_command_buffer": ""}


@dataclasses.dataclass(frozen=True)
class Rival:
    """One way to multiply by a matrix.

    Attributes:
      name: as the tables show it.
      multiply: (x [rows, in], matrices, index) -> [rows, out]. `index` is an int, so a constant: computing it would be
        a launch of its own.
      matrices: what it reads, a tree of arrays.
      count: number of matrices.
      weight_bytes: bytes of one matrix.
    """

    name: str
    multiply: Callable[[jax.Array, Any, Any], jax.Array]
    matrices: Any
    count: int
    weight_bytes: int


@dataclasses.dataclass(frozen=True)
class Timing:
    """One product.

    Attributes:
      elapsed: seconds, by the clock.
      busy: seconds in which a kernel of it runs, None without a trace.
      launches: kernels that it launches, None without a trace.
      kernels: seconds of each kernel by name, the longest first.
    """

    elapsed: float
    busy: float | None = None
    launches: float | None = None
    kernels: dict[str, float] = dataclasses.field(default_factory=dict)


def matrices_for(weight_bytes: int, most: int = MOST) -> int:
    """How many matrices exceed the cache."""
    return min(most, max(LEAST, -(-CACHE_BYTES // weight_bytes)))


def without_products(count: int) -> Rival:
    """The loop with its glue alone, for as many products."""
    return Rival("no product", lambda x, matrices, index: x, (), count, 0)


class Looped:
    """`turns` times the products of a rival with x [rows, in], lowered; call `compile` before anything else."""

    def __init__(self, rival: Rival, x: jax.Array, turns: int) -> None:
        self.rival, self.products, self.turns = rival, turns * rival.count, turns
        self._x, self._program = x, None
        self._lowered = jax.jit(functools.partial(_loop, rival=rival, turns=turns)).lower(x, rival.matrices)

    def compile(self, options: dict[str, Any] | None = None) -> None:
        """Compiles for the device; several loops can do so at a time, each in its thread."""
        self._program = self._lowered.compile(compiler_options=options)

    def run(self, calls: int = 1) -> float:
        """Seconds of so many calls in a row."""
        begun, x = time.perf_counter(), self._x
        for _ in range(calls):
            x = self._program(x, self.rival.matrices)
        jax.block_until_ready(x)
        return time.perf_counter() - begun

    def elapsed(self, calls: int) -> float:
        """Seconds per product, what one call costs the host taken off."""
        return max(self.run(2 * calls) - self.run(calls), 0.0) / calls / self.products

    def traced(self) -> dict[str, tuple[float, float]]:
        """{kernel: (seconds, launches) per product} of the products alone; empty where no device is traced."""
        kernels = trace(self.run)
        steps, glue = self.launches(), self.glue_names()
        if kernels and sum(count for _, count in kernels.values()) < len(steps) * self.turns / 2:
            self.compile(_NO_GRAPHS)  # a graph was traced as one event
            kernels, glue = trace(self.run), self.glue_names()
        return {
            name: (seconds / self.products, count / self.products)
            for name, (seconds, count) in kernels.items()
            if _plain(name) not in glue
        }

    def launches(self) -> list[launches.Launch]:
        """Of one turn."""
        assert self._program is not None
        return [step for loop in launches.program(self._program.as_text()).all_loops() for step in loop.body]

    def glue_names(self) -> set[str]:
        """Names of the kernels that are not part of a product."""
        scalars = ("s32[]", "pred[]", "s32[1]")
        return {_plain(step.name) for step in self.launches() if f"/{_GLUE}/" in step.meaning or step.shape in scalars}


def _plain(name: str) -> str:
    return name.replace(".", "_").replace("-", "_")


def _loop(x: jax.Array, matrices: Any, *, rival: Rival, turns: int) -> jax.Array:
    def turn(_: jax.Array, x: jax.Array) -> jax.Array:
        for index in range(rival.count):
            # without the barrier XLA would compute only what the glue reads
            y = lax.optimization_barrier(rival.multiply(x, matrices, index))
            with jax.named_scope(_GLUE):
                x = _depending(x, y)
        return x

    return lax.fori_loop(0, turns, turn, x)


def _depending(x: jax.Array, y: jax.Array) -> jax.Array:
    """x, up to rounding, but not before y is there: one elementwise kernel."""
    width = min(x.shape[1], y.shape[1])
    changed = x[:, :width] + y[:, :width] * jnp.asarray(2**-40, x.dtype)
    return jnp.concatenate([changed, x[:, width:]], axis=1) if width < x.shape[1] else changed


def trace(run: Callable[[], Any]) -> dict[str, tuple[float, int]]:
    """{kernel: (seconds, launches)} of a GPU while `run` works; empty without a GPU."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    options.host_tracer_level = 0
    totals: dict[str, tuple[float, int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            run()
        for file in Path(folder).rglob("*.xplane.pb"):
            for event in _events(jax.profiler.ProfileData.from_file(str(file))):
                seconds, count = totals.get(event.name, (0.0, 0))
                totals[event.name] = (seconds + event.duration_ns * 1e-9, count + 1)
    return totals


def _events(data: Any) -> Any:
    for plane in data.planes:
        if "GPU" not in plane.name:
            continue
        for line in plane.lines:
            if "Stream" in line.name:
                yield from line.events


Problem = tuple[Rival, jax.Array]
"""A rival, and its x [rows, in]."""


def compare(problems: list[Problem], *, products: int, rounds: int, calls: int = 4) -> list[Timing | str]:
    """Times products that take turns: all are compiled first, several at a time, then each is timed in every round.

    Args:
      problems: what is timed.
      products: of one call of a program, about.
      rounds: how often each is timed; the median counts.
      calls: of a program for one figure.

    Returns:
      For each problem its timing, or why it failed.
    """
    sizes = {(x.shape, rival.count): x for rival, x in problems}
    empty = {size: _looped(without_products(size[1]), x, products) for size, x in sizes.items()}
    loops = compiled([*empty.values(), *(_lowered(rival, x, products) for rival, x in problems)])
    rivals = loops[len(empty) :]
    times: dict[int, list[float]] = {}
    for _ in range(rounds):
        for loop in loops:
            if isinstance(loop, Looped):
                times.setdefault(id(loop), []).append(loop.elapsed(calls))
    results: list[Timing | str] = []
    for loop, (rival, x) in zip(rivals, problems, strict=True):
        if isinstance(loop, str):
            results.append(loop)
            continue
        glue = float(np.median(times[id(empty[x.shape, rival.count])]))
        results.append(_timing(float(np.median(times[id(loop)])) - glue, loop))
    return results


def _looped(rival: Rival, x: jax.Array, products: int) -> Looped:
    return Looped(rival, x, max(1, products // rival.count))


def _lowered(rival: Rival, x: jax.Array, products: int) -> Looped | str:
    try:
        return _looped(rival, x, products)
    except Exception as error:  # a kernel that does not support a product must not hide the others
        return _reason(error)


def compiled(loops: Sequence[Looped | str]) -> list[Looped | str]:
    """The loops, compiled in threads and run once; in place of one that fails the reason."""

    def ready(loop: Looped | str) -> Looped | str:
        if isinstance(loop, Looped):
            try:
                loop.compile()
            except Exception as error:
                return _reason(error)
        return loop

    with concurrent.futures.ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        return [_after_a_run(loop) for loop in list(pool.map(ready, loops))]


def _after_a_run(loop: Looped | str) -> Looped | str:
    try:
        if isinstance(loop, Looped):
            loop.run()
    except Exception as error:
        return _reason(error)
    return loop


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:600]


def _timing(elapsed: float, loop: Looped) -> Timing:
    traced = loop.traced() if jax.default_backend() == "gpu" else {}
    if not traced:
        return Timing(elapsed)
    kernels = {name: seconds for name, (seconds, _) in sorted(traced.items(), key=lambda item: -item[1][0])}
    return Timing(elapsed, sum(kernels.values()), sum(count for _, count in traced.values()), kernels)
