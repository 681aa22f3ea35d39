"""Blocks on a mesh: each device holds a part of a matrix's rows, and is sent the others while a program reads them."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

import spqr_jax.devices as devices
from spqr_jax.layout import round_up
from spqr_jax.models.config import BlockKind, DecoderConfig
from spqr_jax.models.decoder import Block, matrix_names
from spqr_jax.stream.stages import stage_groups


class BlockLayout(NamedTuple):
    """How a block lies on a mesh; static in programs.

    Attributes:
      names: of its weights, in order.
      kind: of the block.
      rows: of each matrix that is spread, by name. The other weights are whole on every device: vectors, and the small
        matrix that routes tokens to experts.
    """

    names: tuple[str, ...]
    kind: BlockKind
    rows: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, config: DecoderConfig, block: Block) -> BlockLayout:
        spread = [name for name in matrix_names(config, block.kind) if isinstance(block[name], jax.Array | np.ndarray)]
        return cls(tuple(block), block.kind, tuple((name, block[name].shape[0]) for name in spread))

    def specs(self, mesh: Mesh) -> Block:
        """How `shard_map` cuts the block."""
        spread = dict(self.rows)
        cut = devices.cut_along(mesh)
        return Block({name: cut if name in spread else devices.EVERYWHERE for name in self.names}, self.kind)

    def gathered(self, mesh: Mesh, config: DecoderConfig, stage: int, block: Block) -> Block:
        """Inside a program of a mesh: the block with the matrices that a stage multiplies by whole on every device."""
        read = {name for names, _ in stage_groups(config, self.kind, stage) for name in names}

        def whole(name: str, rows: int) -> jax.Array:
            part: jax.Array = block[name]
            if name not in read:
                return jnp.zeros((rows, part.shape[1]), part.dtype)  # of which only the shape is read
            return lax.all_gather(part, mesh.axis_names, axis=0, tiled=True)[:rows]

        return block.replace({name: whole(name, rows) for name, rows in self.rows})

    def shapes(self, block: Block) -> Block:
        """Inside a program of a mesh: the block for reading the inputs of its matrices, not the matrices."""
        zeros = {name: jnp.zeros((rows, block[name].shape[1]), block[name].dtype) for name, rows in self.rows}
        return block.replace(zeros)


class MeshBlocks:
    """Blocks on the devices of a mesh. Of a block that differs in a few weights from the last one, only these are sent.

    Args:
      mesh: of the devices.
      config: of the model.
    """

    def __init__(self, mesh: Mesh, config: DecoderConfig) -> None:
        self._mesh, self._config = mesh, config
        self._last: dict[int, tuple[Any, jax.Array]] = {}

    def put(self, block: Block) -> tuple[Block, BlockLayout]:
        """The block's weights on the devices, rows of matrices padded to be shared evenly."""
        layout, last, placed = BlockLayout.of(self._config, block), {}, {}
        spread = {name for name, _ in layout.rows}
        for name, weight in block.items():
            held = self._last.get(id(weight))
            last[id(weight)] = (weight, self._put(weight, name in spread)) if held is None else held
            placed[name] = last[id(weight)][1]
        self._last = last
        return Block(placed, block.kind), layout

    def _put(self, weight: Any, is_spread: bool) -> Any:
        if not is_spread:
            return devices.put_everywhere(self._mesh, weight)
        return devices.cut(self._mesh, weight, length=round_up(weight.shape[0], devices.size(self._mesh)))
