"""Quantized weights made dense, one part of a model at a time.

Calibration, evaluation and training multiply many rows at once. There a dense matrix is faster than a packed one.
A whole dense model may not fit into memory, but one dense block does.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from spqr_jax.models.config import DecoderConfig
from spqr_jax.models.weights import Block, Outer, Weight
from spqr_jax.quantized import is_quantized


def dense_block(block: Block, dtype: Any) -> Block:
    """A block with a dense matrix in place of each `SpQRArray`. Other weights stay as they are.

    Args:
      block: the block, dense or quantized.
      dtype: type of the dequantized matrices. Activations have it, so that a product rounds them no further.
    """
    packed = {name: weight for name, weight in block.items() if is_quantized(weight)}
    return block.replace({name: weight.to_dense(dtype) for name, weight in packed.items()})


def embedding_part(outer: Outer) -> Outer:
    """The weights that `embed` reads, dense. Rows of a quantized embedding are float32."""
    return Outer(
        _dense(outer.embed_tokens, jnp.float32), None, embed_positions=_dense(outer.embed_positions, jnp.float32)
    )


def head_part(config: DecoderConfig, outer: Outer, dtype: Any) -> Outer:
    """The weights that `logits` reads, dense: the last norm and the output head.

    Args:
      config: the model's.
      outer: dense or quantized.
      dtype: of the activations.
    """
    norm_only = Outer(None, outer.final_norm, final_norm_bias=outer.final_norm_bias)
    return dataclasses.replace(norm_only, **{config.head_path: _dense(getattr(outer, config.head_path), dtype)})


def _dense(weight: Weight | None, dtype: Any) -> Weight | None:
    return weight.to_dense(dtype) if is_quantized(weight) else weight
