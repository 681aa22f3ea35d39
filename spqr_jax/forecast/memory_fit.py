"""A run that fits: what to do to hold less, one thing after the other, until a memory plan is within a limit."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator

from spqr_jax.config import SpQRConfig
from spqr_jax.errors import SpQRError
from spqr_jax.forecast.memory_plan import CHUNK_TOKENS, MemoryPlan, Parts, Thrift
from spqr_jax.forecast.passes import Text
from spqr_jax.forecast.words import about_bytes
from spqr_jax.models.config import DecoderConfig

_FEW_HESSIANS = 64 * 2**20  # bytes of experts' Hessians at once where memory is short; one Hessian at least
_SMALLEST_CHUNK = 128  # tokens
_UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_SHOWN = 0.04  # of the total, from which on a part is named


def parse_bytes(text: str) -> int:
    """Bytes of a size such as ``4GiB``, ``4096 MiB`` or ``1.5GB``.

    Raises:
      SpQRError: it is no size with a unit, or none above zero.
    """
    parts = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]+)\s*", text)
    if parts is None or parts[2].lower() not in _UNITS:
        raise SpQRError(f"expected a size with a unit, such as 4GiB, 512MiB or 1.5GB, got {text!r}")
    count = int(float(parts[1]) * _UNITS[parts[2].lower()])
    if count <= 0:
        raise SpQRError(f"expected a size above zero, got {text!r}")
    return count


def fit_memory(plan: Callable[[Thrift], MemoryPlan], limit: float, ways: list[Thrift]) -> tuple[Thrift, MemoryPlan]:
    """The first of some ways whose plan is within a limit.

    Args:
      plan: the memory plan of a way.
      limit: bytes, of a host and of a device.
      ways: from the fastest on, see `ways_to_save`.

    Raises:
      SpQRError: none fits; says the least that does.
    """
    plans = [(way, plan(way)) for way in ways]
    for way, fitting in plans:
        if fitting.fits(limit):
            return way, fitting
    least = min((found for _, found in plans), key=lambda found: max(found.host_bytes, found.device_bytes))
    needed = max(least.host_bytes, least.device_bytes)
    parts = least.host if least.host_bytes >= least.device_bytes else least.device
    raise SpQRError(
        f"--max-memory of {about_bytes(limit)} is too little: this model and these settings need at least "
        f"{about_bytes(needed)} while {_doing(least.phase)}: {describe_parts(parts)}. Allow more, or use --dtype "
        "bfloat16 or a smaller --seqlen"
    )


def ways_to_save(model: DecoderConfig, config: SpQRConfig, text: Text) -> list[Thrift]:
    """What can be done to hold less: nothing; activations on disk; few experts at once; smaller chunks of text.

    All but the last keep every byte of the result; smaller chunks change the order of sums.
    """
    return list(_ways(model, config, text))


def _ways(model: DecoderConfig, config: SpQRConfig, text: Text) -> Iterator[Thrift]:
    way = Thrift()
    yield way
    if not config.needs_calibration:
        return
    way = dataclasses.replace(way, spill=True)
    yield way
    if model.num_experts:
        way = dataclasses.replace(way, hessian_bytes=_FEW_HESSIANS)
        yield way
    tokens = CHUNK_TOKENS // 2
    while tokens >= max(text.seqlen, _SMALLEST_CHUNK):
        yield dataclasses.replace(way, chunk_tokens=tokens)
        tokens //= 2


def describe_thrift(thrift: Thrift) -> str:
    """What is done to hold less: "activations on disk, chunks of 256 tokens"; empty for nothing."""
    done = []
    if thrift.spill:
        done.append("activations on disk")
    if thrift.hessian_bytes != Thrift.hessian_bytes:
        done.append("few experts at once")
    if thrift.chunk_tokens != Thrift.chunk_tokens:
        done.append(f"chunks of {thrift.chunk_tokens} tokens (sums in another order)")
    return ", ".join(done)


def describe_parts(parts: Parts) -> str:
    """The parts of a plan, largest first: "activations 1.1 GB, Hessians 0.6 GB, other 0.1 GB"."""
    total = sum(parts.values())
    large = {name: size for name, size in sorted(parts.items(), key=lambda part: -part[1]) if size >= _SHOWN * total}
    if (rest := total - sum(large.values())) >= 0.01 * total and len(large) < len(parts):
        large["other"] = rest
    return ", ".join(f"{name} {about_bytes(size)}" for name, size in large.items())


def describe_plan(plan: MemoryPlan) -> str:
    """ "2.3 GB of memory: ..." or "1.9 GB of host memory a process and 5.2 GB of each device: ..."."""
    if not plan.device:
        return f"{about_bytes(plan.host_bytes)} of memory, most of it while {_doing(plan.phase)}: " + describe_parts(
            plan.host
        )
    return (
        f"{about_bytes(plan.host_bytes)} of host memory for each process and {about_bytes(plan.device_bytes)} of "
        f"memory for each device, most of it while {_doing(plan.phase)}: {describe_parts(plan.device)}"
    )


def _doing(phase: str) -> str:
    return {"output head": "solving the output head"}.get(phase, phase)
