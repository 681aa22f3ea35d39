"""Machines by name, such as ``8xH100`` and ``v5e-256``, from published figures; none of them was measured here.

A rate is what the maker states as peak. How much of it a kind of product reaches is assumed, see `cluster.py`.
"""

from __future__ import annotations

import dataclasses
import re

from spqr_jax.errors import SpQRError

_NVIDIA = "NVIDIA's data sheet of the {}; products in float32 without tensor cores"
_TPU = "docs.cloud.google.com/tpu/docs/{}; float32 assumed to take six passes in bfloat16"


@dataclasses.dataclass(frozen=True)
class Device:
    """One GPU or TPU chip. Bytes, bytes per second and operations per second.

    Attributes:
      name: such as ``H100``.
      platform: ``gpu`` or ``tpu``.
      memory: of the device.
      bandwidth: of its memory.
      bfloat16: rate of dense products with bfloat16 factors.
      float32: rate of dense products in full float32.
      link: to other devices, in one direction.
      from_host: from its host's memory; assumed: what the bus allows.
      launch: seconds a small kernel takes at least; assumed.
      a_host: devices of one host.
      host_memory: of one host.
      source: where the published figures are from.
    """

    name: str
    platform: str
    memory: float
    bandwidth: float
    bfloat16: float
    float32: float
    link: float
    from_host: float
    launch: float
    a_host: int
    host_memory: float
    source: str


def _gpu(
    name: str, memory: float, bandwidth: float, bfloat16: float, float32: float, link: float, bus: float
) -> Device:
    source = _NVIDIA.format(name)
    return Device(
        name, "gpu", memory, bandwidth, bfloat16, float32, link, bus, 5e-6, a_host=8, host_memory=1e12, source=source
    )


def _tpu(
    name: str, memory: float, bandwidth: float, bfloat16: float, link: float, a_host: int, host_memory: float
) -> Device:
    rates = (bfloat16, bfloat16 / 6)
    source = _TPU.format(name)
    return Device(name, "tpu", memory, bandwidth, *rates, link, 16e9, 2e-6, a_host, host_memory, source=source)


DEVICES = {
    device.name.lower(): device
    for device in (
        # memory, its bandwidth, bfloat16, float32, link in one direction, from the host
        _gpu("A100", 80e9, 2.04e12, 312e12, 19.5e12, 300e9, 25e9),
        _gpu("H100", 80e9, 3.35e12, 989e12, 67e12, 450e9, 50e9),
        _gpu("H200", 141e9, 4.8e12, 989e12, 67e12, 450e9, 50e9),
        _gpu("B200", 192e9, 7.7e12, 2250e12, 75e12, 900e9, 50e9),
        _gpu("RTX4090", 24e9, 1.01e12, 165e12, 82.6e12, 25e9, 25e9),
        # memory, its bandwidth, bfloat16, link in one direction, chips a host, host memory
        _tpu("v5e", 16e9, 819e9, 197e12, 200e9, 8, 550e9),
        _tpu("v5p", 95e9, 2765e9, 459e12, 600e9, 4, 448e9),
        _tpu("v6e", 32e9, 1638e9, 918e12, 400e9, 8, 1650e9),
    )
}
_NETWORK = 50e9  # bytes per second and GPU between hosts: a network card of 400 Gbit/s for each; assumed


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Equal devices on one or more hosts.

    Attributes:
      name: as it was given.
      device: one of them.
      devices: their number, on all hosts.
      hosts: as many processes.
    """

    name: str
    device: Device
    devices: int
    hosts: int

    @property
    def link(self) -> float:
        """Bytes per second and direction from one device to the others. TPUs of a slice have links across hosts."""
        crosses = self.hosts > 1 and self.device.platform == "gpu"
        return min(self.device.link, _NETWORK) if crosses else self.device.link


def named_cluster(name: str) -> Cluster:
    """The machine of a name: ``H100``, ``8xH100``, ``2x8xH100`` (two hosts), ``v5e-256``.

    Raises:
      SpQRError: no such machine.
    """
    text = name.strip().lower()
    if (tpu := re.fullmatch(r"(v\d\w*)-(\d{1,5})", text)) and tpu[1] in DEVICES and int(tpu[2]):
        device, chips = DEVICES[tpu[1]], int(tpu[2])
        return Cluster(name, device, chips, -(-chips // device.a_host))
    if (gpus := re.fullmatch(r"(?:(?:(\d{1,4})x)?(\d{1,2})x)?(\w+)", text)) and gpus[3] in DEVICES:
        hosts, count = int(gpus[1] or 1), int(gpus[2] or 1)
        if hosts and count:
            return Cluster(name, DEVICES[gpus[3]], hosts * count, hosts)
    known = ", ".join(device.name for device in DEVICES.values())
    raise SpQRError(
        f"no machine {name!r}: give a device ({known}), devices of one host (8xH100), of several (2x8xH100), or chips "
        "of a TPU slice (v5e-256)"
    )
