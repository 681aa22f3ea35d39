"""Arrays on all devices of a mesh: whole on each, or cut along one axis; in one process or in several."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from spqr_jax.product_jit import product_options

EVERYWHERE = PartitionSpec()
"""Whole on every device."""
_PIECE_BYTES = 2**28  # of an array that is on every device for a moment, on its way to several hosts


def size(mesh: Mesh) -> int:
    """Number of devices."""
    return math.prod(mesh.shape.values())


def cut_along(mesh: Mesh, axis: int = 0) -> PartitionSpec:
    """Cut along one axis, a part for each device of the mesh, whatever the mesh's axes are."""
    return PartitionSpec(*[None] * axis, mesh.axis_names)


def put_everywhere(mesh: Mesh, tree: Any) -> Any:
    """Copies arrays that this process holds to every device; all processes must hold the same.

    Args:
      mesh: of devices.
      tree: of arrays, NumPy's or JAX's on one device. Arrays that are on the mesh already stay.
    """
    sharding = NamedSharding(mesh, EVERYWHERE)

    def put(leaf: Any) -> jax.Array:
        if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
            return leaf
        copies = [jax.device_put(leaf, device) for device in mesh.local_devices]
        return jax.make_array_from_single_device_arrays(leaf.shape, sharding, copies)

    return jax.tree.map(put, tree)


def put_parts(mesh: Mesh, part: Callable[[int], Any]) -> jax.Array:
    """One array of a part for each device, stacked: device i of the mesh holds ``part(i)`` as [1, ...].

    `part` is called for the devices of this process only.
    """
    here = [
        jax.device_put(part(index)[None], device)
        for index, device in enumerate(mesh.devices.flat)
        if device.process_index == jax.process_index()
    ]
    shape = (size(mesh), *here[0].shape[1:])
    return jax.make_array_from_single_device_arrays(shape, NamedSharding(mesh, cut_along(mesh)), here)


def cut(mesh: Mesh, array: Any, axis: int = 0, length: int | None = None) -> jax.Array:
    """An array of this process's, cut along one axis into a part for each device; all processes must hold the same.

    Args:
      mesh: of devices.
      array: NumPy's or JAX's. Only the parts are put on devices.
      axis: to cut, of a length that the devices share evenly.
      length: of the axis with zeros behind its end; None for none. The zeros are made part by part.
    """
    shape = list(array.shape)
    shape[axis] = shape[axis] if length is None else length
    sharding = NamedSharding(mesh, cut_along(mesh, axis))
    places = sharding.addressable_devices_indices_map(tuple(shape))
    parts = [jax.device_put(_part(array, place, axis, shape), device) for device, place in places.items()]
    return jax.make_array_from_single_device_arrays(tuple(shape), sharding, parts)


def _part(array: Any, place: Any, axis: int, shape: list[int]) -> Any:
    """What belongs at `place`, with zeros behind the end of the array's axis."""
    part = array[place]
    missing = len(range(*place[axis].indices(shape[axis]))) - part.shape[axis]
    if not missing:
        return part
    return np.pad(np.asarray(part), [(0, missing if index == axis else 0) for index in range(part.ndim)])


def to_host(mesh: Mesh, array: jax.Array, axis: int = 0, length: int | None = None) -> np.ndarray:
    """An array of the mesh in host memory, never whole on a device. Every process must call it.

    Args:
      mesh: of devices.
      array: cut along one axis.
      axis: this axis.
      length: how much of the axis is wanted, from its begin; None for all.
    """
    length = array.shape[axis] if length is None else length
    whole = np.empty((*array.shape[:axis], length, *array.shape[axis + 1 :]), array.dtype)
    if not array.is_fully_addressable:
        return _from_all_hosts(mesh, array, axis, whole)
    for shard in array.addressable_shards:
        first, end, _ = shard.index[axis].indices(array.shape[axis])
        if first < length:
            inside = [slice(None)] * axis
            part = np.asarray(shard.data)[(*inside, slice(0, length - first))]
            whole[(*inside, slice(first, end))] = part
    return whole


def _from_all_hosts(mesh: Mesh, array: jax.Array, axis: int, whole: np.ndarray) -> np.ndarray:
    """Fills `whole` with pieces along another axis, which for a moment are on every device."""
    others = [index for index in range(array.ndim) if index != axis]
    across = max(others, key=lambda index: array.shape[index], default=axis)
    total = array.shape[across]
    size = total if across == axis else max(1, min(total, _PIECE_BYTES * total // max(array.nbytes, 1)))
    for begin in range(0, total, size):
        first = min(begin, total - size)
        piece = np.asarray(_gathered_piece(mesh, across, size)(array, np.int32(first)).addressable_data(0))
        into = tuple(slice(first, first + size) if index == across else slice(None) for index in range(array.ndim))
        if across == axis:
            return piece[tuple(slice(0, length) for length in whole.shape)]
        whole[into] = piece[(*[slice(None)] * axis, slice(0, whole.shape[axis]))]
    return whole


@lru_cache
def _gathered_piece(mesh: Mesh, axis: int, size: int) -> Any:
    def piece(array: jax.Array, first: jax.Array) -> jax.Array:
        return lax.dynamic_slice_in_dim(array, first, size, axis)

    return jax.jit(piece, out_shardings=NamedSharding(mesh, EVERYWHERE))


@lru_cache
def _gather(mesh: Mesh) -> Callable[[Any], Any]:
    return jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, EVERYWHERE))


def gather(mesh: Mesh, tree: Any) -> Any:
    """Arrays of the mesh, whole, on this process's first device of it. Every process must call it."""
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), _gather(mesh)(tree))


def mesh_jit(
    mesh: Mesh, function: Callable[..., Any], in_specs: Any, out_specs: Any, *, options: Any = None, **jit_options: Any
) -> Any:
    """A program that every device of the mesh runs on its parts.

    Args:
      mesh: of devices.
      function: of parts. Inside it, ``jax.lax.axis_index(mesh.axis_names)`` is the device's index.
      in_specs, out_specs: as `jax.shard_map` has them.
      options: the compiler's; by default those of `product_jit`.
      jit_options: of `jax.jit`, such as ``donate_argnums``.
    """
    mapped = jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    if options is None:
        options = product_options(mesh.devices.flat[0].platform)
    return jax.jit(mapped, compiler_options=options, **jit_options)


def sent_by(mesh: Mesh, index: jax.Array, tree: Any) -> Any:
    """Inside a program of a mesh: the arrays of device `index`, on every device; none of the others' is held."""
    here = lax.axis_index(mesh.axis_names) == index
    return jax.tree.map(lambda x: lax.psum(jnp.where(here, x, jnp.zeros((), x.dtype)), mesh.axis_names), tree)
