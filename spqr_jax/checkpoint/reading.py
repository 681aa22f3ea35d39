"""Checkpoints verified as they are read."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from spqr_jax._compat import orbax_v1
from spqr_jax.checkpoint.description import FORMAT, FORMAT_VERSION, WeightSpec, fingerprint, orbax_context
from spqr_jax.checkpoint.stored import ArrayFile, damage
from spqr_jax.config import SpQRConfig
from spqr_jax.errors import CheckpointError, SpQRError
from spqr_jax.files.entries import Entries, is_number, plain, shown
from spqr_jax.layout import entry_capacity
from spqr_jax.models.config import DecoderConfig
from spqr_jax.models.decoder import Block, Outer
from spqr_jax.models.dense import PIECE_WEIGHTS
from spqr_jax.models.stops import with_named_tokens
from spqr_jax.models.weights import block_shapes, outer_shapes
from spqr_jax.output import unfinished_note
from spqr_jax.quantized import is_quantized
from spqr_jax.stream.blocks import role
from spqr_jax.stream.outer import OuterMemory

_MOST_COMPRESSED, _SMALL_ANYWAY = 100, 64 << 20
"""Times that arrays are larger in memory than in files; bytes below which that does not matter."""

_READ_AT_ONCE = 16 << 20
"""Bytes of an array that Orbax reads. Larger ones are read in bands, which takes less memory."""

_HELD_BYTES = 64 << 20
"""Bytes of a matrix that no reader leaves on disk."""

_SHOWN = 10  # problems in one message


def is_checkpoint(path: Path) -> bool:
    """Whether `path` looks like a directory of ours."""
    return (path / "model").is_dir() and (path / "layers").is_dir()


class CheckpointSource:
    """A `BlockSource` over a checkpoint; every part is verified as it is read.

    Attributes:
      path: the directory.
      quantization: how the model was quantized, or None.
      provenance: what the writer told of the model's origin.
      layer_stats: path -> what quantizing it did, for every weight recorded.

    Raises:
      CheckpointError: not a checkpoint, of another version, incomplete, truncated
        or edited; names the leaf where one is at fault.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).absolute()  # Orbax takes no other
        if not os.path.lexists(self.path):
            raise CheckpointError(f"{path} does not exist{unfinished_note(self.path)}")
        if not is_checkpoint(self.path):
            raise CheckpointError(
                f"{path} is not a checkpoint directory of {FORMAT}, which has both model/ and layers/"
            )
        self._header = header = read_header(self.path / "model")
        quantization = header.raw("quantization")
        label = header.label
        try:
            self._config = DecoderConfig.from_json(header.nested("model").to_dict(), f"{label}: model")
            self.quantization = (
                None if quantization is None else SpQRConfig.from_json(quantization, f"{label}: quantization")
            )
        except CheckpointError:
            raise
        except SpQRError as error:
            raise CheckpointError(f"{error}: the configuration is damaged") from None
        self._config = with_named_tokens(self._config, self.path)  # which an older checkpoint may not know
        self.provenance: dict[str, Any] = header.nested("provenance").to_dict()
        self.layer_stats = _layer_stats(header, "")
        self._headers = [_block_header(self.path, index) for index in range(self._config.num_layers)]
        for index, block_header in enumerate(self._headers):
            self.layer_stats |= _layer_stats(block_header, f"layers.{index}.")

    @property
    def config(self) -> DecoderConfig:
        return self._config

    def outer(self) -> Outer:
        return Outer(**read_weights(self.path / "model", self._header, outer_shapes(self._config)))

    def lean_outer(self) -> Outer:
        """As `outer`, with a `StoredMatrix` in place of each large dense matrix."""
        files, expected = self._matrices_on_disk(), outer_shapes(self._config)
        return Outer(**read_weights(self.path / "model", self._header, expected, files))

    def outer_memory(self) -> OuterMemory:
        """What `lean_outer` takes; it reads no weights."""
        files, (_, specs), head = self._matrices_on_disk(), self.part(None), self._config.head_path
        held = sum(spec.nbytes for name, spec in specs.items() if name not in files)
        reading = max((file.bytes_at_once for file in files.values()), default=0)
        rows, width = specs[head].shape
        packed_rows = PIECE_WEIGHTS // width if specs[head].meta is not None else rows
        return OuterMemory(held, reading, files[head].band if head in files else min(packed_rows, rows))

    def _matrices_on_disk(self) -> dict[str, ArrayFile]:
        """Large dense matrices; no output head of a single chunk, whose pieces cannot be read alone."""
        directory, specs = self.part(None)
        files = {
            name: ArrayFile(directory, f"{name}.values", spec.leaves["values"])
            for name in ("embed_tokens", "lm_head")
            if (spec := specs.get(name)) is not None and spec.meta is None and spec.nbytes > _HELD_BYTES
        }
        return {name: file for name, file in files.items() if name != self._config.head_path or file.is_cut}

    def block(self, index: int) -> Block:
        """A block. Outlier lists are as long as in the block with the most, so that blocks share compiled programs."""
        block, rooms = _block(self.path, index, self._headers[index], self._config), self._rooms
        wider = {n: w.with_capacity(rooms[role(n)]) for n, w in block.items() if is_quantized(w) and role(n) in rooms}
        return block.replace(wider)

    @functools.cached_property
    def _rooms(self) -> dict[str, int]:
        """Entries of the longest outlier list of each role, over all blocks."""
        rooms: dict[str, int] = {}
        for index in range(self._config.num_layers):
            for name, spec in self.part(index)[1].items():
                # A count that cannot be right is refused when its own block is read.
                if spec.meta is not None and spec.meta["nnz"] <= math.prod(spec.shape):
                    rooms[role(name)] = max(rooms.get(role(name), 1), entry_capacity(spec.meta["nnz"]))
        return rooms

    def part(self, index: int | None) -> tuple[Path, dict[str, WeightSpec]]:
        """The directory of a block, or of the outer weights for None, and what it says of its weights."""
        if index is None:
            directory, header, expected = self.path / "model", self._header, outer_shapes(self._config)
        else:
            directory, header = self.path / block_part(index), self._headers[index]
            expected = block_shapes(self._config, self._config.kind(index))
        return directory, weight_specs(directory, header, expected)

    def identity(self) -> str:
        """SHA-256 of what the checkpoint says of its parts, which has the SHA-256 of each array."""
        headers = [header.to_dict() for header in (self._header, *self._headers)]
        return hashlib.sha256(json.dumps(headers, sort_keys=True).encode()).hexdigest()


