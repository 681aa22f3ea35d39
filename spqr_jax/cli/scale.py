"""What a run needs, before it: ``spqr quantize --plan``, ``--machine`` and ``--max-memory``; and what it needed."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from spqr_jax.cli.amount import Amount
from spqr_jax.cli.display import say, table, tell, write_json
from spqr_jax.cli.outlook import describe_method, itemsize
from spqr_jax.config import SpQRConfig
from spqr_jax.errors import SpQRError
from spqr_jax.estimate import quantized_bytes
from spqr_jax.forecast import Text, about_bytes, about_seconds, measure_machine
from spqr_jax.forecast.cluster import JAX_SHARE, Costs, cluster_costs, model_bytes
from spqr_jax.forecast.machine import free_of_host
from spqr_jax.forecast.machines import Cluster, named_cluster
from spqr_jax.forecast.memory_fit import (
    describe_parts,
    describe_plan,
    describe_thrift,
    fit_memory,
    parse_bytes,
    ways_to_save,
)
from spqr_jax.forecast.memory_plan import Layout, MemoryPlan, Thrift, plan_memory
from spqr_jax.forecast.mesh_memory import plan_mesh_memory
from spqr_jax.forecast.passes import block_total, model_weights
from spqr_jax.forecast.peak import begin_peak, device_peak, host_peak
from spqr_jax.forecast.quantizing import compile_seconds
from spqr_jax.forecast.shares import local_costs
from spqr_jax.forecast.words import about_count
from spqr_jax.models.config import DecoderConfig
from spqr_jax.resolve import default_dtype, read_config
from spqr_jax.stream.spill import Spill
from spqr_jax.tune.config import TuneConfig

_USABLE = 0.9  # of a named machine's memory


@dataclasses.dataclass(frozen=True)
class Run:
    """What `spqr quantize` is asked to do, as far as memory and time depend on it."""

    model: DecoderConfig
    config: SpQRConfig
    text: Text
    tuning: TuneConfig | None
    dtype: str
    layout: Layout

    def plan(self, thrift: Thrift = Thrift()) -> MemoryPlan:
        """What it holds, if it does `thrift` to hold less."""
        planned = plan_memory if self.layout.devices == 1 else plan_mesh_memory
        return planned(
            self.model,
            self.config,
            self.text,
            self.tuning,
            itemsize(self.dtype),
            self.layout,
            thrift,
            self.result_bytes,
        )

    @property
    def result_bytes(self) -> int:
        """Of the checkpoint, without outliers where no target size says how many there are."""
        return quantized_bytes(self.model, self.config, itemsize(self.dtype))

    def fitted(self, limit: float | None) -> tuple[Thrift, MemoryPlan]:
        """The fastest way that keeps to a limit; without one, the fastest."""
        if limit is None:
            return Thrift(), self.plan()
        return fit_memory(self.plan, limit, ways_to_save(self.model, self.config, self.text))


def this_layout(devices: int | None = None) -> Layout:
    """The devices of this run: one, or those of a mesh."""
    return Layout(devices or 1, jax.process_count() if devices else 1, jax.default_backend() == "cpu")


def needed_out(out: Path | None, machine: str | None) -> Path:
    """The directory to write, without which only ``--plan`` can do.

    Raises:
      SpQRError: there is none, or an option is there that goes with ``--plan``.
    """
    if machine is not None:
        raise SpQRError("--machine goes with --plan: a run is always on this machine")
    if out is None:
        raise SpQRError("give a directory to write with --out DIR, or only plan the run with --plan")
    return out


def mesh_devices(mesh: str) -> int | None:
    """Devices of a ``--mesh`` such as ``data=8`` or ``data=4,rows=2``; None for ``auto``, all there are.

    Raises:
      SpQRError: it is no such text.
    """
    if mesh == "auto":
        return None
    sizes = re.findall(r"=(\d{1,6})", mesh)
    if not re.fullmatch(r"[a-z]+=\d{1,6}(,[a-z]+=\d{1,6})*", mesh) or "0" in sizes:
        raise SpQRError(f"expected a mesh such as data=8, got {mesh!r}")
    return math.prod(map(int, sizes))


# ---- before and after the work --------------------------------------------------------------------


class MemoryWatch:
    """The memory plan of a run, said at its start, and what the run really held.

    Args:
      model, config, tuning: what is to be done.
      windows: of calibration text, [windows, tokens]; None for none.
      dtype: of the dense weights; None for the default.
      limit: of ``--max-memory``, such as 4GiB; None for none.
      mesh: devices to use; None for one.

    Attributes:
      thrift: what to do to hold less.
      plan: what the run needs.

    Raises:
      SpQRError: the run cannot keep to the limit.
    """

    def __init__(
        self,
        model: DecoderConfig,
        config: SpQRConfig,
        windows: np.ndarray | None,
        tuning: TuneConfig | None,
        dtype: str | None,
        limit: str | None,
        mesh: Mesh | None = None,
    ) -> None:
        text = Text(0, 2) if windows is None else Text(*windows.shape)
        layout = this_layout(None if mesh is None else mesh.size)
        run = Run(model, config, text, tuning, dtype or default_dtype(), layout)
        self.thrift, self.plan = run.fitted(None if limit is None else parse_bytes(limit))
        if saving := describe_thrift(self.thrift):
            say(f"to keep to {limit} of memory: {saving}")
        say(f"memory: {describe_plan(self.plan)}")
        begin_peak()

    @contextlib.contextmanager
    def spill(self, beside: Path) -> Iterator[Spill | None]:
        """Where activations are kept on disk; None where they stay in memory.

        Raises:
          SpQRError: the disk has no room for them.
        """
        if not self.thrift.spill:
            yield None
            return
        with Spill(beside) as spill:
            spill.need(self.plan.disk.get("activations", 0.0))
            yield spill

    def measured(self) -> str:
        """ "peak memory 2.1 GB (planned 2.4)", for the last line; empty where it is not known."""
        parts = []
        host, device = host_peak(), device_peak()
        if host is not None:
            parts.append(f"peak memory {about_bytes(host)} (planned: {about_bytes(self.plan.host_bytes)})")
        if device is not None:
            parts.append(f"of each device {about_bytes(device)} (planned: {about_bytes(self.plan.device_bytes)})")
        return ", ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """The plan and what was measured, in bytes, for the command's JSON."""
        return {
            "memory": {
                **_plan_json(self.plan),
                "activations_on_disk": self.thrift.spill,
                "chunk_tokens": self.thrift.chunk_tokens,
                "host_peak_bytes": host_peak(),
                "device_peak_bytes": device_peak(),
            }
        }


