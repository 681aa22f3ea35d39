"""What a checkpoint says of its weights in JSON, and how Orbax is asked to keep it."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from typing import Any

import numpy as np

from spqr_jax._compat import orbax_of_one_process, orbax_v1
from spqr_jax.array import SpQRArray
from spqr_jax.checkpoint.chunks import storage_options
from spqr_jax.errors import CheckpointError, SpQRError
from spqr_jax.files.entries import Entries
from spqr_jax.layout import entry_capacity, leaf_specs
from spqr_jax.quantized import is_quantized

FORMAT = "spqr-jax"
FORMAT_VERSION = 1

DATA_FIELDS = (
    "codes", "scale_codes", "zero_codes", "tile_stats", "outlier_cols", "outlier_values", "outlier_row_ptr", "perm",
)  # fmt: skip
META_FIELDS = ("bits", "group_size", "stats_group_size", "scale_bits", "zero_bits", "nnz")


def leaves_of(weight: Any) -> dict[str, Any]:
    """The arrays that a checkpoint stores of a weight, by name."""
    if is_quantized(weight):
        stored = weight.trimmed()
        return {field: leaf for field in DATA_FIELDS if (leaf := getattr(stored, field)) is not None}
    return {"values": weight}


def fingerprint(value: np.ndarray) -> dict[str, Any]:
    data = np.ascontiguousarray(value)
    return {
        "dtype": str(data.dtype),
        "shape": list(data.shape),
        "sha256": hashlib.sha256(data.view(np.uint8).data if data.ndim else data.tobytes()).hexdigest(),
    }


def orbax_context() -> Any:
    """`config` is JSON text, not a tree of arrays. Every process reads and writes for itself, without waiting."""
    ocp = orbax_v1()
    registry = ocp.handlers.local_registry()
    registry.add(ocp.handlers.JsonHandler, checkpointable_name="config")
    context = ocp.Context()
    context.checkpointables.registry = registry
    context.array.saving.scoped_storage_options_creator = storage_options
    # Otherwise Orbax' threads may write below a directory before the thread that makes it, which removes all of it.
    context.async_options.create_directories_asynchronously = False
    return orbax_of_one_process(context)


_DTYPES = ("float32", "float16", "bfloat16", "uint16", "int32")
"""Of leaves: those of `leaf_specs`, and of dense weights."""


@dataclasses.dataclass(frozen=True)
class LeafSpec:
    """What the JSON says of one array of a weight."""

    shape: tuple[int, ...]
    dtype: np.dtype
    sha256: str

    @property
    def nbytes(self) -> int:
        """Bytes that the array takes in memory."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class WeightSpec:
    """What the JSON says of one weight."""

    shape: tuple[int, ...]
    leaves: dict[str, LeafSpec]
    meta: dict[str, int] | None
    """Of a quantized weight; None for a dense one."""

    @classmethod
    def from_json(cls, entries: Entries) -> WeightSpec:
        """Reads an entry of ``weights``.

        Raises:
          CheckpointError: an entry is missing or of another type, or leaves that such a weight does not have.
        """
        kind, shape = entries.text("kind"), tuple(entries.integers("shape", least=1))
        if kind not in ("spqr", "dense"):
            entries.refuse("kind", "'spqr' or 'dense'")
        described = entries.nested("leaves")
        leaves = {name: _leaf_spec(described.nested(name)) for name in described}
        if kind == "dense":
            meta, expected = None, {"values": shape}
        else:
            meta = {field: entries.integer(field) for field in META_FIELDS}
            expected = _leaf_shapes(entries, shape, meta, "perm" in leaves)
        for name in {**expected, **leaves}:
            if name not in leaves:
                raise described.lacks(name, f"an array of shape {expected[name]}")
            if leaves[name].shape != expected.get(name):
                described.nested(name).refuse(
                    "shape", str(list(expected[name])) if name in expected else "no such array"
                )
        return cls(shape, leaves, meta)

    @property
    def nbytes(self) -> int:
        """Bytes that the weight takes in memory."""
        return sum(leaf.nbytes for leaf in self.leaves.values())

    def build(self, leaves: dict[str, Any], label: str) -> Any:
        """The weight that holds these arrays; raises CheckpointError if their values cannot be right."""
        if self.meta is None:
            return leaves["values"]
        fields = {field: leaves.get(field) for field in DATA_FIELDS}
        out, inner = self.shape
        try:
            nnz = self.meta["nnz"]
            meta = {name: value for name, value in self.meta.items() if name != "nnz"}
            array = SpQRArray(**fields, shape=(out, inner), **meta).validate()  # type: ignore[arg-type]
            if array.nnz != nnz:
                raise SpQRError(f"outlier_row_ptr ends at {array.nnz}, but nnz is {nnz}")
            return array.with_capacity(entry_capacity(nnz))
        except SpQRError as error:
            raise CheckpointError(f"{label}: {error}") from None


def _leaf_spec(entries: Entries) -> LeafSpec:
    if entries.text("dtype") not in _DTYPES:
        entries.refuse("dtype", f"one of {', '.join(_DTYPES)}")
    return LeafSpec(tuple(entries.integers("shape")), np.dtype(entries.text("dtype")), entries.text("sha256"))


def _leaf_shapes(entries: Entries, shape: tuple[int, ...], meta: dict[str, int], permuted: bool) -> dict[str, Any]:
    """Shapes that the leaves of a quantized weight must have: nothing larger is read into memory."""
    if len(shape) != 2:
        entries.refuse("shape", "two sizes: [out, in]")
    for name, least, most in (("bits", 1, 8), ("scale_bits", 1, 16), ("zero_bits", 1, 16)):
        entries.integer(name, least=least, most=most)
    for name in ("group_size", "stats_group_size"):
        if entries.integer(name, least=8) % 8:
            entries.refuse(name, "a multiple of 8")
    second_level = "scale_codes" in entries.nested("leaves")
    specs = leaf_specs(
        (shape[0], shape[1]),
        bits=meta["bits"],
        group_size=meta["group_size"],
        stats_group_size=meta["stats_group_size"],
        stats_bits=(meta["scale_bits"], meta["zero_bits"]) if second_level else None,
        entries=max(meta["nnz"], 1),
        permuted=permuted,
    )
    return {name: spec[0] for name, spec in specs.items() if spec is not None}
