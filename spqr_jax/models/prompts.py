"""Prompts as lists of token ids, checked before a model reads them."""

from __future__ import annotations

import operator
from collections.abc import Sequence

from spqr_jax.errors import DataError
from spqr_jax.files.entries import shown
from spqr_jax.models.config import DecoderConfig


def checked_prompts(prompts: Sequence[Sequence[int]], config: DecoderConfig, max_new_tokens: int) -> list[int]:
    """Number of tokens of each prompt.

    Raises:
      DataError: as `spqr_jax.generate`.
    """
    try:
        rows = [[operator.index(token) for token in prompt] for prompt in prompts]
    except TypeError:  # a text, a number for a list, fractions
        raise DataError(f"prompts must be lists of integer token ids, got {shown(prompts)}") from None
    lengths = [len(row) for row in rows]
    if not lengths or min(lengths) == 0:
        raise DataError(f"expected at least one prompt and at least one token in each, got lengths {lengths}")
    if max_new_tokens < 1:
        raise DataError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if max(lengths) >= config.max_positions:
        raise DataError(
            f"a prompt of {max(lengths)} tokens leaves no room in the model's context of {config.max_positions}"
        )
    ids = [token for row in rows for token in row]
    if min(ids) < 0 or max(ids) >= config.vocab_size:
        raise DataError(
            f"prompt token ids range from {min(ids)} to {max(ids)}, but the vocabulary has {config.vocab_size} tokens: "
            "was the text tokenized for another model?"
        )
    return lengths