def _plan_json(plan: MemoryPlan) -> dict[str, Any]:
    return {
        "host_bytes": plan.host_bytes,
        "device_bytes": plan.device_bytes,
        "host": plan.host,
        "device": plan.device,
        "disk": plan.disk,
        "phase": plan.phase,
    }


# ---- a dry run ------------------------------------------------------------------------------------


def dry_run(
    spec: str,
    method: str,
    config: SpQRConfig,
    amount: Amount,
    tuning: TuneConfig | None,
    dtype: str | None,
    machine: str | None,
    mesh: str | None,
    max_memory: str | None,
    json: Path | None,
) -> None:
    """``spqr quantize --plan``: shows what a run needs, from shapes alone.

    Args:
      spec: see `read_config`.
      method, config, amount, tuning, dtype: of the run.
      machine: name of another machine; None for this one.
      mesh: of ``--mesh``, such as data=8; None for one device, or for all of a named machine.
      max_memory: of ``--max-memory``, such as 4GiB.
      json: a file to write all of it to.
    """
    if machine is None:
        config = config.resolved()
    elif config.calibration_dtype == "auto":
        config = dataclasses.replace(config, calibration_dtype="bfloat16")
    devices = None if mesh is None else mesh_devices(mesh)
    if machine is not None and amount.max_minutes is not None:
        raise SpQRError("--max-minutes is forecast for this machine: leave out --machine, or --max-minutes")
    model = read_config(spec, say)
    needs_text = config.needs_calibration or tuning is not None
    text = amount.text(model, config, tuning, dtype) if needs_text else Text(0, 2)
    cluster = None if machine is None else _with_devices(named_cluster(machine), devices)
    layout = this_layout(devices)
    if cluster is not None:
        usable = JAX_SHARE * cluster.device.memory
        layout = Layout(cluster.devices, cluster.hosts, on_host=False, device_memory=usable)
    chosen = dtype or (default_dtype() if cluster is None else "bfloat16")
    run = Run(model, config, text, tuning, chosen, layout)
    thrift, plan = run.fitted(None if max_memory is None else parse_bytes(max_memory))
    whole, block, basis = _costs(run, cluster)
    total = sum(whole.values())
    _tell_sizes(spec, method, run)
    tell(("Memory: ", "bold"), describe_plan(plan) + ".")
    if saving := describe_thrift(thrift):
        tell(f"To keep to {max_memory}: {saving}.")
    for line in _room(run, plan, cluster):
        tell(line)
    tell(("Disk: ", "bold"), f"{about_bytes(sum(plan.disk.values()))}: {describe_parts(plan.disk)}.")
    rows = [
        [name, _short(block.get(name)), _short(cost), f"{cost / total:.0%}"]
        for name, cost in sorted(whole.items(), key=lambda part: -part[1])
    ]
    table(basis, ["part", "seconds per block", "seconds in all", "share"], rows)
    tell(
        ("Time: ", "bold"),
        f"{about_seconds(total)}, {_short(sum(block.values()))} s for each of {model.num_layers} blocks.",
    )
    write_json(
        json,
        {
            "model": spec,
            "family": model.family,
            "blocks": model.num_layers,
            "weights": model_weights(model),
            "dense_bytes": model_bytes(model, itemsize(chosen)),
            "result_bytes": run.result_bytes,
            "dtype": chosen,
            "machine": machine or measure_machine().name,
            "devices": layout.devices,
            "processes": layout.processes,
            "memory": {**_plan_json(plan), "activations_on_disk": thrift.spill, "chunk_tokens": thrift.chunk_tokens},
            "seconds": total,
            "seconds_by_part": whole,
            "seconds_per_block": sum(block.values()),
            "seconds_per_block_by_part": block,
            "basis": basis,
        },
    )


