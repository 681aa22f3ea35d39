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

from spqr_jax import devices
from spqr_jax.solver.hessian import gram_panel, gram_panels, mean_square


def panels_of(width: int, device: int, count: int) -> list[tuple[int, int]]:
    """Columns [first, end) of the panels of one of `count` devices.

    A panel begins at its diagonal, so that early ones are longer: devices take turns, forth and back.
    """
    panels = gram_panels(width)
    turns = [range(count)[:: 1 if turn % 2 == 0 else -1] for turn in range(-(-len(panels) // count))]
    order = [index for turn in turns for index in turn]
    return [panel for panel, index in zip(panels, order, strict=False) if index == device]


def _slots(width: int, count: int) -> tuple[int, int]:
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
        panels, tokens = devices.gather(self.mesh, (self.panels, self.tokens))
        return mean_square(_assembled(panels), tokens)


@jax.jit
def _assembled(panels: jax.Array) -> jax.Array:
    """[devices, panels a device, rows, in] -> X Xᵀ [in, in], whose upper triangle is complete."""
    count, _, _, width = panels.shape
    gram = jnp.zeros((width, width), panels.dtype)
    for device in range(count):
        for slot, (first, end) in enumerate(panels_of(width, device, count)):
            gram = gram.at[first:end].set(panels[device, slot, : end - first])
    return gram


def empty_panels(mesh: Mesh, width: int) -> PanelHessian:
    """A Hessian of no tokens."""
    slots, rows = _slots(width, devices.size(mesh))
    zeros = _zeros(mesh, (devices.size(mesh), slots, rows, width))
    return PanelHessian(zeros, devices.put_everywhere(mesh, np.zeros((), np.float32)), mesh)


@lru_cache
def _zeros_program(mesh: Mesh, shape: tuple[int, ...]) -> Any:
    sharding = NamedSharding(mesh, devices.cut_along(mesh))
    return jax.jit(partial(jnp.zeros, shape, jnp.float32), out_shardings=sharding)


def _zeros(mesh: Mesh, shape: tuple[int, ...]) -> jax.Array:
    zeros: jax.Array = _zeros_program(mesh, shape)()
    return zeros


def gathered_inputs(mesh: Mesh, x: jax.Array, counts: jax.Array) -> jax.Array:
    """Inside a program of a mesh: all devices' inputs, [devices, tokens, in]; zeros of chunks that do not count.

    They are float32, or bfloat16 if `x` is.

    Args:
      mesh: of the program.
      x: [..., in], this device's.
      counts: bool scalar, whether this device's chunk does.
    """
    x = x.reshape(-1, x.shape[-1])
    x = x if x.dtype == jnp.bfloat16 else x.astype(jnp.float32)
    return lax.all_gather(jnp.where(counts, x, jnp.zeros((), x.dtype)), mesh.axis_names)


def add_panels(mesh: Mesh, panels: jax.Array, tokens: jax.Array, inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Inside a program of a mesh: adds X Xᵀ of all chunks, in their order, to this device's panels.

    Args:
      mesh: of the program.
      panels: [1, panels a device, rows, in], this device's.
      tokens: f32 scalar.
      inputs: from `gathered_inputs`.
    """
    width, count = panels.shape[-1], devices.size(mesh)
    seen = jnp.sum(jnp.any(inputs != 0, axis=2), axis=1, dtype=jnp.float32)

    def product(x: jax.Array, first: int, end: int) -> jax.Array:
        return gram_panel(x, first, end)

    total = _added(mesh, panels[0], inputs, [panels_of(width, i, count) for i in range(count)], product, True)
    return total[None], lax.fori_loop(0, count, lambda chunk, tokens: tokens + seen[chunk], tokens)


def add_cross_panels(mesh: Mesh, panels: jax.Array, inputs: jax.Array, aims: jax.Array) -> jax.Array:
    """Inside a program of a mesh: adds (aim - X) Xᵀ of all chunks, whole rows, to this device's panels.

    Args:
      mesh, panels, inputs: as `add_panels` has them.
      aims: what is read in the dense model, as `inputs`.
    """
    width, count = panels.shape[-1], devices.size(mesh)

    def product(both: jax.Array, first: int, end: int) -> jax.Array:
        x, aim = both[: len(both) // 2], both[len(both) // 2 :]
        return _product((aim - x)[:, first:end], x)

    both = jnp.concatenate([inputs, aims], axis=1)
    every = [panels_of(width, i, count) for i in range(count)]
    return _added(mesh, panels[0], both, every, product, False)[None]


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    """aᵀ b in full float32."""
    return lax.dot_general(a, b, (((0,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)


def _added(
    mesh: Mesh,
    panels: jax.Array,
    chunks: jax.Array,
    every: Sequence[Sequence[tuple[int, int]]],
    product: Any,
    from_diagonal: bool,
) -> jax.Array:
    """This device's panels [panels a device, rows, in], the products of all chunks added one after the other."""

    def add(own: Sequence[tuple[int, int]], panels: jax.Array, x: jax.Array) -> tuple[jax.Array, None]:
        for slot, (first, end) in enumerate(own):
            begin = first if from_diagonal else 0
            part = panels[slot, : end - first, begin:] + product(x, first, end)
            panels = lax.dynamic_update_slice(panels, part[None], (slot, 0, begin))
        return panels, None

    branches = [lambda panels, own=own: lax.scan(partial(add, own), panels, chunks)[0] for own in every]
    total: jax.Array = lax.switch(lax.axis_index(mesh.axis_names), branches, panels)
    return total


def cross_matrix(hessian: PanelHessian, panels: jax.Array) -> jax.Array:
    """(2/n) Σ (aim - x) xᵀ [in, in] from its panels, on this process's first device. Every process must call it."""
    panels, tokens = devices.gather(hessian.mesh, (panels, hessian.tokens))
    return 2.0 / tokens * _assembled(panels)
