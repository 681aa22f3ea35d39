"""What a checkpoint holds, in numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from spqr_jax.checkpoint import CheckpointSource, content_digest
from spqr_jax.models.weights import OUTER_NAMES, Weight
from spqr_jax.quantized import is_quantized
from spqr_jax.stream import sweep


def summarize(source: CheckpointSource) -> dict[str, Any]:
    """Reads and verifies every weight of a checkpoint, one block at a time.

    Returns:
      JSON-serializable: `ideal_bits`, `stored_bits`, `outlier_percent` (over the blocks' quantized weights; nan if
      there are none), `head_bits` (stored bits a weight of the output head; None if it is dense), `bytes` (all leaves,
      as they are in memory), `disk_bytes` (all files, whose arrays are compressed), `quantized_bytes`, `dense_bytes`
      (what all weights would take dense, in the type of the norms), `digest` (see `content_digest`), `quantization`,
      `provenance`, and `layers`: for each quantized weight `shape`, `bits`, `ideal_bits`, `stored_bits`,
      `outlier_percent`, `output_error` (nan if it was not recorded), `tokens` and `damping` of its calibration (None
      if they were not recorded).
    """
    outer = source.outer()
    itemsize = np.dtype(outer.final_norm.dtype).itemsize
    layers: dict[str, Any] = {}
    total = dense_total = quantized = in_blocks = weights = outliers = 0
    ideal, head_bits = 0.0, None

    def count(index: int | None, part: Mapping[str, Weight | None]) -> None:
        """Adds a block's weights, or with None those outside of the blocks."""
        nonlocal total, dense_total, quantized, in_blocks, weights, outliers, ideal, head_bits
        prefix = "" if index is None else f"layers.{index}."
        for name, weight in part.items():
            if weight is None:
                continue
            num_bytes = weight.stored_bytes if is_quantized(weight) else weight.nbytes
            total += num_bytes
            dense_total += math.prod(weight.shape) * itemsize
            if not is_quantized(weight):
                continue
            stats = source.layer_stats.get(prefix + name, {})
            layers[prefix + name] = {
                "shape": list(weight.shape),
                "bits": weight.bits,
                "ideal_bits": weight.ideal_bits,
                "stored_bits": weight.stored_bits,
                "outlier_percent": 100 * weight.nnz / weight.size,
                "output_error": stats.get("output_error", math.nan),
                "tokens": stats.get("tokens"),
                "damping": stats.get("damping"),
            }
            quantized += num_bytes
            if index is None:
                head_bits = weight.stored_bits
                continue
            in_blocks += num_bytes
            weights += weight.size
            outliers += weight.nnz
            ideal += weight.ideal_bits * weight.size

    count(None, {name: getattr(outer, name) for name in OUTER_NAMES})
    sweep.forward(source, count)
    return {
        "ideal_bits": ideal / weights if weights else math.nan,
        "stored_bits": 8 * in_blocks / weights if weights else math.nan,
        "outlier_percent": 100 * outliers / weights if weights else math.nan,
        "head_bits": head_bits,
        "bytes": total,
        "disk_bytes": sum(file.stat().st_size for file in source.path.rglob("*") if file.is_file()),
        "quantized_bytes": quantized,
        "dense_bytes": dense_total,
        "digest": content_digest(source.path, verify=False),
        "quantization": None if source.quantization is None else source.quantization.to_json(),
        "provenance": source.provenance,
        "layers": layers,
    }
