"""Operations of a decoder's passes over text, counted from its shapes. One multiplication and one addition are two."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import NamedTuple

from spqr_jax.models.config import BlockKind, DecoderConfig
from spqr_jax.models.decoder import STAGES, matrix_names
from spqr_jax.models.weights import block_shapes, outer_shapes
from spqr_jax.solver.hessian import gram_panels
from spqr_jax.stream.stages import stage_groups

QUERY_CHUNK = 128
"""Queries that attention takes at a time, as in `spqr_jax.models.attention`."""


TILE_PADDING = 1.2
"""Rows that experts multiply, padding of their tiles included, for each pair of a token and an expert."""


class Text(NamedTuple):
    """Text that is cut into windows of equal length: how many windows, and tokens a window."""

    windows: int
    seqlen: int

    @property
    def tokens(self) -> int:
        """Tokens of all windows."""
        return self.windows * self.seqlen


@dataclasses.dataclass(frozen=True)
class Work:
    """What a run does, in kinds that run at different speeds. Sums and multiples are `+` and `*`.

    Attributes:
      dense: operations of products in the type of the dense weights.
      float32: operations of products in float32, whatever the weights' type.
      bfloat16: operations of products whose factors are rounded to bfloat16.
      attention: operations of attention's two products; the softmax between them is part of this kind's speed.
      gram: operations of Gram matrices X Xᵀ, which Hessians are summed from.
      rounded_gram: the same of inputs that are rounded to bfloat16.
      factor: operations of factorizations.
      searched, plain: weights that the column loop visits, with the search fit and with a min-max fit.
      rounded: weights that are rounded to nearest, without the column loop.
      handled: weights that are read, stacked, packed and written.
      mapped: weights whose sensitivity is searched for patterns, with NumPy on one core.
      unpacked: weights that a training step takes out of their codes, once a step.
      programs: seconds of compilation on the reference machine.
    """

    dense: float = 0.0
    float32: float = 0.0
    bfloat16: float = 0.0
    attention: float = 0.0
    gram: float = 0.0
    rounded_gram: float = 0.0
    factor: float = 0.0
    searched: float = 0.0
    plain: float = 0.0
    rounded: float = 0.0
    handled: float = 0.0
    mapped: float = 0.0
    unpacked: float = 0.0
    programs: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def __mul__(self, times: float) -> Work:
        return Work(*(times * amount for amount in vars(self).values()))

    __rmul__ = __mul__


class Pass(NamedTuple):
    """Operations of one forward pass: of products with the blocks' matrices, and of attention."""

    products: float
    attention: float


@lru_cache(maxsize=64)
def block_sizes(config: DecoderConfig, kind: BlockKind) -> Mapping[str, tuple[int, ...]]:
    """Shapes of a block's weights, as `block_shapes`; counted once for all blocks of a kind."""
    return MappingProxyType(block_shapes(config, kind))


def kind_counts(config: DecoderConfig) -> list[tuple[BlockKind, int]]:
    """The kinds of blocks that a model has, and how many of each."""
    return list(Counter(config.kinds).items())


@lru_cache(maxsize=64)
def block_weights(config: DecoderConfig, kind: BlockKind) -> int:
    """Weights of the matrices of a block, its router left out."""
    shapes = block_sizes(config, kind)
    return sum(math.prod(shapes[name]) for name in matrix_names(config, kind))


def expert_share(config: DecoderConfig, name: str) -> float:
    """Part of the tokens that are multiplied by a weight: a token passes `experts_per_token` of the experts."""
    if not name.startswith("experts."):
        return 1.0
    return min(1.0, TILE_PADDING * config.experts_per_token / config.num_experts)


def forward_pass(config: DecoderConfig, text: Text) -> Pass:
    """Text through all blocks, the output head left out.

    A matrix [out, in] takes 2·out·in operations a token that passes it.
    """
    products, attention = 0.0, 0.0
    for kind, count in kind_counts(config):
        shapes = block_sizes(config, kind)
        for name in matrix_names(config, kind):
            products += count * 2.0 * expert_share(config, name) * math.prod(shapes[name]) * text.tokens
        attention += count * attention_operations(config, bool(kind.local), text)
    return Pass(products, attention)


def attention_operations(config: DecoderConfig, local: bool, text: Text) -> float:
    """Scores and their product with the values, in one block: 4·heads·head_dim for each query and key looked at.

    Queries are taken `QUERY_CHUNK` at a time, against all keys that one of them can see.
    """
    window = config.sliding_window if local else None
    pairs = 0
    for begin in range(0, text.seqlen, QUERY_CHUNK):
        end = min(begin + QUERY_CHUNK, text.seqlen)
        first = 0 if window is None else max(0, begin - window + 1)
        pairs += (end - begin) * (end - first)
    return 4.0 * config.num_heads * config.head_dim * pairs * text.windows


def head_operations(config: DecoderConfig, tokens: int) -> float:
    """The output head on so many tokens: 2·vocab·hidden a token."""
    return 2.0 * config.vocab_size * config.hidden_size * tokens


def gram_operations(width: int, tokens: int) -> float:
    """X Xᵀ of [width, tokens], summed in panels from the diagonal on."""
    return sum(2.0 * (end - first) * (width - first) * tokens for first, end in gram_panels(width))


def input_groups(config: DecoderConfig, kind: BlockKind) -> list[tuple[tuple[str, ...], int]]:
    """Matrices of a block that read one input, and the input's width: one Hessian each."""
    return [group for stage in range(len(STAGES)) for group in stage_groups(config, kind, stage)]


def hessian_operations(config: DecoderConfig, tokens: int) -> float:
    """The Hessians of all blocks over so many tokens, each over the tokens that pass its weights."""
    return sum(
        count * gram_operations(width, 1) * tokens * expert_share(config, names[0])
        for kind, count in kind_counts(config)
        for names, width in input_groups(config, kind)
    )


def block_total(config: DecoderConfig) -> int:
    """Weights of all blocks."""
    return sum(count * block_weights(config, kind) for kind, count in kind_counts(config))


def outer_weights(config: DecoderConfig) -> int:
    """Weights outside of the blocks: embedding and output head."""
    return sum(math.prod(shape) for shape in outer_shapes(config).values() if len(shape) == 2)


def model_weights(config: DecoderConfig) -> int:
    """Weights of all matrices, embedding and output head included."""
    return outer_weights(config) + block_total(config)
