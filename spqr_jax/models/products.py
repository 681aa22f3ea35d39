"""What a block's stages are made of: products with its matrices, and activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import jax

from spqr_jax.models.config import DecoderConfig
from spqr_jax.models.weights import Block, Weight
from spqr_jax.products import linear as apply_linear
from spqr_jax.products import linear_all


class Linear(Protocol):
    """Applies the weight called `name` of the block at hand."""

    def __call__(self, name: str, w: Weight, x: jax.Array) -> jax.Array: ...


def plain_linear(name: str, w: Weight, x: jax.Array) -> jax.Array:
    """The `linear` of inference: names play no part."""
    return apply_linear(w, x)


def products(linear: Linear, block: Block, names: Sequence[str], x: jax.Array) -> list[jax.Array]:
    """Products of weights that read one input, biases added; inference computes them in one call."""
    if (joined := block.joined(names)) is not None:
        results = joined.multiply_parts(x)
    elif linear is plain_linear:
        results = linear_all([block[name] for name in names], x)
    else:
        results = [linear(name, block[name], x) for name in names]
    biases = zip(results, block.biases(names), strict=True)
    return [y if bias is None else y + bias.astype(y.dtype) for y, bias in biases]


_ACTIVATIONS: dict[str, Any] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


def activate(config: DecoderConfig, x: jax.Array) -> jax.Array:
    """The MLP's activation."""
    y: jax.Array = _ACTIVATIONS[config.activation](x)
    return y