def block_part(index: int) -> Path:
    """The directory of a block inside a checkpoint."""
    return Path("layers") / f"{index:05d}"


def read_outer(folder: Path, config: DecoderConfig) -> Outer:
    """The outer weights in a checkpoint, which may lack blocks.

    Raises:
      CheckpointError: as `CheckpointSource`.
    """
    return Outer(**read_weights(folder / "model", read_header(folder / "model"), outer_shapes(config)))


def read_block(folder: Path, index: int, config: DecoderConfig) -> Block:
    """One block of a checkpoint, which may lack others.

    Raises:
      CheckpointError: as `CheckpointSource`.
    """
    return _block(folder, index, _block_header(folder, index), config)


def _block(folder: Path, index: int, header: Entries, config: DecoderConfig) -> Block:
    kind = config.kind(index)
    return Block(read_weights(folder / block_part(index), header, block_shapes(config, kind)), kind)


def _block_header(folder: Path, index: int) -> Entries:
    directory = folder / block_part(index)
    header = read_header(directory)
    if header.integer("index") != index:
        raise CheckpointError(f"{directory} says that it is block {header.integer('index')}, expected {index}")
    return header


def weight_specs(directory: Path, header: Entries, expected: dict[str, tuple[int, ...]]) -> dict[str, WeightSpec]:
    """What a part says of its weights, which are those that the model has."""
    described = header.nested("weights")
    for name in {**expected, **described.to_dict()}:
        if name not in described:
            raise described.lacks(name, f"a weight of shape {expected[name]}")
        shape = described.nested(name).integers("shape")
        if tuple(shape) != expected.get(name):
            wanted = f"expected {list(expected[name])}" if name in expected else "but the model has no such weight"
            raise CheckpointError(f"{directory}: weight {shown(name)} has shape {shown(shape)}, {wanted}")
    return {name: WeightSpec.from_json(described.nested(name)) for name in described}


def read_weights(
    directory: Path,
    header: Entries,
    expected: dict[str, tuple[int, ...]],
    on_disk: Mapping[str, ArrayFile] = MappingProxyType({}),
) -> dict[str, Any]:
    """The weights of a part, verified. Those of `on_disk` are verified when they are read."""
    specs = weight_specs(directory, header, expected)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    held = [(name, leaf) for name, spec in specs.items() if name not in on_disk for leaf in spec.leaves]
    small = [(name, leaf) for name, leaf in held if specs[name].leaves[leaf].nbytes <= _READ_AT_ONCE]
    tree = read_leaves(directory, specs, dict.fromkeys(small, here))
    for name, leaf in small:
        if damaged(specs[name], leaf, tree[name][leaf]):
            raise damage(directory, f"{name}.{leaf}")
    for name, leaf in [place for place in held if place not in small]:
        file = ArrayFile(directory, f"{name}.{leaf}", specs[name].leaves[leaf])
        tree[name][leaf] = jax.device_put(file.read(), here)
    weights = {name: specs[name].build(tree[name], f"{directory}: {name}") for name in specs if name not in on_disk}
    return {name: on_disk[name] if name in on_disk else weights[name] for name in expected}


def damaged(spec: WeightSpec, leaf: str, value: Any) -> bool:
    """Whether an array of a weight is another one than was written."""
    return bool(fingerprint(np.asarray(value))["sha256"] != spec.leaves[leaf].sha256)


def _layer_stats(header: Entries, prefix: str) -> dict[str, dict[str, float]]:
    """What quantizing each weight did, by its path."""
    stats = header.nested("layer_stats")
    for name in stats:
        values = stats.nested(name)
        for key in values:
            if not is_number(values.raw(key)):  # not a number (nan) is one: an error that was not measured
                values.refuse(key, "a number")
    return {prefix + name: stats.nested(name).to_dict() for name in stats}


