"""How much a result will take on the disk, before the work for it begins."""

from __future__ import annotations

import math

from spqr_jax.config import SpQRConfig
from spqr_jax.job.driver import quantizable_paths
from spqr_jax.models.config import DecoderConfig
from spqr_jax.models.weights import weight_shapes

_HF_SPQR_BITS = 4  # 64-bit words of 16 codes


def quantized_bytes(model: DecoderConfig, config: SpQRConfig, itemsize: int) -> int:
    """About what a model will take: the bits of codes and statistics, without outliers; the rest dense."""
    chosen = set(quantizable_paths(model, config))
    bits = 0.0
    for path, shape in weight_shapes(model).items():
        weight_bits = 8.0 * itemsize
        if path in chosen:
            weight_bits = _stored_bits(config, path, path == model.head_path, shape[-1])
        bits += weight_bits * math.prod(shape)
    return int(bits / 8)


def exported_bytes(model: DecoderConfig, form: str, itemsize: int) -> int:
    """About what `spqr export` will write in a format: all weights dense, or those of blocks in its words."""
    bits = 0.0
    for path, shape in weight_shapes(model).items():
        in_words = form == "hf-spqr" and path.startswith("layers.") and len(shape) == 2
        bits += (_HF_SPQR_BITS if in_words else 8 * itemsize) * math.prod(shape)
    return int(bits / 8)


def _stored_bits(config: SpQRConfig, path: str, is_head: bool, inputs: int) -> float:
    if config.target_bits is not None and not is_head:
        return config.target_bits
    chosen = config.for_head(path) if is_head else config.for_path(path)
    assert chosen is not None
    return chosen.bits + 2 * chosen.stats_bits / (chosen.group_size or inputs)
