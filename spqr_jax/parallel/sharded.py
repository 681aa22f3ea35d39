"""`ShardedDecoder`: a model that the devices of a mesh hold together, each with its piece of every large weight."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, cast

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from spqr_jax.errors import SpQRError
from spqr_jax.models.config import BlockKind, DecoderConfig
from spqr_jax.models.weights import OUTER_NAMES, Block, Decoder, Outer, Weight, block_shapes, outer_shapes
from spqr_jax.parallel.cut import Split, cut, join, row_unit, with_equal_lists
from spqr_jax.parallel.plan import VOCABULARY, block_splits, local_config, vocabulary_split
from spqr_jax.quantized import is_quantized
from spqr_jax.stream import sweep
from spqr_jax.stream.blocks import BlockSource, TreeSource

AXIS = "model"
"""Name of the mesh's axis over which weights are shared, if nothing else is asked for."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ShardedDecoder:
    """A model on several devices, a pytree. Make one with `shard`, or `load` with a mesh.

    Attributes:
      pieces: a `Decoder` with the sizes of one device. Its arrays have the devices in front: [devices, ...], one piece
        on each.
      group_sizes: path -> inputs of a group of the whole weight, for quantized weights; static.
      config: of the whole model; static.
      mesh: the devices; static.
      axis: name of the mesh's axis over which weights are shared; static.
    """

    pieces: Decoder
    group_sizes: tuple[tuple[str, int], ...] = dataclasses.field(metadata={"static": True})
    config: DecoderConfig = dataclasses.field(metadata={"static": True})
    mesh: Mesh = dataclasses.field(metadata={"static": True})
    axis: str = dataclasses.field(metadata={"static": True})

    @property
    def devices(self) -> int:
        """How many devices share the weights."""
        return int(self.mesh.shape[self.axis])


def device_count(mesh: Mesh, axis: str) -> int:
    """Devices along an axis.

    Raises:
      SpQRError: the mesh has no such axis.
    """
    if axis not in mesh.shape:
        raise SpQRError(f"the mesh has no axis {axis!r}, only {', '.join(map(repr, mesh.axis_names))}")
    return int(mesh.shape[axis])


def own_devices(mesh: Mesh, axis: str) -> list[tuple[Any, int]]:
    """The devices of this process, and where each stands along an axis."""
    along = mesh.axis_names.index(axis)
    return [
        (device, place[along])
        for place, device in np.ndenumerate(mesh.devices)
        if device.process_index == jax.process_index()
    ]


def spread(values: Mapping[Any, np.ndarray], mesh: Mesh, axis: str) -> jax.Array:
    """One array [devices, ...] of which every device has its own slice.

    Args:
      values: device of this process -> its slice, a NumPy array or an array on that device; all of one shape.
      mesh, axis: of the devices.
    """
    slices = [jax.device_put(value[None], device) for device, value in values.items()]
    shape = (int(mesh.shape[axis]), *slices[0].shape[1:])
    return jax.make_array_from_single_device_arrays(shape, NamedSharding(mesh, PartitionSpec(axis)), slices)


def spread_pieces(pieces: Mapping[int, Weight], mesh: Mesh, axis: str) -> Weight:
    """A weight's pieces on their devices: piece by its place along the axis; leaves are NumPy arrays."""
    places = own_devices(mesh, axis)
    leaves = {place: jax.tree.leaves(piece) for place, piece in pieces.items()}

    def leaf(number: int) -> jax.Array:
        # Copied: on a CPU the device may otherwise keep a view, and with it the whole weight.
        return spread({device: np.array(leaves[place][number]) for device, place in places}, mesh, axis)

    first = places[0][1]
    spread_leaves = [leaf(number) for number in range(len(leaves[first]))]
    return jax.tree.unflatten(jax.tree.structure(pieces[first]), spread_leaves)


def shard(params: Decoder, mesh: Mesh, axis: str = AXIS) -> ShardedDecoder:
    """Shares a model among devices (tensor parallel).

    Every device gets whole heads of attention, an equal part of every MLP, and a range of the vocabulary. `Generator`
    and `generate` then run on all devices at once. A model that was quantized with ``order="activation"`` needs
    `SpQRConfig.input_shards`, a multiple of the number of devices.

    Args:
      params: the model, dense or quantized. With several processes, each must have the same model.
      mesh: the devices.
      axis: name of the mesh's axis over which weights are shared. Other axes hold copies.

    Returns:
      The model on the devices.

    Raises:
      ModelError: so many devices cannot share the heads or the MLPs evenly.
      SpQRError: a quantized weight cannot be cut, or the mesh has no such axis. The message says what to do.

    Example:
      >>> mesh = jax.make_mesh((1,), ("model",))
      >>> sharded = spqr_jax.shard(model, mesh)
      >>> spqr_jax.generate(sharded, [[1, 5, 9]], max_new_tokens=4).prompt_tokens
      [3]
    """
    return shard_source(TreeSource(params), mesh, axis)


def shard_source(source: BlockSource, mesh: Mesh, axis: str = AXIS) -> ShardedDecoder:
    """As `shard`, of a model that is read block by block: this process holds one whole block at a time."""
    return place_pieces(WholeBlocks(source, device_count(mesh, axis)), mesh, axis)


class Pieces(NamedTuple):
    """The pieces of one weight that this process needs.

    Attributes:
      by_place: place along the axis -> the piece there, its leaves as NumPy arrays.
      group_size: inputs of a group of the whole; None for a dense weight.
    """

    by_place: Mapping[int, Weight]
    group_size: int | None


class PieceSource(Protocol):
    """Gives a model's weights in pieces, part by part."""

    @property
    def config(self) -> DecoderConfig: ...

    def outer(self) -> dict[str, Pieces]:
        """The weights outside of the blocks, by name."""
        ...

    def block(self, index: int) -> dict[str, Pieces]:
        """The weights of block `index`, by name."""
        ...


