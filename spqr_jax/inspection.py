"""What a checkpoint holds, in numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from spqr_jax.checkpoint import CheckpointSource
from spqr_jax.models.weights import OUTER_NAMES
from spqr_jax.quantized import is_quantized


def summarize(source: CheckpointSource) -> dict[str, Any]:
    """Reads and verifies every weight of a checkpoint, one block at a time.

    Returns:
      JSON-serializable: `ideal_bits`, `stored_bits`, `outlier_percent` (over the
      blocks' quantized weights; nan if there are none), `head_bits` (stored bits a
      weight of the output head; None if it is dense), `bytes` (all leaves),
      `quantized_bytes`, `dense_bytes` (what all weights would take dense, in the
      type of the norms), `quantization`, `provenance`, and `layers`: for each
      quantized weight `shape`, `bits`, `ideal_bits`, `stored_bits`,
      `outlier_percent`, `output_error` (nan if it was not recorded), `tokens` and
      `damping` of its calibration (None if they were not recorded).
    """
    outer = source.outer()
    itemsize = np.dtype(outer.final_norm.dtype).itemsize
    layers: dict[str, Any] = {}
    total = dense_total = quantized = in_blocks = weights = outliers = 0
    ideal, head_bits = 0.0, None
    for index in range(-1, source.config.num_layers):
        part = {n: getattr(outer, n) for n in OUTER_NAMES} if index < 0 else dict(source.block(index))
        prefix = "" if index < 0 else f"layers.{index}."
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
            if index < 0:
                head_bits = weight.stored_bits
                continue
            in_blocks += num_bytes
            weights += weight.size
            outliers += weight.nnz
            ideal += weight.ideal_bits * weight.size
    return {
        "ideal_bits": ideal / weights if weights else math.nan,
        "stored_bits": 8 * in_blocks / weights if weights else math.nan,
        "outlier_percent": 100 * outliers / weights if weights else math.nan,
        "head_bits": head_bits,
        "bytes": total,
        "quantized_bytes": quantized,
        "dense_bytes": dense_total,
        "quantization": None if source.quantization is None else source.quantization.to_json(),
        "provenance": source.provenance,
        "layers": layers,
    }
