"""Models one block at a time: where blocks come from and where finished ones go.

A job knows only these two protocols. A tree in memory, a
file read lazily and a checkpoint written as it goes are all sources and sinks.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from spqr_jax.config import SpQRConfig
from spqr_jax.errors import ModelError
from spqr_jax.models.config import DecoderConfig
from spqr_jax.models.decoder import Block, Decoder, Outer, Weight
from spqr_jax.quantized import is_quantized

_Part = TypeVar("_Part", Outer, Block)


class BlockSource(Protocol):
    """Gives a model's parts; a block may be read anew at each call."""

    @property
    def config(self) -> DecoderConfig: ...

    def outer(self) -> Outer:
        """Embedding, final norm and head."""
        ...

    def block(self, index: int) -> Block:
        """Block `index`, 0 <= index < config.num_layers."""
        ...


class ModelSource(BlockSource, Protocol):
    """A source that can tell whether another one gives the same model."""

    def identity(self) -> str:
        """SHA-256 of all that the parts depend on, in hexadecimal: two sources with the same one give the same parts.

        It reads the whole model.
        """
        ...


class BlockSink(Protocol):
    """Takes a model's parts, each once, in any order."""

    def put_outer(self, outer: Outer) -> None: ...

    def put_block(self, index: int, block: Block) -> None: ...


class TreeSource:
    """A parameter tree in memory."""

    def __init__(self, params: Decoder) -> None:
        self._params = params

    @property
    def config(self) -> DecoderConfig:
        return self._params.config

    def identity(self) -> str:
        """SHA-256 of the leaves, with their places, types and shapes, and of the model's configuration."""
        digest = hashlib.sha256(json.dumps(self.config.to_json(), sort_keys=True).encode())
        for path, leaf in jax.tree_util.tree_flatten_with_path(self._params)[0]:
            values = np.ascontiguousarray(leaf)
            digest.update(f"{jax.tree_util.keystr(path)} {values.dtype} {values.shape} ".encode())
            digest.update(values.reshape(-1).view(np.uint8).data)
        return digest.hexdigest()

    def outer(self) -> Outer:
        return self._params.outer

    def block(self, index: int) -> Block:
        return self._params.layers[index]


class HostSource:
    """Another source whose parts are in host memory: NumPy arrays, which no accelerator ever holds whole.

    For meshes: each device is given its part of a block, as `MeshActivations` does.
    """

    def __init__(self, source: BlockSource) -> None:
        self._source = source

    @property
    def config(self) -> DecoderConfig:
        return self._source.config

    def outer(self) -> Outer:
        return self._read(self._source.outer)

    def block(self, index: int) -> Block:
        return self._read(lambda: self._source.block(index))

    @staticmethod
    def _read(read: Callable[[], _Part]) -> _Part:
        with jax.default_device(_host_device()):
            part: _Part = jax.device_get(read())
        return part


def _host_device() -> jax.Device | None:
    """The CPU of this process as a device of JAX; None where the user has switched it off."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


def as_source(model: Decoder | BlockSource) -> BlockSource:
    """The model as a source of blocks."""
    return TreeSource(model) if isinstance(model, Decoder) else model


class TreeSink:
    """Collects a parameter tree in memory; NumPy's arrays are put on JAX's default device."""

    def __init__(self, config: DecoderConfig) -> None:
        self._config = config
        self._outer: Outer | None = None
        self._blocks: dict[int, Block] = {}

    def put_outer(self, outer: Outer) -> None:
        self._outer = _on_device(outer)

    def put_block(self, index: int, block: Block) -> None:
        self._blocks[index] = _on_device(block)

    def record(self, path: str, stats: dict[str, float]) -> None:
        """A tree keeps no statistics."""

    def describe(self, quantization: SpQRConfig) -> None:
        """A tree keeps no configuration."""

    def params(self) -> Decoder:
        """The finished tree.

        Raises:
          ModelError: parts are missing.
        """
        missing = [i for i in range(self._config.num_layers) if i not in self._blocks]
        if missing or self._outer is None:
            raise ModelError(
                f"the model is incomplete: missing blocks {missing}; outer weights present: {self._outer is not None}"
            )
        blocks = [self._blocks[i] for i in range(self._config.num_layers)]
        return Decoder(self._outer, tuple(with_equal_capacities(blocks)), self._config)


def _on_device(part: _Part) -> _Part:
    """A part whose NumPy arrays are on JAX's default device."""
    placed: _Part = jax.tree.map(lambda leaf: jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf, part)
    return placed


def role(name: str) -> str:
    """A weight's name within its block; the same for all experts of the block."""
    return re.sub(r"^experts\.\d+\.", "experts.", name)


def with_equal_capacities(blocks: Sequence[Block]) -> list[Block]:
    """The blocks with outlier lists that are as long for one weight of all blocks, and for all experts of a kind.

    Blocks of one kind and format then have one structure: they stack, and share compiled programs.
    """
    longest: dict[str, int] = {}
    for block in blocks:
        for name, weight in block.items():
            if is_quantized(weight):
                longest[role(name)] = max(longest.get(role(name), 1), weight.outlier_cols.shape[0])

    def equal(name: str, weight: Weight) -> Weight:
        return weight.with_capacity(longest[role(name)]) if is_quantized(weight) else weight

    return [block.replace({name: equal(name, weight) for name, weight in block.items()}) for block in blocks]


def collect(source: BlockSource) -> Decoder:
    """Reads a whole model into memory."""
    from spqr_jax.stream import sweep  # which imports this module

    sink = TreeSink(source.config)
    sink.put_outer(source.outer())
    sweep.forward(source, sink.put_block, read_ahead=False)  # nothing to do meanwhile
    return sink.params()
