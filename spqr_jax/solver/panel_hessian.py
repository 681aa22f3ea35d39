"""A Hessian whose panels are spread over the devices of a mesh, with the sums of one device.

Letters as in `hessian.py`. Each device holds some panels of X Xᵀ, whole rows of it, and adds
to them what all chunks of text give, chunk by chunk. Sums are never added across devices, and
a panel is one product of one shape: so it is the same number for number on any count of devices,
and on a CPU the same as without a mesh.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding

import spqr_jax.devices as devices
from spqr_jax.solver.drift import cross_panel
from spqr_jax.solver.hessian import gram_panel, gram_panels, mean_square


def panels_of(width: int, device: int, count: int) -> list[tuple[int, int]]:
    """Columns [first, end) of the panels of one of `count` devices.

    A panel begins at its diagonal, so that early ones are longer: devices take turns, forth and back.
    """
    panels = gram_panels(width)
    turns = [range(count)[:: 1 if turn % 2 == 0 else -1] for turn in range(-(-len(panels) // count))]
    order = [index for turn in turns for index in turn]
    return [panel for panel, index in zip(panels, order, strict=False) if index == device]


def panel_slots(width: int, count: int) -> tuple[int, int]:
    """Most panels of a device, and rows of a panel."""
    panels = gram_panels(width)
    return -(-len(panels) // count), panels[0][1]


@dataclasses.dataclass(frozen=True)
class PanelHessian:
    """As `Hessian`, under a mesh.

    Attributes:
      panels: float32 [devices, panels a device, rows, in], a part on each device; see `panels_of`.
      tokens: number of tokens, float32 scalar, on every device.
      mesh: of the devices.
    """

    panels: jax.Array
    tokens: jax.Array
    mesh: Mesh

    @property
    def width(self) -> int:
        """Number of inputs."""
        return int(self.panels.shape[-1])

    def matrix(self) -> jax.Array:
        """H = (2/n) X Xᵀ, float32 [in, in], on this process's first device. Every process must call it."""
        return mean_square(_assembled(self.mesh, self.panels), self.tokens.addressable_data(0))


def _assembled(mesh: Mesh, panels: jax.Array) -> np.ndarray:
    """[devices, panels a device, rows, in] -> X Xᵀ [in, in] in host memory, whose upper triangle is complete."""
    count, _, _, width = panels.shape
    parts = devices.to_host(mesh, panels, length=min(count, len(gram_panels(width))))  # devices behind these have none
    gram = np.empty((width, width), np.float32)
    for device in range(len(parts)):
        for slot, (first, end) in enumerate(panels_of(width, device, count)):
            gram[first:end] = parts[device, slot, : end - first]
    return gram


def empty_panels(mesh: Mesh, width: int) -> PanelHessian:
    """A Hessian of no tokens."""
    slots, rows = panel_slots(width, devices.size(mesh))
    zeros = _zeros(mesh, (devices.size(mesh), slots, rows, width))
    return PanelHessian(zeros, devices.put_everywhere(mesh, np.zeros((), np.float32)), mesh)


@lru_cache
def _zeros_program(mesh: Mesh, shape: tuple[int, ...]) -> Any:
    sharding = NamedSharding(mesh, devices.cut_along(mesh))
    return jax.jit(partial(jnp.zeros, shape, jnp.float32), out_shardings=sharding)


def _zeros(mesh: Mesh, shape: tuple[int, ...]) -> jax.Array:
    zeros: jax.Array = _zeros_program(mesh, shape)()
    return zeros


def counted_inputs(x: jax.Array, counts: jax.Array) -> jax.Array:
    """Inputs [..., in] as f32 (or bfloat16) [tokens, in]; zeros where the bool scalar `counts` says no."""
    x = x.reshape(-1, x.shape[-1])
    x = x if x.dtype == jnp.bfloat16 else x.astype(jnp.float32)
    return jnp.where(counts, x, jnp.zeros((), x.dtype))


def add_panels(mesh: Mesh, panels: jax.Array, tokens: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Inside a program of a mesh: adds X Xᵀ of all devices' chunks, in their order, to this device's panels.

    Args:
      mesh: of the program.
      panels: [1, panels a device, rows, in], this device's.
      tokens: f32 scalar.
      x: [tokens, in], from `counted_inputs`, this device's.
    """
    width, count = panels.shape[-1], devices.size(mesh)

    def added(columns: Sequence[tuple[int, int]], panels: jax.Array, x: jax.Array) -> jax.Array:
        for slot, (first, end) in enumerate(columns):
            part = panels[slot, : end - first, first:] + gram_panel(x, first, end)
            panels = lax.dynamic_update_slice(panels, part[None], (slot, 0, first))
        return panels

    branches = [partial(added, panels_of(width, device, count)) for device in range(count)]

    def chunk(sums: tuple[jax.Array, jax.Array], sender: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        total, tokens = sums
        sent = devices.sent_by(mesh, sender, x)
        total = lax.switch(lax.axis_index(mesh.axis_names), branches, total, sent)
        return (total, tokens + jnp.sum(jnp.any(sent != 0, axis=1), dtype=jnp.float32)), None

    (total, tokens), _ = lax.scan(chunk, (panels[0], tokens), jnp.arange(count))
    return total[None], tokens


def add_cross_panels(mesh: Mesh, panels: jax.Array, x: jax.Array, aim: jax.Array) -> jax.Array:
    """Inside a program of a mesh: adds (aim - X) Xᵀ of all chunks, whole rows, to this device's panels.

    Args:
      mesh, panels, x: as `add_panels` has them.
      aim: what is read in the dense model, as `x`.
    """
    width, count = panels.shape[-1], devices.size(mesh)

    def added(columns: Sequence[tuple[int, int]], panels: jax.Array, miss: jax.Array, x: jax.Array) -> jax.Array:
        for slot, (first, end) in enumerate(columns):
            part = panels[slot, : end - first] + cross_panel(miss, x, first, end)
            panels = lax.dynamic_update_slice(panels, part[None], (slot, 0, 0))
        return panels

    branches = [partial(added, panels_of(width, device, count)) for device in range(count)]

    def chunk(total: jax.Array, sender: jax.Array) -> tuple[jax.Array, None]:
        miss, sent = devices.sent_by(mesh, sender, (aim - x, x))
        return lax.switch(lax.axis_index(mesh.axis_names), branches, total, miss, sent), None

    return lax.scan(chunk, panels[0], jnp.arange(count))[0][None]


def cross_matrix(hessian: PanelHessian, panels: jax.Array) -> jax.Array:
    """(2/n) Σ (aim - x) xᵀ [in, in] from its panels, on this process's first device. Every process must call it."""
    return 2.0 / hessian.tokens.addressable_data(0) * jnp.asarray(_assembled(hessian.mesh, panels))