def _with_devices(cluster: Cluster, devices: int | None) -> Cluster:
    """As many of a machine's devices as a mesh has."""
    if devices is None or devices == cluster.devices:
        return cluster
    if devices > cluster.devices:
        raise SpQRError(f"{cluster.name} has {cluster.devices} devices: --mesh asks for {devices}")
    hosts = min(cluster.hosts, -(-devices // (cluster.devices // cluster.hosts)))
    return dataclasses.replace(cluster, devices=devices, hosts=hosts)


def _costs(run: Run, cluster: Cluster | None) -> tuple[Costs, Costs, str]:
    """Seconds by part, of all and of one block, and what they rest on."""
    run_of = (run.model, run.config, run.text, run.tuning)
    if cluster is None:
        types = tuple(dict.fromkeys((run.dtype, *(("bfloat16",) if run.config.needs_calibration else ()))))
        machine = measure_machine(types)
        guess = "" if machine.platform == "cpu" else "; a guess: such forecasts were checked on CPUs only"
        return (*local_costs(*run_of, machine, run.dtype), f"This machine ({machine.name}): rates measured now{guess}")
    whole, block = cluster_costs(*run_of, cluster, run.dtype)
    whole["compilation"] = compile_seconds(run.model, run.config, run.tuning)
    hosts = f"{cluster.hosts} host{'s' * (cluster.hosts > 1)}"
    basis = (
        f"{cluster.devices} x {cluster.device.name} on {hosts}: published rates, assumed efficiency, nothing measured"
    )
    return whole, block, basis


def _tell_sizes(spec: str, method: str, run: Run) -> None:
    model = run.model
    dense = model_bytes(model, itemsize(run.dtype))
    tell(
        (spec, "bold"),
        f": {model.family}, {model.num_layers} blocks, {about_count(model_weights(model))} weights "
        f"({about_count(block_total(model))} in blocks); {about_bytes(dense)} in {run.dtype}",
    )
    bits = 8 * run.result_bytes / max(1, model_weights(model))
    outliers = "" if run.config.target_bits is not None or not run.config.outliers else ", outliers not counted"
    tell(
        ("Result: ", "bold"),
        f"{describe_method(method, run.config)}: {about_bytes(run.result_bytes)}, {bits:.2f} bits per weight over all "
        f"weights{outliers}.",
    )


def _room(run: Run, plan: MemoryPlan, cluster: Cluster | None) -> Iterator[str]:
    """Whether there is enough memory."""
    if cluster is not None:
        device, host = _USABLE * cluster.device.memory, _USABLE * cluster.device.host_memory
        if plan.device_bytes > device:
            yield f"This does not fit: a device has {about_bytes(cluster.device.memory)}. Try --max-memory."
        if plan.host_bytes > host:
            yield f"This does not fit: a host has {about_bytes(cluster.device.host_memory)}. Try --max-memory."
        return
    free = free_of_host()
    if free is not None and plan.host_bytes > free:
        yield f"Only {about_bytes(free)} of memory is free here. Try --max-memory, or another --machine."


def _short(seconds: float | None) -> str:
    """Seconds with two digits or so; a dash for what is not done in each block."""
    if seconds is None:
        return "–"
    return f"{seconds:.0f}" if seconds >= 10 else f"{seconds:.2g}"
