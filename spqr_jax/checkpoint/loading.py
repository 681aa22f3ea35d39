"""`load`: a whole checkpoint in memory, or shared by devices, of which each process reads its own parts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, overload

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from spqr_jax.array import SpQRArray
from spqr_jax.checkpoint.description import DATA_FIELDS, WeightSpec
from spqr_jax.checkpoint.reading import CheckpointSource, damaged, read_leaves
from spqr_jax.checkpoint.stored import damage
from spqr_jax.errors import CheckpointError, SpQRError
from spqr_jax.layout import entry_capacity
from spqr_jax.models.config import DecoderConfig
from spqr_jax.models.weights import Decoder
from spqr_jax.parallel.cut import Outliers, Range, Split, cut_order, cut_outliers, leaf_ranges, piece_of
from spqr_jax.parallel.plan import block_splits
from spqr_jax.parallel.sharded import (
    AXIS,
    Pieces,
    ShardedDecoder,
    device_count,
    outer_split,
    own_devices,
    place_pieces,
    shard_source,
)
from spqr_jax.stream.blocks import collect


@overload
def load(path: Path | str, sharding: None = None) -> Decoder: ...
@overload
def load(path: Path | str, sharding: Mesh | NamedSharding) -> ShardedDecoder: ...
def load(path: Path | str, sharding: Mesh | NamedSharding | None = None) -> Decoder | ShardedDecoder:
    """Reads a checkpoint into memory and verifies it.

    It needs neither the original model nor a network. To read the tokenizer too, use `load_model`.

    Args:
      path: a directory that `save` or ``spqr`` wrote.
      sharding: devices that share the model, as `shard` has them: a mesh with an axis ``model``, or a
        `jax.sharding.NamedSharding` whose spec names the axis. This process then holds one block at a time, besides
        its devices' parts. One of several processes holds less: its own devices' parts of codes, statistics and dense
        weights of a block, and all its outliers until they are cut. The processes verify the checkpoint together: each
        reads an equal part of it once more, and all fail if one finds damage. All must call `load`. None for the whole
        model on one device.

    Returns:
      The model; with ``sharding`` as `shard` returns it.

    Raises:
      CheckpointError: not a checkpoint, another format version, incomplete, truncated or edited. The message names
        the array at fault.
      ModelError, SpQRError: with ``sharding``, as `shard`.

    Example:
      >>> path = spqr_jax.save("small", model)
      >>> spqr_jax.load("small").config == model.config
      True
    """
    source = CheckpointSource(path)
    if sharding is None:
        return collect(source)
    mesh, axis = _mesh_of(sharding)
    if jax.process_count() == 1:
        return shard_source(source, mesh, axis)
    return place_pieces(_Parts(source, mesh, axis), mesh, axis)


def _mesh_of(sharding: Mesh | NamedSharding) -> tuple[Mesh, str]:
    """The devices, and the name of the axis over which they share weights."""
    if isinstance(sharding, Mesh):
        return sharding, AXIS
    names = [name for name in sharding.spec if name is not None]
    mesh = sharding.mesh
    if len(names) != 1 or not isinstance(names[0], str) or not isinstance(mesh, Mesh):
        raise SpQRError(f"a sharding must be over one axis of a mesh of devices, got {sharding.spec}")
    return mesh, names[0]


class _Parts:
    """A `PieceSource` over a checkpoint that several processes read together."""

    def __init__(self, source: CheckpointSource, mesh: Mesh, axis: str) -> None:
        self._source, self._mesh, self._axis = source, mesh, axis
        self._devices = device_count(mesh, axis)

    @property
    def config(self) -> DecoderConfig:
        return self._source.config

    def outer(self) -> dict[str, Pieces]:
        _, specs = self._source.part(None)
        splits = {name: outer_split(name, _form(spec), self._devices) for name, spec in specs.items()}
        return self._read(None, "", splits)

    def block(self, index: int) -> dict[str, Pieces]:
        splits = block_splits(self.config, self.config.kind(index), self._devices)
        return self._read(index, f"layers.{index}.", splits)

    def _read(self, index: int | None, prefix: str, splits: Mapping[str, Split | None]) -> dict[str, Pieces]:
        directory, specs = self._source.part(index)
        try:
            found = _first_damage(directory, specs)
            places = {name: self._places(spec, splits[name]) for name, spec in specs.items()}
            tree = read_leaves(
                directory,
                specs,
                {(name, leaf): sharding for name, leaves in places.items() for leaf, sharding in leaves.items()},
            )
            problem: Exception | None = None if found is None else damage(directory, found)
        except SpQRError as error:
            problem = error
        _agree(problem, directory)
        return {
            name: self._pieces(prefix + name, spec, splits[name], tree[name], f"{directory}: {name}")
            for name, spec in specs.items()
        }

    def _places(self, spec: WeightSpec, split: Split | None) -> dict[str, Any]:
        """Where each array of a weight is read to: cut where that is possible, else whole."""
        here = SingleDeviceSharding(jax.local_devices()[0])
        ranges = [_ranges(spec, split, place) for place in range(self._devices)]
        return {
            leaf: self._sharding([of_place[leaf] for of_place in ranges], entry.shape) or here
            if leaf in ranges[0]
            else here
            for leaf, entry in spec.leaves.items()
        }

    def _sharding(self, ranges: list[Range], shape: tuple[int, ...]) -> NamedSharding | None:
        """One that gives each device its range of an array; None if the ranges are no equal parts of it."""
        axis, starts = ranges[0].axis, sorted({part.start for part in ranges})
        length = ranges[0].end - ranges[0].start
        if starts != list(range(0, shape[axis], length)) or shape[axis] % length:
            return None
        along = self._mesh.axis_names.index(self._axis)
        devices = np.moveaxis(self._mesh.devices, along, 0).reshape(len(starts), -1)
        spec = [None] * axis + ["part"]
        return NamedSharding(Mesh(devices, ("part", "copy")), PartitionSpec(*spec))

    def _pieces(
        self, path: str, spec: WeightSpec, split: Split | None, leaves: dict[str, jax.Array], label: str
    ) -> Pieces:
        """The pieces of this process's devices."""
        form = _form(spec)
        group_size = form.group_size if isinstance(form, SpQRArray) else None
        if split is None:
            whole = spec.build({leaf: np.asarray(value) for leaf, value in leaves.items()}, label)
            return Pieces({place: whole for _, place in own_devices(self._mesh, self._axis)}, group_size)
        parts = {
            place: _local(leaves, _ranges(spec, split, place), device)
            for device, place in own_devices(self._mesh, self._axis)
        }
        if not isinstance(form, SpQRArray):
            return Pieces({place: part["values"] for place, part in parts.items()}, None)
        whole_lists = (np.asarray(leaves[f"outlier_{name}"]) for name in ("row_ptr", "cols", "values"))
        order = np.asarray(leaves["perm"]) if "perm" in leaves else None
        try:
            pieces = _quantized_pieces(form, split, parts, Outliers(*whole_lists), order)
        except SpQRError as error:
            raise SpQRError(f"{self._devices} devices cannot share {path}: {error}") from None
        try:
            return Pieces({place: piece.validate() for place, piece in pieces.items()}, group_size)
        except SpQRError as error:
            raise CheckpointError(f"{label}: {error}") from None