class WholeBlocks:
    """A `PieceSource` that cuts whole parts.

    Args:
      source: of the parts.
      devices: that share them.
    """

    def __init__(self, source: BlockSource, devices: int) -> None:
        self._source, self._devices = source, devices

    @property
    def config(self) -> DecoderConfig:
        return self._source.config

    def outer(self) -> dict[str, Pieces]:
        whole = self._source.outer()
        weights = {name: weight for name in OUTER_NAMES if (weight := getattr(whole, name)) is not None}
        return {
            name: pieces_of(name, weight, outer_split(name, weight, self._devices), self._devices)
            for name, weight in weights.items()
        }

    def block(self, index: int) -> dict[str, Pieces]:
        block = self._source.block(index)
        splits = block_splits(self.config, block.kind, self._devices)
        return {n: pieces_of(f"layers.{index}.{n}", w, splits[n], self._devices) for n, w in block.items()}


def place_pieces(source: PieceSource, mesh: Mesh, axis: str) -> ShardedDecoder:
    """Puts a model's pieces on their devices, block by block.

    Raises:
      ModelError: as `shard`.
    """
    config = source.config
    small = local_config(config, device_count(mesh, axis))  # first: it refuses what cannot be shared
    group_sizes: dict[str, int] = {}

    def placed(prefix: str, part: dict[str, Pieces]) -> dict[str, Weight]:
        group_sizes.update({prefix + name: p.group_size for name, p in part.items() if p.group_size is not None})
        return {name: spread_pieces(pieces.by_place, mesh, axis) for name, pieces in part.items()}

    blocks: list[Block] = []

    def visit(index: int, part: Any) -> None:
        blocks.append(Block(placed(f"layers.{index}.", part), config.kind(index)))

    sweep.forward(cast(Any, source), visit, read_ahead=False)  # a block's pieces in place of a block
    pieces = Decoder(Outer(**placed("", source.outer())), tuple(blocks), small)
    return ShardedDecoder(pieces, tuple(sorted(group_sizes.items())), config, mesh, axis)


def outer_split(name: str, weight: Weight, devices: int) -> Split | None:
    """How devices share a weight outside of the blocks; None for a weight that every device has whole."""
    return vocabulary_split(weight.shape[0], devices, row_unit(weight)) if name in VOCABULARY else None


def pieces_of(path: str, weight: Weight, split: Split | None, devices: int) -> Pieces:
    """The piece of each place along the axis, with equally long outlier lists, as NumPy arrays.

    Raises:
      SpQRError: the weight cannot be cut so; names it.
    """
    group_size = weight.group_size if is_quantized(weight) else None
    if split is None:
        return Pieces(dict.fromkeys(range(devices), jax.tree.map(np.asarray, weight)), group_size)
    try:
        pieces: Sequence[Weight] = [cut(weight, split, device) for device in range(devices)]
    except SpQRError as error:
        raise SpQRError(f"{devices} devices cannot share {path}: {error}") from None
    if is_quantized(weight):
        pieces = with_equal_lists(pieces, max(piece.nnz for piece in pieces))
    return Pieces(dict(enumerate(pieces)), group_size)


class ShardedSource:
    """A `BlockSource` that puts the pieces together again, block by block, as NumPy arrays.

    With several processes, each of them must read every part, in one order: all exchange their pieces.
    """

    def __init__(self, params: ShardedDecoder) -> None:
        self._params, self._group_sizes = params, dict(params.group_sizes)

    @property
    def config(self) -> DecoderConfig:
        return self._params.config

    def identity(self) -> str:
        """As `BlockSource` has it, of the whole weights."""
        digest = hashlib.sha256(TreeSource(Decoder(self.outer(), (), self.config)).identity().encode())

        def add(index: int, block: Block) -> None:
            alone = Decoder(Outer(None, None), (block,), self.config)
            digest.update(TreeSource(alone).identity().encode())

        sweep.forward(self, add, read_ahead=False)  # a read may be an exchange of pieces
        return digest.hexdigest()

    def outer(self) -> Outer:
        shapes = outer_shapes(self.config)
        weights = {name: getattr(self._params.pieces.outer, name) for name in shapes}
        devices = self._params.devices
        return Outer(
            **{
                name: self._whole(name, weight, _table_split(name, weight, devices), shapes[name])
                for name, weight in weights.items()
            }
        )

    def block(self, index: int) -> Block:
        kind: BlockKind = self.config.kind(index)
        shapes, splits = block_shapes(self.config, kind), block_splits(self.config, kind, self._params.devices)
        block = self._params.pieces.layers[index]
        return Block(
            {name: self._whole(f"layers.{index}.{name}", w, splits[name], shapes[name]) for name, w in block.items()},
            kind,
        )

    def _whole(self, path: str, weight: Weight, split: Split | None, shape: tuple[int, ...]) -> Weight:
        gathered = jax.tree.map(self._gathered, weight)
        pieces = [jax.tree.map(lambda leaf, d=d: leaf[d], gathered) for d in range(self._params.devices)]
        return pieces[0] if split is None else join(pieces, split, shape, self._group_sizes.get(path))

    def _gathered(self, leaf: jax.Array) -> np.ndarray:
        if leaf.is_fully_addressable:
            return np.asarray(leaf)
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))


def _table_split(name: str, piece: Weight, devices: int) -> Split | None:
    """How a weight outside of the blocks was cut, from its pieces."""
    if name not in VOCABULARY:
        return None
    size = piece.shape[0] if is_quantized(piece) else piece.shape[1]
    return Split(0, size, tuple(size * device for device in range(devices)))
