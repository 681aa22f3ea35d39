"""Ways in which families lay several weights, or one, into a tensor."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from spqr_jax.models.config import DecoderConfig
from spqr_jax.models.names import Packing


def _attention_rows(config: DecoderConfig) -> list[int]:
    return [heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]


def _stacked(tensor: np.ndarray, sizes: Sequence[int]) -> list[np.ndarray]:
    return np.split(tensor, np.cumsum(sizes)[:-1], axis=0)


QKV_STACKED = Packing(
    lambda tensor, config: _stacked(tensor, _attention_rows(config)), lambda weights, config: np.concatenate(weights)
)
"""Q, K and V one below the other."""

GATE_UP_STACKED = Packing(lambda tensor, config: np.split(tensor, 2), lambda weights, config: np.concatenate(weights))
"""Gate and up, one below the other."""

TRANSPOSED = Packing(lambda tensor, config: [tensor.T], lambda weights, config: weights[0].T)
"""A weight [in, out]."""

QKV_TRANSPOSED = Packing(
    lambda tensor, config: _stacked(tensor.T, _attention_rows(config)),
    lambda weights, config: np.concatenate(weights).T,
)
"""Q, K and V side by side, each [in, out]."""


def _split_by_heads(tensor: np.ndarray, config: DecoderConfig) -> list[np.ndarray]:
    share = config.num_heads // config.num_kv_heads
    heads = tensor.reshape(config.num_kv_heads, share + 2, config.head_dim, *tensor.shape[1:])
    parts = (heads[:, :share], heads[:, share], heads[:, share + 1])
    return [part.reshape(-1, *tensor.shape[1:]) for part in parts]


def _join_by_heads(weights: Sequence[np.ndarray], config: DecoderConfig) -> np.ndarray:
    inner = weights[0].shape[1:]
    heads = [w.reshape(config.num_kv_heads, -1, config.head_dim, *inner) for w in weights]
    return np.concatenate(heads, axis=1).reshape(-1, *inner)


QKV_BY_HEADS = Packing(_split_by_heads, _join_by_heads)
"""For each head of keys and values: the query heads that share it, its keys, its values."""


def rotated_in_pairs(query: bool) -> Packing:
    """Rows of Q or K in llama.cpp's order for Llama.

    It rotates neighbouring rows (0,1), (2,3), ... of a head together; we, as
    Hugging Face, rotate row i with row i + head_dim/2.
    """

    def heads(config: DecoderConfig) -> int:
        return config.num_heads if query else config.num_kv_heads

    def split(tensor: np.ndarray, config: DecoderConfig) -> list[np.ndarray]:
        pairs = tensor.reshape(heads(config), -1, 2, *tensor.shape[1:])
        return [pairs.swapaxes(1, 2).reshape(tensor.shape)]

    def join(weights: Sequence[np.ndarray], config: DecoderConfig) -> np.ndarray:
        halves = weights[0].reshape(heads(config), 2, -1, *weights[0].shape[1:])
        return halves.swapaxes(1, 2).reshape(weights[0].shape)

    return Packing(split, join)


ONE_MORE = Packing(
    lambda tensor, config: [tensor - np.ones((), tensor.dtype)],
    lambda weights, config: weights[0] + np.ones((), weights[0].dtype),
    in_float32=True,
)
"""A norm's gain with the 1 that Gemma's norms add."""

EXPERTS_STACKED = Packing(lambda tensor, config: list(tensor), lambda weights, config: np.stack(weights))
"""All experts' weights, [experts, out, in]."""
