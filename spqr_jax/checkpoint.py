"""Native checkpoints: Orbax directories, written block by block, verified on load.

    DIR/
      model/           Orbax: embedding, final norm, head; configuration
      layers/00000/    Orbax: one block
      ...
      tokenizer.json, tokenizer_config.json, ...

Each Orbax directory holds two checkpointables: `params`, a tree of arrays, and
`config`, a JSON object with the format version and, for each leaf, shape, dtype
and SHA-256. Orbax casts to the type that is asked for without a word, so types
and shapes are compared with what the files say before anything is read, and
checksums after. A checkpoint grows under a temporary name and is renamed when
it is whole. Nothing is pickled.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from spqr_jax._compat import orbax_v1
from spqr_jax.array import SpQRArray
from spqr_jax.blocks import BlockSource, TreeSource, collect
from spqr_jax.config import SpQRConfig
from spqr_jax.errors import CheckpointError, ModelError, SpQRError
from spqr_jax.models.config import DecoderConfig
from spqr_jax.models.decoder import Block, Decoder, Outer
from spqr_jax.models.names import BLOCK_NAMES, OUTER_NAMES, weight_shapes

FORMAT = "spqr-jax"
FORMAT_VERSION = 1

_DATA_FIELDS = (
    "codes", "scale_codes", "zero_codes", "tile_stats", "outlier_cols", "outlier_values", "outlier_row_ptr", "perm",
)  # fmt: skip
_META_FIELDS = ("bits", "group_size", "stats_group_size", "scale_bits", "zero_bits", "nnz")


# ---- writing ----------------------------------------------------------------------------


class CheckpointSink:
    """A `BlockSink` that writes a checkpoint as it goes.

    Use as a context manager: leaving it without an error finishes the checkpoint
    and gives it its name; leaving it with one, Ctrl-C included, removes every
    trace.

    Args:
      path: directory to make.
      config: of the model.
      quantization: how it was quantized, or None for a dense model.
      tokenizer: a transformers tokenizer to keep beside the weights, or None.
      provenance: anything JSON that tells where the model comes from.
      overwrite: replace an existing directory (once the new one is whole).

    Raises:
      CheckpointError: `path` exists and `overwrite` is not set.
    """

    def __init__(
        self,
        path: Path | str,
        config: DecoderConfig,
        quantization: SpQRConfig | None = None,
        *,
        tokenizer: Any = None,
        provenance: dict[str, Any] | None = None,
        overwrite: bool = False,
    ) -> None:
        self._path = Path(path).absolute()
        if self._path.exists() and not overwrite:
            raise CheckpointError(f"{path} exists already: choose another directory, or ask to overwrite it")
        self._config, self._quantization = config, quantization
        self._tokenizer, self._provenance = tokenizer, provenance or {}
        self._layer_stats: dict[str, dict[str, float]] = {}
        self._blocks: set[int] = set()
        self._has_outer = False
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._partial = Path(tempfile.mkdtemp(prefix=f".{self._path.name}.partial-", dir=self._path.parent))

    def __enter__(self) -> CheckpointSink:
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            shutil.rmtree(self._partial, ignore_errors=True)

    def record(self, path: str, stats: dict[str, float]) -> None:
        """Keeps what quantizing the weight at `path` did; call before its block is put."""
        self._layer_stats[path] = stats

    def put_block(self, index: int, block: Block) -> None:
        weights = {name: getattr(block, name) for name in BLOCK_NAMES}
        stats = {n: s for n in weights if (s := self._layer_stats.get(f"layers.{index}.{n}")) is not None}
        header = {"index": index, "layer_stats": stats}
        _write(self._partial / "layers" / f"{index:05d}", weights, header)
        self._blocks.add(index)

    def put_outer(self, outer: Outer) -> None:
        weights = {name: getattr(outer, name) for name in OUTER_NAMES if getattr(outer, name) is not None}
        header = {
            "model": self._config.to_json(),
            "quantization": None if self._quantization is None else self._quantization.to_json(),
            "layer_stats": {n: s for n in weights if (s := self._layer_stats.get(n)) is not None},
            "provenance": self._provenance,
        }
        _write(self._partial / "model", weights, header)
        self._has_outer = True

    def _finish(self) -> None:
        missing = sorted(set(range(self._config.num_layers)) - self._blocks)
        if missing or not self._has_outer:
            raise CheckpointError(f"the checkpoint is incomplete: blocks {missing} or the outer weights were never put")
        if self._tokenizer is not None:
            self._tokenizer.save_pretrained(self._partial)
        self._partial.chmod(0o755)  # mkdtemp's own is for this user alone
        if self._path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{self._path.name}.old-", dir=self._path.parent))
            os.replace(self._path, old / "old")
            os.replace(self._partial, self._path)
            shutil.rmtree(old)
        else:
            os.replace(self._partial, self._path)


def _write(directory: Path, weights: dict[str, Any], header: dict[str, Any]) -> None:
    ocp = orbax_v1()
    tree, specs = {}, {}
    for name, weight in weights.items():
        leaves = _leaves(weight)
        tree[name] = leaves
        specs[name] = {
            "kind": "spqr" if isinstance(weight, SpQRArray) else "dense",
            "shape": list(weight.shape),
            "leaves": {leaf: _fingerprint(np.asarray(value)) for leaf, value in leaves.items()},
        }
        if isinstance(weight, SpQRArray):
            specs[name] |= {field: getattr(weight, field) for field in _META_FIELDS}
    config = {"format": FORMAT, "format_version": FORMAT_VERSION, **header, "weights": specs}
    with _orbax_context():
        ocp.save_checkpointables(directory, {"params": tree, "config": config})


def _leaves(weight: Any) -> dict[str, Any]:
    if isinstance(weight, SpQRArray):
        return {field: leaf for field in _DATA_FIELDS if (leaf := getattr(weight, field)) is not None}
    return {"values": weight}


def _fingerprint(value: np.ndarray) -> dict[str, Any]:
    data = np.ascontiguousarray(value)
    return {
        "dtype": str(data.dtype),
        "shape": list(data.shape),
        "sha256": hashlib.sha256(data.view(np.uint8).data if data.ndim else data.tobytes()).hexdigest(),
    }


def _orbax_context() -> Any:
    """`config` is JSON text, not a tree of arrays."""
    ocp = orbax_v1()
    registry = ocp.handlers.local_registry()
    registry.add(ocp.handlers.JsonHandler, checkpointable_name="config")
    context = ocp.Context()
    context.checkpointables.registry = registry
    return context


def save(
    path: Path | str,
    params: Decoder,
    quantization: SpQRConfig | None = None,
    *,
    tokenizer: Any = None,
    provenance: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a model in memory; arguments and errors as :class:`CheckpointSink`."""
    source = TreeSource(params)
    with CheckpointSink(
        path, params.config, quantization, tokenizer=tokenizer, provenance=provenance, overwrite=overwrite
    ) as sink:
        for index in range(params.config.num_layers):
            sink.put_block(index, source.block(index))
        sink.put_outer(source.outer())


