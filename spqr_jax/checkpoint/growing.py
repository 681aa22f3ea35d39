"""The parts of a checkpoint in a folder: written one by one, read back, and kept when a run goes on."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from spqr_jax._compat import orbax_v1
from spqr_jax.checkpoint.description import FORMAT, FORMAT_VERSION, META_FIELDS, fingerprint, leaves_of, orbax_context
from spqr_jax.checkpoint.reading import block_part, read_block, read_header, read_outer
from spqr_jax.config import SpQRConfig
from spqr_jax.errors import CheckpointError
from spqr_jax.files.entries import Entries
from spqr_jax.models.config import DecoderConfig
from spqr_jax.models.decoder import Block, Outer
from spqr_jax.models.weights import OUTER_NAMES
from spqr_jax.output.flush import flush_folder, flush_tree
from spqr_jax.quantized import is_quantized

OUTER = "model"
"""The part with the embedding, the final norm and the output head; also its key among digests."""


class CheckpointFolder:
    """A `BlockSink` and `BlockSource` of the same parts, which lie in a folder as a checkpoint has them.

    Args:
      path: the folder, made if it is not there.
      config: of the model.
      quantization: how it was quantized, or None for a dense model.
      provenance: anything JSON that tells where the model comes from.
      durable: each part is on the disk when its `put` returns.

    Attributes:
      config: of the model.
      layer_stats: path -> what quantizing the weight did, for the weights recorded.

    Raises:
      CheckpointError: the folder cannot be made.
    """

    def __init__(
        self,
        path: Path,
        config: DecoderConfig,
        quantization: SpQRConfig | None = None,
        *,
        provenance: dict[str, Any] | None = None,
        durable: bool = True,
    ) -> None:
        self.config, self.layer_stats = config, dict[str, dict[str, float]]()
        self._path, self._quantization, self._durable = path.absolute(), quantization, durable
        self._provenance = provenance if provenance is not None else {}
        self._digests: dict[str, str] = {}
        if not path.is_dir():
            path.mkdir()
            flush_folder(path.parent)

    def record(self, path: str, stats: dict[str, float]) -> None:
        """Keeps what quantizing the weight at `path` did; call before its block is put."""
        self.layer_stats[path] = stats

    def describe(self, quantization: SpQRConfig) -> None:
        """Keeps how the model was quantized, where that is known only now; call before the outer weights are put."""
        self._quantization = quantization

    def put_block(self, index: int, block: Block) -> None:
        weights = dict(block)
        stats = {n: s for n in weights if (s := self.layer_stats.get(f"layers.{index}.{n}")) is not None}
        self._write(str(index), weights, {"index": index, "layer_stats": stats})

    def put_outer(self, outer: Outer) -> None:
        weights = {name: getattr(outer, name) for name in OUTER_NAMES if getattr(outer, name) is not None}
        header = {
            "model": self.config.to_json(),
            "quantization": None if self._quantization is None else self._quantization.to_json(),
            "layer_stats": {n: s for n in weights if (s := self.layer_stats.get(n)) is not None},
            "provenance": self._provenance,
        }
        self._write(OUTER, weights, header)

    def block(self, index: int) -> Block:
        """A block that was put or adopted, verified.

        Raises:
          CheckpointError: it is not there or damaged.
        """
        return read_block(self._path, index, self.config)

    def outer(self) -> Outer:
        """The outer weights that were put or adopted, verified.

        Raises:
          CheckpointError: they are not there or damaged.
        """
        return read_outer(self._path, self.config)

    def identity(self) -> str:
        """SHA-256 of the parts: of all that is said of them, which has the SHA-256 of each array."""
        return hashlib.sha256(json.dumps(self._digests, sort_keys=True).encode()).hexdigest()

    def digest(self, part: int | str) -> str:
        """SHA-256 of all that is said of a part, which has the SHA-256 of each of its arrays; for `adopt`.

        Args:
          part: index of a block, or "model" for the outer weights.
        """
        return self._digests[str(part)]

    def digests(self) -> dict[str, str]:
        """Digests of all parts that were put or adopted: index of a block, or "model" -> SHA-256."""
        return dict(self._digests)

    def missing(self) -> list[str]:
        """Parts that were neither put nor adopted."""
        parts = [*map(str, range(self.config.num_layers)), OUTER]
        return [part for part in parts if part not in self._digests]

    def adopt(self, digests: Mapping[Any, str]) -> None:
        """Takes over parts that an earlier process wrote, and removes everything else in the folder.

        Args:
          digests: index of a block, as a number or a text, or "model" -> SHA-256, as `digest` gave it.

        Raises:
          CheckpointError: a part is missing, damaged or another one.
        """
        kept = {_place(str(part)) for part in digests}
        for path in sorted(self._path.iterdir()):
            for entry in sorted(path.iterdir()) if path.name == "layers" and path.is_dir() else [path]:
                if entry.relative_to(self._path) not in kept:
                    shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        for part, digest in digests.items():
            try:
                header = read_header(self._path / _place(str(part)))
                if digest_of(header.to_dict()) != digest:
                    raise CheckpointError("it is not the one that the run wrote")
                self.outer() if str(part) == OUTER else self.block(int(part))
            except CheckpointError as error:
                raise CheckpointError(
                    f"a finished part of the unfinished run, {_name(str(part))}, is damaged: {error}; begin again with "
                    "--restart (in Python, remove the folder)"
                ) from None
            self._digests[str(part)] = digest
            self._adopt_stats(str(part), header)

    def _adopt_stats(self, part: str, header: Entries) -> None:
        prefix = "" if part == OUTER else f"layers.{part}."
        for name, values in header.nested("layer_stats").to_dict().items():
            self.layer_stats[prefix + name] = values

    def _write(self, part: str, weights: dict[str, Any], header: dict[str, Any]) -> None:
        tree, specs = _describe(weights)
        config = {"format": FORMAT, "format_version": FORMAT_VERSION, **header, "weights": specs}
        place, ocp = _place(part), orbax_v1()
        if jax.process_count() > 1:  # Orbax takes an array of one process's device for an oversight
            tree = jax.tree.map(np.asarray, tree)
        with _without_patterns(self._path) as folder, orbax_context():
            ocp.save_checkpointables(folder / place, {"params": tree, "config": config})
        if self._durable:
            flush_tree(self._path / place)
            flush_folder((self._path / place).parent)
            flush_folder(self._path)
        self._digests[part] = digest_of(config)


def digest_of(header: dict[str, Any]) -> str:
    """SHA-256 of what is said of a part, however its JSON is laid out."""
    as_read = json.loads(json.dumps(header))
    return hashlib.sha256(json.dumps(as_read, sort_keys=True).encode()).hexdigest()


def _place(part: str) -> Path:
    return Path(OUTER) if part == OUTER else block_part(int(part))


def _name(part: str) -> str:
    return "the outer weights" if part == OUTER else f"block {part}"


@contextlib.contextmanager
def _without_patterns(folder: Path) -> Iterator[Path]:
    """The folder by a name that glob takes literally: Orbax looks for parts by patterns that begin with it."""
    if glob.escape(str(folder)) == str(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="spqr-") as place:
        link = Path(place) / "folder"
        link.symlink_to(folder, target_is_directory=True)
        yield link


def _describe(weights: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arrays of each weight, and what the checkpoint says of them."""
    tree, specs = {}, {}
    for name, weight in weights.items():
        leaves = leaves_of(weight)
        tree[name] = leaves
        specs[name] = {
            "kind": "spqr" if is_quantized(weight) else "dense",
            "shape": list(weight.shape),
            "leaves": {leaf: fingerprint(np.asarray(value)) for leaf, value in leaves.items()},
        }
        if is_quantized(weight):
            specs[name] |= {field: getattr(weight, field) for field in META_FIELDS}
    return tree, specs