def _form(spec: WeightSpec) -> Any:
    """A weight without its arrays: its shape and static attributes, and whether its statistics have a second level."""
    if spec.meta is None:
        return jax.ShapeDtypeStruct(spec.shape, spec.leaves["values"].dtype)
    out, inner = spec.shape
    meta = {name: value for name, value in spec.meta.items() if name != "nnz"}
    fields: dict[str, Any] = {field: spec.leaves.get(field) for field in DATA_FIELDS}
    return SpQRArray(**fields, shape=(out, inner), **meta)


def _ranges(spec: WeightSpec, split: Split | None, place: int) -> dict[str, Range]:
    """The parts of a weight's arrays that belong to a place along the axis."""
    if split is None:
        return {}
    if spec.meta is None:
        return {"values": Range(split.axis, split.starts[place], split.starts[place] + split.size)}
    return leaf_ranges(_form(spec), split, place)


def _local(leaves: Mapping[str, jax.Array], ranges: Mapping[str, Range], device: Any) -> dict[str, np.ndarray]:
    """A device's parts of arrays, which were read cut or whole."""
    parts = {}
    for name, part in ranges.items():
        leaf = leaves[name]
        if isinstance(leaf.sharding, SingleDeviceSharding):
            parts[name] = part.of(np.asarray(leaf))
        else:
            parts[name] = np.asarray(next(s.data for s in leaf.addressable_shards if s.device == device))
    return parts


def _quantized_pieces(
    form: SpQRArray, split: Split, parts: dict[int, dict[str, np.ndarray]], outliers: Outliers, perm: np.ndarray | None
) -> dict[int, SpQRArray]:
    """The pieces of some places, with outlier lists that are as long on every place."""
    lists = [cut_outliers(outliers, split, place) for place in range(len(split.starts))]
    capacity = entry_capacity(max(len(own.cols) for own in lists))
    return {
        place: piece_of(form, split, leaves, lists[place], cut_order(perm, split, place)).with_capacity(capacity)
        for place, leaves in parts.items()
    }


def _first_damage(directory: Path, specs: dict[str, WeightSpec]) -> str | None:
    """An array that does not match its checksum, of those that this process verifies; None if all do."""
    leaves = [(name, leaf) for name, spec in specs.items() for leaf in spec.leaves]
    here = SingleDeviceSharding(jax.local_devices()[0])
    own = _divided(specs, leaves)[jax.process_index()]
    tree = read_leaves(directory, specs, dict.fromkeys(own, here))
    for name, leaf in own:
        if damaged(specs[name], leaf, tree[name][leaf]):
            return f"{name}.{leaf}"
    return None


def _divided(specs: dict[str, WeightSpec], leaves: list[tuple[str, str]]) -> list[list[tuple[str, str]]]:
    """The arrays that each process verifies: the largest first, to the process with the fewest bytes."""

    def size(leaf: tuple[str, str]) -> int:
        entry = specs[leaf[0]].leaves[leaf[1]]
        return math.prod(entry.shape) * entry.dtype.itemsize

    shares: list[list[tuple[str, str]]] = [[] for _ in range(jax.process_count())]
    loads = [0] * len(shares)
    for leaf in sorted(leaves, key=size, reverse=True):
        least = loads.index(min(loads))
        shares[least].append(leaf)
        loads[least] += size(leaf)
    return shares


def _agree(problem: Exception | None, directory: Path) -> None:
    """Raises in every process if there is a problem in one.

    Raises:
      CheckpointError: another process has one.
    """
    problems = np.atleast_1d(multihost_utils.process_allgather(np.int32(problem is not None)))
    if problem is not None:
        raise problem
    if np.any(problems):
        processes = ", ".join(map(str, np.flatnonzero(problems)))
        raise CheckpointError(f"{directory} could not be read or verified by process {processes}: see its message")
