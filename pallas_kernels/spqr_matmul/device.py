"""What is being compiled for: the default device, or the described one of a compilation without it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

ASSUMED_CORES = 132
"""Streaming multiprocessors where the device does not tell: an H100's."""

SHARED_BYTES = {(8, 0): 166912, (9, 0): 232448, (10, 0): 232448, (10, 3): 232448}
"""Shared memory that a thread block may have, by compute capability (CUDA programming guide)."""

LEAST_SHARED_BYTES = 101376
"""Of every other GPU from capability 8.0 on, at least."""


@dataclasses.dataclass(frozen=True)
class Target:
    """A device.

    Attributes:
      platform: ``cpu``, ``gpu`` or ``tpu``.
      kind: the device's name.
      capability: an NVIDIA GPU's compute capability, (0, 0) elsewhere.
      cores: a GPU's streaming multiprocessors, a TPU's cores.
    """

    platform: str
    kind: str
    capability: tuple[int, int]
    cores: int

    @property
    def shared_bytes(self) -> int:
        """Shared memory that a thread block of a GPU may have."""
        return SHARED_BYTES.get(self.capability, LEAST_SHARED_BYTES)


def target() -> Target:
    """The default device of the moment."""
    device: Any = jax.config.values["jax_default_device"]
    if device is None or isinstance(device, str):
        device = jax.devices(device)[0]
    platform = {"cuda": "gpu", "rocm": "gpu"}.get(device.platform, device.platform)
    capability = str(getattr(device, "compute_capability", ""))
    parts = capability.split(".")
    numbers = (int(parts[0]), int(parts[1])) if len(parts) == 2 and all(part.isdigit() for part in parts) else (0, 0)
    cores = getattr(device, "core_count", None) or ASSUMED_CORES
    return Target(platform, device.device_kind, numbers, int(cores))