# ---- reading ----------------------------------------------------------------------------


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
        if not is_checkpoint(self.path):
            raise CheckpointError(f"{path} is not a checkpoint of {FORMAT} (no model/ and layers/ in it)")
        self._header = header = _read_header(self.path / "model")
        try:
            self._config = DecoderConfig.from_json(header["model"])
            quantization = header["quantization"]
            self.quantization = None if quantization is None else SpQRConfig.from_json(quantization)
            self.provenance: dict[str, Any] = header["provenance"]
            self.layer_stats: dict[str, dict[str, float]] = dict(header["layer_stats"])
        except (KeyError, TypeError, ModelError, SpQRError) as error:
            raise CheckpointError(f"{self.path / 'model'}: damaged configuration: {error}") from None
        self._headers = [self._block_header(index) for index in range(self._config.num_layers)]
        for index, block_header in enumerate(self._headers):
            stats = block_header.get("layer_stats", {})
            self.layer_stats |= {f"layers.{index}.{name}": values for name, values in stats.items()}

    @property
    def config(self) -> DecoderConfig:
        return self._config

    def outer(self) -> Outer:
        weights = self._read(self.path / "model", self._header, "")
        return Outer(**{name: weights.get(name) for name in OUTER_NAMES})

    def block(self, index: int) -> Block:
        weights = self._read(self._block_directory(index), self._headers[index], f"layers.{index}.")
        return Block(**weights)

    def _block_directory(self, index: int) -> Path:
        return self.path / "layers" / f"{index:05d}"

    def _block_header(self, index: int) -> dict[str, Any]:
        directory = self._block_directory(index)
        header = _read_header(directory)
        if header.get("index") != index:
            raise CheckpointError(f"{directory} says that it is block {header.get('index')}, expected {index}")
        return header

    def _read(self, directory: Path, header: dict[str, Any], prefix: str) -> dict[str, Any]:
        try:
            specs = {name: _WeightSpec.from_json(spec) for name, spec in header["weights"].items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{directory}: damaged configuration: {error!r}") from None
        expected = {
            path.removeprefix(prefix): shape
            for path, shape in weight_shapes(self._config).items()
            if path.rpartition(".")[0] == prefix.rstrip(".")
        }
        if {name: spec.shape for name, spec in specs.items()} != expected:
            raise CheckpointError(
                f"{directory}: holds weights { ({n: s.shape for n, s in specs.items()}) }, expected {expected}"
            )
        tree = _read_tree(directory, specs)
        weights = {}
        for name, spec in specs.items():
            for leaf, value in tree[name].items():
                if _fingerprint(np.asarray(value)) != spec.leaves[leaf]:
                    raise CheckpointError(
                        f"{directory}: leaf {name}.{leaf} is not what was written (checksum differs): "
                        "the file is damaged or edited"
                    )
            weights[name] = spec.build(tree[name], f"{directory}: {name}")
        return weights


@dataclasses.dataclass(frozen=True)
class _WeightSpec:
    """What the JSON says of one weight."""

    kind: str
    shape: tuple[int, ...]
    leaves: dict[str, dict[str, Any]]
    meta: dict[str, int]

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> _WeightSpec:
        if values["kind"] not in ("spqr", "dense"):
            raise TypeError(f"unknown kind of weight {values['kind']!r}")
        meta = {field: int(values[field]) for field in _META_FIELDS} if values["kind"] == "spqr" else {}
        return cls(values["kind"], tuple(values["shape"]), dict(values["leaves"]), meta)

    def build(self, leaves: dict[str, Any], label: str) -> Any:
        if self.kind == "dense":
            return leaves["values"]
        fields = {field: leaves.get(field) for field in _DATA_FIELDS}
        out, inner = self.shape
        try:
            return SpQRArray(**fields, shape=(out, inner), **self.meta).validate()  # type: ignore[arg-type]
        except SpQRError as error:
            raise CheckpointError(f"{label}: {error}") from None


def _read_header(directory: Path) -> dict[str, Any]:
    ocp = orbax_v1()
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is missing: the checkpoint is incomplete")
    try:
        with _orbax_context():
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


def _read_tree(directory: Path, specs: dict[str, _WeightSpec]) -> dict[str, dict[str, Any]]:
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
        with _orbax_context():
            stored = ocp.checkpointables_metadata(directory).metadata["params"]
    except Exception as error:
        raise CheckpointError(f"{directory}: the arrays' metadata cannot be read: {_first_line(error)}") from None
    _compare(directory, abstract, stored)
    try:
        with _orbax_context():
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
                with _orbax_context():
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
    source: BlockSource = CheckpointSource(path)
    return collect(source)
