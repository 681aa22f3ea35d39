"""What a checkpoint says of its weights in JSON, and how Orbax is asked to keep it."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import numpy as np

from spqr_jax._compat import orbax_v1
from spqr_jax.array import SpQRArray
from spqr_jax.errors import CheckpointError, SpQRError

FORMAT = "spqr-jax"
FORMAT_VERSION = 1

DATA_FIELDS = (
    "codes", "scale_codes", "zero_codes", "tile_stats", "outlier_cols", "outlier_values", "outlier_row_ptr", "perm",
)  # fmt: skip
META_FIELDS = ("bits", "group_size", "stats_group_size", "scale_bits", "zero_bits", "nnz")


def leaves_of(weight: Any) -> dict[str, Any]:
    if isinstance(weight, SpQRArray):
        return {field: leaf for field in DATA_FIELDS if (leaf := getattr(weight, field)) is not None}
    return {"values": weight}


def fingerprint(value: np.ndarray) -> dict[str, Any]:
    data = np.ascontiguousarray(value)
    return {
        "dtype": str(data.dtype),
        "shape": list(data.shape),
        "sha256": hashlib.sha256(data.view(np.uint8).data if data.ndim else data.tobytes()).hexdigest(),
    }


def orbax_context() -> Any:
    """`config` is JSON text, not a tree of arrays."""
    ocp = orbax_v1()
    registry = ocp.handlers.local_registry()
    registry.add(ocp.handlers.JsonHandler, checkpointable_name="config")
    context = ocp.Context()
    context.checkpointables.registry = registry
    return context


@dataclasses.dataclass(frozen=True)
class WeightSpec:
    """What the JSON says of one weight."""

    kind: str
    shape: tuple[int, ...]
    leaves: dict[str, dict[str, Any]]
    meta: dict[str, int]

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> WeightSpec:
        if values["kind"] not in ("spqr", "dense"):
            raise TypeError(f"unknown kind of weight {values['kind']!r}")
        meta = {field: int(values[field]) for field in META_FIELDS} if values["kind"] == "spqr" else {}
        return cls(values["kind"], tuple(values["shape"]), dict(values["leaves"]), meta)

    def build(self, leaves: dict[str, Any], label: str) -> Any:
        if self.kind == "dense":
            return leaves["values"]
        fields = {field: leaves.get(field) for field in DATA_FIELDS}
        out, inner = self.shape
        try:
            return SpQRArray(**fields, shape=(out, inner), **self.meta).validate()  # type: ignore[arg-type]
        except SpQRError as error:
            raise CheckpointError(f"{label}: {error}") from None
