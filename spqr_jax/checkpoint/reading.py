"""Checkpoints verified as they are read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from spqr_jax._compat import orbax_v1
from spqr_jax.blocks import collect
from spqr_jax.checkpoint.description import FORMAT, FORMAT_VERSION, WeightSpec, fingerprint, orbax_context
from spqr_jax.config import SpQRConfig
from spqr_jax.errors import CheckpointError
from spqr_jax.files import Entries
from spqr_jax.files.entries import is_number
from spqr_jax.models.config import DecoderConfig
from spqr_jax.models.decoder import Block, Decoder, Outer
from spqr_jax.models.weights import block_shapes, outer_shapes
from spqr_jax.output import unfinished_note


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
            raise CheckpointError(f"{path} is not a checkpoint of {FORMAT} (no model/ and layers/ in it)")
        self._header = header = _read_header(self.path / "model")
        try:
            self._config = DecoderConfig.from_json(header["model"])
            quantization = header["quantization"]
            self.quantization = None if quantization is None else SpQRConfig.from_json(quantization)
            self.provenance: dict[str, Any] = header["provenance"] or {}
            self.layer_stats: dict[str, dict[str, float]] = dict(header["layer_stats"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:  # ValueError: SpQRError is one
            raise CheckpointError(f"{self.path / 'model'}: damaged configuration: {error}") from None
        _check_entries(header, self.path / "model")
        self._headers = [self._block_header(index) for index in range(self._config.num_layers)]
        for index, block_header in enumerate(self._headers):
            stats = block_header.get("layer_stats", {})
            self.layer_stats |= {f"layers.{index}.{name}": values for name, values in stats.items()}

    @property
    def config(self) -> DecoderConfig:
        return self._config

    def outer(self) -> Outer:
        return Outer(**self._read(self.path / "model", self._header, outer_shapes(self._config)))

    def block(self, index: int) -> Block:
        kind = self._config.kind(index)
        expected = block_shapes(self._config, kind)
        return Block(self._read(self._block_directory(index), self._headers[index], expected), kind)

    def _block_directory(self, index: int) -> Path:
        return self.path / "layers" / f"{index:05d}"

    def _block_header(self, index: int) -> dict[str, Any]:
        directory = self._block_directory(index)
        header = _read_header(directory)
        if header.get("index") != index:
            raise CheckpointError(f"{directory} says that it is block {header.get('index')}, expected {index}")
        _check_entries(header, directory)
        return header

    def _read(self, directory: Path, header: dict[str, Any], expected: dict[str, tuple[int, ...]]) -> dict[str, Any]:
        try:
            specs = {name: WeightSpec.from_json(spec) for name, spec in header["weights"].items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{directory}: damaged configuration: {error!r}") from None
        if {name: spec.shape for name, spec in specs.items()} != expected:
            raise CheckpointError(
                f"{directory}: holds weights { ({n: s.shape for n, s in specs.items()}) }, expected {expected}"
            )
        tree = _read_tree(directory, specs)
        weights = {}
        for name, spec in specs.items():
            for leaf, value in tree[name].items():
                if fingerprint(np.asarray(value)) != spec.leaves[leaf]:
                    raise CheckpointError(
                        f"{directory}: leaf {name}.{leaf} is not what was written (checksum differs): "
                        "the file is damaged or edited"
                    )
            weights[name] = spec.build(tree[name], f"{directory}: {name}")
        return {name: weights[name] for name in expected}


def _check_entries(header: dict[str, Any], directory: Path) -> None:
    """What is said of the model's origin and of each weight's quantization is in objects, and errors are numbers."""
    entries = Entries(header, str(directory), error=CheckpointError)
    entries.nested("provenance")
    stats = entries.nested("layer_stats")
    for path in stats:
        value = stats.nested(path).raw("output_error")
        if value is not None and not is_number(value):
            stats.nested(path).refuse("output_error", "a number")


def _read_header(directory: Path) -> dict[str, Any]:
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
            f"{directory} has format version {header.get('format_version')}, this program reads {FORMAT_VERSION}: "
            "use the version of spqr-jax that wrote it, or quantize the model again"
        )
    return header


def _read_tree(directory: Path, specs: dict[str, WeightSpec]) -> dict[str, dict[str, Any]]:
    """Reads the arrays; types and shapes are compared with the files' own first."""
    ocp = orbax_v1()
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    try:
        abstract = {
            name: {
                leaf: jax.ShapeDtypeStruct(tuple(entry["shape"]), np.dtype(entry["dtype"]), sharding=sharding)
                for leaf, entry in spec.leaves.items()
            }
            for name, spec in specs.items()
        }
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{directory}: damaged configuration: {error!r}") from None
    try:
        with orbax_context():
            stored = ocp.checkpointables_metadata(directory).metadata["params"]
    except Exception as error:
        raise CheckpointError(f"{directory}: the arrays' metadata cannot be read: {_first_line(error)}") from None
    _compare(directory, abstract, stored)
    try:
        with orbax_context():
            return ocp.load_checkpointables(directory, {"params": abstract})["params"]
    except Exception as error:
        bad = _unreadable_leaves(directory, abstract)
        raise CheckpointError(
            f"{directory}: {', '.join(bad) or 'the arrays'} cannot be read, the files are truncated or damaged: "
            f"{_first_line(error)}"
        ) from None


def _compare(directory: Path, abstract: dict[str, Any], stored: Any) -> None:
    def flat(tree: Any) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        paths = jax.tree_util.tree_flatten_with_path(tree)[0]
        return {
            ".".join(str(getattr(key, "key", key)) for key in path): (tuple(leaf.shape), np.dtype(leaf.dtype))
            for path, leaf in paths
        }

    expected, found = flat(abstract), flat(stored)
    problems = [f"leaf {name} is missing" for name in expected if name not in found]
    problems += [f"leaf {name} is unexpected" for name in found if name not in expected]
    problems += [
        f"leaf {name} is {found[name][1]} {found[name][0]}, expected {want[1]} {want[0]}"
        for name, want in expected.items()
        if name in found and found[name] != want
    ]
    if problems:
        raise CheckpointError(f"{directory} is truncated, damaged or edited: " + "; ".join(problems))


def _unreadable_leaves(directory: Path, abstract: dict[str, dict[str, Any]]) -> list[str]:
    """Reads the leaves one by one to tell which are damaged."""
    ocp = orbax_v1()
    bad = []
    for name, leaves in abstract.items():
        for leaf in leaves:
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


def load(path: Path | str) -> Decoder:
    """Reads a checkpoint into memory; errors as :class:`CheckpointSource`.

    Needs neither the original model nor a network.
    """
    return collect(CheckpointSource(path))
