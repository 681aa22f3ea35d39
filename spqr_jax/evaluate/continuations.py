"""How likely a model thinks continuations of contexts, many at a time.

What texts share at their beginning is read once: continuations of one context are branches of a tree (`trees`).

All texts advance together, block by block: a quantized block is made dense once for all of them, or once for each group
of texts whose residual streams fit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from spqr_jax.errors import DataError
from spqr_jax.evaluate.passes import embed_group, groups, pass_blocks, stream_numbers
from spqr_jax.evaluate.tree_pass import Slots, pass_trees, positions_in_trees
from spqr_jax.evaluate.trees import Forest, Text, forests, plant
from spqr_jax.events import Event, Events, ignore
from spqr_jax.models.attention import Positions
from spqr_jax.models.config import DecoderConfig
from spqr_jax.models.decoder import Block, Decoder, Outer
from spqr_jax.models.products import Linear, plain_linear
from spqr_jax.stream.blocks import BlockSource, as_source
from spqr_jax.stream.finite import not_finite
from spqr_jax.stream.head import see
from spqr_jax.stream.stages import rounded_linear

_FEWEST_NUMBERS = 2**24  # of residual stream in a group, 64 MiB in float32: a small block costs little to make dense
_HEAD_ROWS = 512  # that the output head reads at a time
_TARGETS = 4  # tokens whose probability is asked for at the same place: choices of a question mostly differ at once

PRODUCTS: dict[str, Linear] = {"float32": plain_linear, "bfloat16": rounded_linear}
"""What multiplies by blocks' matrices, by the type that it rounds the factors to."""

Tokens = Sequence[int]


class ContinuationScore(NamedTuple):
    """Of one continuation.

    Attributes:
      log_probability: of all its tokens, given the context and those before, in nats.
      greedy: whether each token is the likeliest at its place.
    """

    log_probability: float
    greedy: bool


Scored = Callable[[dict[int, ContinuationScore]], None]
"""Is given the scores that are new, by the requests' indices."""


def continuation_scores(
    params: Decoder | BlockSource,
    requests: Sequence[tuple[Tokens, Tokens]],
    *,
    batch_tokens: int = 1024,
    events: Events = ignore,
    scored: Scored = lambda scores: None,
    seed: int = 0,
    linear: Linear = plain_linear,
) -> list[ContinuationScore]:
    """Scores continuations.

    Args:
      params: the model, dense or quantized, in memory or as a `BlockSource`.
      requests: (context, continuation) as token ids, neither empty. A context that is too
        long for the model beside its continuation loses its first tokens.
      batch_tokens: about how many tokens to read at a time.
      events: told of each batch, as phase "scoring". A step is one token to read.
      scored: given each group's scores as soon as they are known. Groups are drawn at random, so that those which are
        known are a fair sample of all.
      seed: of this draw.
      linear: what multiplies by the blocks' matrices, such as `rounded_linear`; the output head stays as it is.

    Returns:
      A score for each request, in their order.

    Raises:
      DataError: an empty context or continuation, a continuation longer than the model's
        context, ids outside its vocabulary.
      NotFiniteError: a score is no number; says where in the model that begins.
    """
    source = as_source(params)
    config, outer = source.config, source.outer()
    texts = [_checked(index, *pair, config) for index, pair in enumerate(requests)]
    batches = forests(plant(texts, batch_tokens), batch_tokens)
    np.random.default_rng(seed).shuffle(batches)
    progress = _Progress(sum(batch.nodes for batch in batches), len(requests), config.num_layers + 1, events)
    scores: dict[int, ContinuationScore] = {}
    most = max(stream_numbers(config), _FEWEST_NUMBERS)
    for group in groups(batches, lambda batch: batch.tokens.size * config.hidden_size, most):
        new = _score(source, outer, group, progress, linear)
        for index, score in new.items():
            if not np.isfinite(score.log_probability):
                text = np.array([texts[index].read], np.int32)
                raise not_finite(f"the log-probability of request {index}", source, text)
        scores |= new
        scored(new)
    return [scores[index] for index in range(len(requests))]


def _checked(index: int, context: Tokens, continuation: Tokens, config: DecoderConfig) -> Text:
    if not len(context) or not len(continuation):
        raise DataError(
            f"request {index} has {len(context)} tokens of context and {len(continuation)} of continuation: at least "
            "one token of each is needed (for an empty context, give the BOS or EOS token)"
        )
    room = config.max_positions + 1 - len(continuation)  # the last token of a continuation is never read
    if room < 1:
        raise DataError(
            f"request {index} has a continuation of {len(continuation)} tokens, more than the model's context of "
            f"{config.max_positions}"
        )
    whole = (*context[-room:], *continuation)
    if min(whole) < 0 or max(whole) >= config.vocab_size:
        raise DataError(
            f"request {index} has token ids from {min(whole)} to {max(whole)}, but the model's vocabulary has "
            f"{config.vocab_size} tokens: was the text tokenized for another model?"
        )
    return Text(index, whole[:-1], whole[len(whole) - len(continuation) :])


