"""How fast this machine is, and how much memory it has free.

The reference machine has 2 cores (AMD EPYC, Zen 4, with AVX-512 and bfloat16 products). Constants were
measured there on the demo model (135 M weights) part by part, on one core, in CPU seconds, which other
jobs hardly change; two cores together take 1/1.76 of that, as in docs/explanation/quality.md ("Where the
time goes": 98.6 CPU seconds in 56.1 seconds). On accelerators nothing was measured: there the forecast is a guess.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import lax

from spqr_jax.forecast.passes import Work

# There a float32 product runs at 190e9 operations per second on both cores, a rounded one at 380e9 or more.
_LOOP_STEPS, _LOOP_SECONDS = 200_000, 9.9e-3  # of `_count`, with Python 3.11
_SIZES = {"cpu": 1024, "other": 4096}  # width of the square matrices of the measurement
_RUNS, _LONGEST = 4, 0.1  # products of one type; seconds after which no other begins

_SHARES = {
    "dense": 1.0,  # 2·weights·tokens at 105 to 115e9 a second and core: `pass_block` without its attention
    "float32": 0.8,  # gradients by weights in a step of tuning
    "bfloat16": 0.85,  # with "attention": 4 windows of 1024 through all blocks in 7.8 CPU seconds
    "attention": 0.4,
    "rounded_gram": 0.75,  # 2.1 times as fast as in float32 for 1536 inputs, 1.6 times for 576
    "gram": 0.8,  # the Hessians of these windows in 6.4 CPU seconds
    "factor": 0.45,  # 120 factors in 3.8 CPU seconds
}
"""Speed of each kind of product, as a share of the measured rate of the same type."""

_SECONDS_A_WEIGHT = {
    "searched": 40e-9,  # 106 M weights in 4.2 CPU seconds on one core, 8.9 on two, whose threads wait for each other
    "plain": 25e-9,  # assumed; a whole run with --method gptq agrees
    "rounded": 30e-9,  # a whole run with --method rtn agrees
    "handled": 30e-9,  # reading 1.7, stacking and cutting 3.2 CPU seconds, and writing
    "mapped": 200e-9,  # what `spqr analyze` on 2 windows of 512 tokens takes beside the other parts
    "unpacked": 5e-9,  # what a step of tuning takes beside its products: 0.9 CPU seconds
}
"""Seconds a weight on the reference machine."""

_START_SECONDS = 3.0  # of a command: imports, tokenizer, opening and closing files; 4 to 5 CPU seconds


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a forecast needs to know of a machine.

    Attributes:
      platform: JAX's name of what multiplies: cpu, gpu, tpu.
      name: for people, such as ``cpu, 2 cores``.
      cores: of the processor.
      rates: operations per second of products whose factors are ``float32``, ``bfloat16`` or ``float16``.
      free_bytes: memory that is free where the model lies, or None where that is not known.
      slowness: how many times longer than the reference machine one core takes for a fixed loop of Python: for
        what is no large product, such as compilation.
    """

    platform: str
    name: str
    cores: int
    rates: dict[str, float]
    free_bytes: float | None
    slowness: float = 1.0


def seconds(work: Work, machine: Machine, dtype: str = "float32", compiled: bool = False) -> float:
    """Seconds that work takes.

    Args:
      work: what there is to do.
      machine: where.
      dtype: of the dense weights.
      compiled: whether the programs are kept from an earlier run.
    """
    factors = {"dense": dtype, "bfloat16": "bfloat16", "rounded_gram": "bfloat16"}  # the others' are float32
    total = 0.0
    for kind, share in _SHARES.items():
        if operations := getattr(work, kind):
            total += operations / (share * machine.rates[factors.get(kind, "float32")])
    by_weight = sum(getattr(work, kind) * cost for kind, cost in _SECONDS_A_WEIGHT.items())
    start = _START_SECONDS + (0.0 if compiled else work.programs)
    return total + machine.slowness * (by_weight + start)


@functools.cache
def measure_machine(dtypes: tuple[str, ...] = ("float32",)) -> Machine:
    """Times one product of each type and a loop, about 0.2 s on a processor; once a process for each set of types."""
    device = jax.devices()[0]
    cores = usable_cores()
    name = f"cpu, {cores} core{'s' * (cores > 1)}" if device.platform == "cpu" else device.device_kind
    rates = {dtype: _product_rate(dtype, device.platform) for dtype in dict.fromkeys(("float32", *dtypes))}
    return Machine(device.platform, name, cores, rates, free_memory(device), _loop_seconds() / _LOOP_SECONDS)


def _product_rate(dtype: str, platform: str) -> float:
    """Operations per second of a square product, sums in float32."""
    width = _SIZES.get(platform, _SIZES["other"])
    factors = jnp.ones((width, width), dtype)
    multiply(factors).block_until_ready()  # compiles
    begun, runs, passed = time.perf_counter(), 0, 0.0
    while runs < _RUNS and passed < _LONGEST:  # a busy machine takes its time
        multiply(factors).block_until_ready()
        runs, passed = runs + 1, time.perf_counter() - begun
    return runs * 2.0 * width**3 / passed


def _loop_seconds() -> float:
    """Seconds of `_count` as busy as the machine is now, about 0.03 s in all."""
    begun, runs = time.perf_counter(), 3
    for _ in range(runs):
        _count(_LOOP_STEPS)
    return (time.perf_counter() - begun) / runs


def _count(steps: int) -> int:
    total = 0
    for step in range(steps):
        total += step * step % 7
    return total


@jax.jit
def multiply(a: jax.Array) -> jax.Array:
    """a aᵀ, f32: the one program that a forecast compiles, for each type."""
    return lax.dot_general(a, a, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def free_memory(device: jax.Device) -> float | None:
    """Bytes that are free on a device: of a processor, the machine's memory, or what its container may still take."""
    if device.platform == "cpu":
        return free_of_host()
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return float(stats["bytes_limit"] - stats.get("bytes_in_use", 0))


def free_of_host() -> float | None:
    """Bytes that are free in the host's memory, or that its container may still take; None where that is not known."""
    known = [free for free in (_free_of_machine(), _free_of_container()) if free is not None]
    return min(known, default=None)


def _free_of_machine(path: Path = Path("/proc/meminfo")) -> float | None:
    """Linux's estimate of what a program can still take without swapping; None elsewhere."""
    try:
        lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, value = line.partition(":")
        if name == "MemAvailable" and value.split()[:1] and value.split()[0].isdigit():
            return 1024.0 * int(value.split()[0])
    return None


def _free_of_container(folder: Path = Path("/sys/fs/cgroup")) -> float | None:
    """What a control group (version 2) may still take; None where there is none or no limit."""
    try:
        limit = (folder / "memory.max").read_text(encoding="ascii").strip()
        used = (folder / "memory.current").read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return float(max(int(limit) - int(used), 0)) if limit.isdigit() and used.isdigit() else None
