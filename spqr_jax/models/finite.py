"""Where numbers end: a result that is no number becomes an error that says where it began."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spqr_jax.errors import NotFiniteError
from spqr_jax.models.attention import positions
from spqr_jax.models.decoder import embed, logits, pass_block
from spqr_jax.models.dense import dense_block, embedding_part, head_part


def not_finite(result: str, params: Any, tokens: Any) -> NotFiniteError:
    """The error of a result that is no number.

    Args:
      result: what is none, such as "the perplexity of window 3".
      params: the model as it was run, a `Decoder` or `ReadyDecoder`. A quantized block becomes dense, one at a time.
      tokens: int32 [batch, seq], the text that led to it.
    """
    dtype = np.dtype(params.outer.final_norm.dtype)
    return NotFiniteError(
        f"{result} is not a number: {_where(params, jnp.asarray(tokens, jnp.int32))}; {advice(dtype)}"
    )


def refuse_infinite(arrays: Iterable[jax.Array], where: str) -> None:
    """Checks activations or gradients on their way.

    Args:
      arrays: of one type, any shapes.
      where: in the model they are.

    Raises:
      NotFiniteError: some are infinite or no numbers.
    """
    for array in arrays:
        if not bool(_all_finite(array)):
            raise NotFiniteError(f"{where} are not finite; {advice(array.dtype)}")


@jax.jit
def _all_finite(array: jax.Array) -> jax.Array:
    return jnp.all(jnp.isfinite(array))


def advice(dtype: Any) -> str:
    """What to try when values of this type are no longer finite."""
    if np.dtype(dtype) == np.float16:
        return "float16 cannot hold values above 65504: try --dtype bfloat16 or --dtype float32"
    return (
        f"{np.dtype(dtype)} has enough range for model activations, so the weights themselves must be wrong: fetch or "
        "convert the model again, and check the dense model with 'spqr perplexity'"
    )


def _where(params: Any, tokens: jax.Array) -> str:
    """The first part of the model whose output is not finite, in words."""
    config = params.config
    where = positions(config, tokens.shape[1], jnp.zeros(len(tokens), jnp.int32), jnp.int32(0))
    residual = embed(config, embedding_part(params.outer), tokens, where)
    if not bool(_all_finite(residual)):
        return "the embedding of the text is not finite"
    for index, block in enumerate(params.layers):
        residual = pass_block(config, dense_block(block, residual.dtype), residual, where)
        if not bool(_all_finite(residual)):
            return f"activations are not finite from block {index} of {config.num_layers} on"
    head = head_part(config, params.outer, residual.dtype)
    if not bool(_all_finite(logits(config, head, residual[:, -1]))):
        return "the outputs of all blocks are finite, but the logits of the output head are not"
    return "the model's activations and logits are finite, but the value computed from them is not"