class _Progress:
    """Counts tokens that were read: each passes some parts of the model."""

    def __init__(self, tokens: int, requests: int, parts: int, events: Events) -> None:
        self._tokens, self._requests, self._parts, self._events = tokens, requests, parts, events
        self._passed = self._scored = 0
        self._tell()

    def pass_part(self, tokens: int) -> None:
        """So many tokens passed one more part."""
        self._passed += tokens
        self._tell()

    def score(self, requests: int) -> None:
        """So many more requests have their score."""
        self._scored += requests
        self._tell()

    def _tell(self) -> None:
        note = f"{self._scored} of {self._requests} continuations"
        self._events(Event("scoring", self._passed // self._parts, self._tokens, note))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Stream:
    """What goes from block to block.

    Attributes:
      residual: residual stream of a forest's tokens [1, tokens, hidden].
      where: their positions.
      slots: where their trees are.
      nodes: tokens that are no padding; static.
    """

    residual: jax.Array
    where: Positions
    slots: Slots
    nodes: int = dataclasses.field(metadata={"static": True})


def _score(
    source: BlockSource, outer: Outer, group: list[Forest], progress: _Progress, linear: Linear
) -> dict[int, ContinuationScore]:
    config = source.config
    places = [positions_in_trees(config, forest) for forest in group]
    residuals = embed_group(config, outer, [forest.tokens[None] for forest in group], places)
    streams = [
        _Stream(residual, where, Slots.of(forest), forest.nodes)
        for residual, where, forest in zip(residuals, places, group, strict=True)
    ]
    del residuals

    def step(block: Block, before: _Stream) -> _Stream:
        after = pass_trees(config, block, before.residual, before.where, before.slots, linear)
        return dataclasses.replace(before, residual=after)

    pass_blocks(source, streams, step, streams[0].residual.dtype, lambda passed: progress.pass_part(passed.nodes))
    scores = _predicted(config, outer, group, [stream.residual for stream in streams])
    progress.pass_part(sum(forest.nodes for forest in group))
    progress.score(len(scores))
    return scores


def _predicted(
    config: DecoderConfig, outer: Outer, group: list[Forest], residuals: list[jax.Array]
) -> dict[int, ContinuationScore]:
    """Scores by the residual streams after the last block. The output head reads only tokens that predict."""
    streams, places, targets, requests, read = [], [], [], [], 0
    for forest, residual in zip(group, residuals, strict=True):
        first = 0
        predicting: list[np.ndarray] = []
        for tree in forest.trees:
            for number, nodes, continuation in tree.predicting:
                predicting.append(nodes + first)
                targets.append(continuation)
                requests.append(np.full(len(continuation), number))
            first += len(tree)
        tokens, position = np.unique(np.concatenate(predicting), return_inverse=True)
        streams.append(np.asarray(residual)[0, tokens])
        places.append(position + read)
        read += len(tokens)
    stream, place, target, request = (np.concatenate(parts) for parts in (streams, places, targets, requests))
    del streams
    row_place, row, column = _in_rows(place)
    padding = -len(row_place) % _HEAD_ROWS
    row_targets = np.full((len(row_place) + padding, _TARGETS), -1, np.int32)
    row_targets[row, column] = target
    stream = stream[np.pad(row_place, (0, padding))].reshape(-1, 1, _HEAD_ROWS, stream.shape[1])
    seen = see(config, outer, list(stream), list(row_targets.reshape(-1, 1, _HEAD_ROWS, _TARGETS)))
    loss = np.concatenate([np.asarray(piece.loss, np.float64)[0] for piece in seen])[row, column]
    likeliest = np.concatenate([np.asarray(piece.likeliest)[0] for piece in seen])[row]
    which, index = np.unique(request, return_inverse=True)
    totals, misses = np.bincount(index, weights=-loss), np.bincount(index, weights=likeliest != target)
    return {
        int(number): ContinuationScore(float(total), not missed)
        for number, total, missed in zip(which, totals, misses, strict=True)
    }


def _in_rows(place: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Predictions at the same place share a row of the output head, `_TARGETS` at most.

    Args:
      place: int [predictions], where each prediction is made.

    Returns:
      The place of each row; the row and the column of each prediction.
    """
    order = np.argsort(place, kind="stable")
    starts = np.concatenate([[True], np.diff(place[order]) > 0])
    rank = np.arange(len(place)) - np.maximum.accumulate(np.where(starts, np.arange(len(place)), 0))
    column = rank % _TARGETS
    row, columns = np.empty_like(order), np.empty_like(order)
    row[order], columns[order] = np.cumsum(column == 0) - 1, column
    return place[order][column == 0], row, columns
