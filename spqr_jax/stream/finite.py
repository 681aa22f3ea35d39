"""Where numbers end: a result that is no number becomes an error that says where it began."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spqr_jax.errors import NotFiniteError
from spqr_jax.models.attention import positions
from spqr_jax.models.decoder import Block, embed, logits, pass_block
from spqr_jax.models.dense import dense_block
from spqr_jax.models.finite import advice, all_finite
from spqr_jax.stream import sweep
from spqr_jax.stream.blocks import BlockSource


def not_finite(result: str, source: BlockSource, tokens: Any) -> NotFiniteError:
    """The error of a result that is no number.

    Args:
      result: what is none, such as "the perplexity of window 3".
      source: the model as it was run. A quantized block becomes dense, one at a time.
      tokens: int32 [batch, seq], the text that led to it.
    """
    dtype = np.dtype(source.outer().final_norm.dtype)
    return NotFiniteError(
        f"{result} is not a number: {_where(source, jnp.asarray(tokens, jnp.int32))}; {advice(dtype)}"
    )


class _Beginning(Exception):
    """Ends the sweep at the first block whose output is not finite."""


def _where(source: BlockSource, tokens: jax.Array) -> str:
    """The first part of the model whose output is not finite, in words."""
    config, outer = source.config, source.outer()
    where = positions(config, tokens.shape[1], jnp.zeros(len(tokens), jnp.int32), jnp.int32(0))
    residual = embed(config, outer, tokens, where)
    if not bool(all_finite(residual)):
        return "the embedding of the text is not finite"

    def visit(index: int, block: Block) -> None:
        nonlocal residual
        residual = pass_block(config, dense_block(block, residual.dtype), residual, where)
        if not bool(all_finite(residual)):
            raise _Beginning(f"activations are not finite from block {index} of {config.num_layers} on")

    try:
        sweep.forward(source, visit)
    except _Beginning as beginning:
        return str(beginning)
    if not bool(all_finite(logits(config, outer, residual[:, -1]))):
        return "the outputs of all blocks are finite, but the logits of the output head are not"
    return "the model's activations and logits are finite, but the value computed from them is not"