def read_header(directory: Path) -> Entries:
    """What a checkpoint says of one of its parts.

    Raises:
      CheckpointError: it is missing, damaged or of another version.
    """
    ocp = orbax_v1()
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is missing: the checkpoint is incomplete")
    try:
        with orbax_context():
            header = ocp.load_checkpointables(directory, {"config": None})["config"]
    except Exception as error:  # Orbax and the file system raise many kinds
        raise CheckpointError(f"{directory}: the configuration cannot be read: {_first_line(error)}") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise CheckpointError(f"{directory} is not a checkpoint of {FORMAT}")
    if header.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{directory} has format version {shown(header.get('format_version'))}, but this program reads "
            f"version {FORMAT_VERSION}: use the version of spqr-jax that wrote it, or quantize the model again"
        )
    return Entries(header, str(directory), error=CheckpointError)


def read_leaves(
    directory: Path, specs: dict[str, WeightSpec], shardings: Mapping[tuple[str, str], Any]
) -> dict[str, dict[str, jax.Array]]:
    """Reads arrays of a part; types and shapes of all are compared with the files' own first.

    Args:
      directory: of the part.
      specs: what it says of its weights.
      shardings: (weight, leaf) -> where the array is put. Of an array on devices of several processes each process
        reads the slices of its own devices. Arrays that are not named are not read.

    Raises:
      CheckpointError: arrays are missing, truncated or of another shape or type.
    """
    ocp = orbax_v1()
    _refuse_bombs(directory, sum(spec.nbytes for spec in specs.values()))
    abstract = {
        name: {
            leaf: jax.ShapeDtypeStruct(entry.shape, entry.dtype, sharding=shardings.get((name, leaf)))
            for leaf, entry in spec.leaves.items()
        }
        for name, spec in specs.items()
    }
    asked = {
        name: {leaf: struct if (name, leaf) in shardings else ocp.PLACEHOLDER for leaf, struct in leaves.items()}
        for name, leaves in abstract.items()
    }
    try:
        with orbax_context():
            stored = _flat(ocp.checkpointables_metadata(directory).metadata["params"])
    except Exception as error:
        raise CheckpointError(f"{directory}: the arrays' metadata cannot be read: {_first_line(error)}") from None
    _compare(directory, _flat(abstract), stored)
    try:
        with orbax_context():
            read = ocp.load_checkpointables(directory, {"params": asked})["params"]
    except Exception as error:
        bad = _unreadable_leaves(directory, asked)
        raise CheckpointError(
            f"{directory}: {', '.join(bad[:_SHOWN]) or 'the arrays'} cannot be read; the files are truncated or "
            f"damaged: {_first_line(error)}"
        ) from None
    return {
        name: {leaf: value for leaf, value in leaves.items() if (name, leaf) in shardings}
        for name, leaves in read.items()
    }


def _refuse_bombs(directory: Path, claimed: int) -> None:
    """Refuses arrays far larger than their files: compression makes quantized arrays hardly smaller."""
    stored = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    if claimed > _SMALL_ANYWAY and claimed > _MOST_COMPRESSED * stored:
        raise CheckpointError(
            f"{directory} describes arrays of {claimed} bytes, but its files have only {stored} bytes: "
            "they are truncated or were edited"
        )


_Leaves = dict[str, tuple[tuple[int, ...], np.dtype]]


def _flat(tree: Any) -> _Leaves:
    """Shape and dtype of each leaf, by ``weight.leaf``."""
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        ".".join(str(getattr(key, "key", key)) for key in path): (tuple(leaf.shape), np.dtype(leaf.dtype))
        for path, leaf in paths
    }


def _compare(directory: Path, expected: _Leaves, found: _Leaves) -> None:
    problems = [f"leaf {name} is missing" for name in expected if name not in found]
    problems += [f"leaf {plain(name)} is unexpected" for name in found if name not in expected]
    problems += [
        f"leaf {name} is {found[name][1]} {found[name][0]}, expected {want[1]} {want[0]}"
        for name, want in expected.items()
        if name in found and found[name] != want
    ]
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise CheckpointError(f"{directory} is truncated, damaged or edited: {'; '.join(problems[:_SHOWN])}{more}")


def _unreadable_leaves(directory: Path, abstract: dict[str, dict[str, Any]]) -> list[str]:
    """Reads the leaves one by one to tell which are damaged."""
    ocp = orbax_v1()
    bad = []
    for name, leaves in abstract.items():
        for leaf, struct in leaves.items():
            if struct is ocp.PLACEHOLDER:
                continue
            one = {
                other: {k: (v if (other, k) == (name, leaf) else ocp.PLACEHOLDER) for k, v in entries.items()}
                for other, entries in abstract.items()
            }
            try:
                with orbax_context():
                    ocp.load_checkpointables(directory, {"params": one})
            except Exception:
                bad.append(f"leaf {name}.{leaf}")
    return bad


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0][:300] if text else type(error).__name__
