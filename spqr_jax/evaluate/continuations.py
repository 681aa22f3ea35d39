"""How likely a model thinks continuations of contexts, many at a time.

Continuations of one context share what is read of it: a context goes through each
block once, and then all its continuations go on from its keys and values. Only one
block's keys and values are held.

All batches advance together, block by block: a quantized block is made dense once for
all of them, or once for each group of batches whose residual streams fit (see `stream_numbers`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spqr_jax.errors import DataError
from spqr_jax.evaluate.passes import embed_group, groups, pass_blocks, stream_numbers
from spqr_jax.events import Events, Steps, ignore
from spqr_jax.layout import round_up
from spqr_jax.models.attention import KVCache, Positions, Prefix, positions
from spqr_jax.models.config import DecoderConfig
from spqr_jax.models.decoder import Block, Decoder, Outer, State, pass_block, run_block
from spqr_jax.stream.blocks import BlockSource, as_source
from spqr_jax.stream.finite import not_finite
from spqr_jax.stream.head import Seen, see

_STEPS = ((8, 32), (16, 64), (64, 256), (256, float("inf")))
"""What lengths are rounded up to a multiple of, up to which length."""

Tokens = Sequence[int]


class ContinuationScore(NamedTuple):
    """Of one continuation.

    Attributes:
      log_probability: of all its tokens, given the context and those before, in nats.
      greedy: whether each token is the likeliest at its place.
    """

    log_probability: float
    greedy: bool


@dataclasses.dataclass(frozen=True)
class _Request:
    """A continuation to score: the model reads `prefix`, then `suffix`, which predicts `targets`."""

    index: int
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]  # the context's last token, and the continuation without its last
    targets: tuple[int, ...]


def continuation_scores(
    params: Decoder | BlockSource,
    requests: Sequence[tuple[Tokens, Tokens]],
    *,
    batch_tokens: int = 4096,
    events: Events = ignore,
) -> list[ContinuationScore]:
    """Scores continuations.

    Args:
      params: the model, dense or quantized, in memory or as a `BlockSource`.
      requests: (context, continuation) as token ids, neither empty. A context that is too
        long for the model beside its continuation loses its first tokens.
      batch_tokens: about how many tokens to read at a time.
      events: told of each batch, as phase "scoring". A step is one request through one block, or through the output
        head.

    Returns:
      A score for each request, in their order.

    Raises:
      DataError: an empty context or continuation, a continuation longer than the model's
        context, ids outside its vocabulary.
      NotFiniteError: a score is no number; says where in the model that begins.
    """
    source = as_source(params)
    config, outer = source.config, source.outer()
    batches = [
        _arranged(batch)
        for batch in _batches([_checked(i, *pair, config) for i, pair in enumerate(requests)], batch_tokens)
    ]
    steps = Steps("scoring", len(requests) * (config.num_layers + 1), events)
    scores: list[ContinuationScore | None] = [None] * len(requests)
    for group in groups(batches, lambda batch: batch.positions * config.hidden_size, stream_numbers(config)):
        for batch, (totals, greedy) in zip(group, _score(source, outer, group, steps), strict=True):
            for request, total, is_greedy in zip(batch.requests, totals, greedy, strict=False):  # the rest is padding
                if not np.isfinite(total):
                    text = np.array([[*request.prefix, *request.suffix]], np.int32)
                    raise not_finite(f"the log-probability of request {request.index}", source, text)
                scores[request.index] = ContinuationScore(float(total), bool(is_greedy))
    return [score for score in scores if score is not None]


def _checked(index: int, context: Tokens, continuation: Tokens, config: DecoderConfig) -> _Request:
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
    split = len(whole) - len(continuation)
    return _Request(index, whole[: split - 1], whole[split - 1 : -1], whole[split:])


def _batches(requests: list[_Request], batch_tokens: int) -> Iterator[list[_Request]]:
    """Requests of similar length together, those of one prefix side by side, as many as fit."""
    batch: list[_Request] = []
    prefixes, longest = 0, 0
    for request in sorted(requests, key=lambda r: (-len(r.prefix), r.prefix, -len(r.suffix))):
        new = not batch or batch[-1].prefix != request.prefix
        longest = max(longest, len(request.suffix))
        tokens = (prefixes + new) * len((batch or [request])[0].prefix) + (len(batch) + 1) * longest
        if batch and tokens > batch_tokens:
            yield batch
            batch, prefixes, longest, new = [], 0, len(request.suffix), True
        batch.append(request)
        prefixes += new
    if batch:
        yield batch


@dataclasses.dataclass(frozen=True)
class _Batch:
    """Requests that are read together, as padded arrays.

    Attributes:
      requests: the continuations to score; rows behind them are padding.
      contexts: int32 [prefixes, width], left-padded.
      padding: int32 [prefixes], left-padding of each prefix.
      suffixes: int32 [rows, length].
      targets: int32 [rows, length]; -1 for none.
      which: int32 [rows], the prefix of each row.
    """

    requests: list[_Request]
    contexts: np.ndarray
    padding: np.ndarray
    suffixes: np.ndarray
    targets: np.ndarray
    which: np.ndarray

    @property
    def positions(self) -> int:
        """Positions that the model reads, padding included."""
        return self.contexts.size + self.suffixes.size


def _arranged(requests: list[_Request]) -> _Batch:
    prefixes = list(dict.fromkeys(request.prefix for request in requests))
    width, length = _bucket(len(prefixes[0])), _bucket(max(len(request.suffix) for request in requests))
    rows, contexts = _power_of_two(len(requests)), _power_of_two(len(prefixes))
    before, padding = np.zeros((contexts, width), np.int32), np.full(contexts, width, np.int32)
    for row, prefix in enumerate(prefixes):
        padding[row] = width - len(prefix)
        before[row, padding[row] :] = prefix
    suffixes, targets = np.zeros((rows, length), np.int32), np.full((rows, length), -1, np.int32)
    which, place = np.zeros(rows, np.int32), {prefix: row for row, prefix in enumerate(prefixes)}
    for row, request in enumerate(requests):
        which[row] = place[request.prefix]
        suffixes[row, : len(request.suffix)] = request.suffix
        targets[row, : len(request.targets)] = request.targets
    return _Batch(requests, before, padding, suffixes, targets, which)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Streams:
    """What of a batch goes from block to block.

    Attributes:
      context: residual stream of the prefixes [prefixes, width, hidden]; None if all are empty.
      residual: residual stream of the suffixes [rows, length, hidden].
      earlier, where: positions of both.
      which: int32 [rows], the prefix of each row.
      requests: number of requests; static.
    """

    context: jax.Array | None
    residual: jax.Array
    earlier: Positions | None
    where: Positions
    which: jax.Array
    requests: int = dataclasses.field(metadata={"static": True})


def _embedded(config: DecoderConfig, outer: Outer, group: list[_Batch]) -> list[_Streams]:
    """The streams of each batch before the first block."""
    places = [
        positions(config, batch.suffixes.shape[1], batch.padding[batch.which], np.int32(batch.contexts.shape[1]))
        for batch in group
    ]
    residuals = embed_group(config, outer, [batch.suffixes for batch in group], places)
    with_context = [batch for batch in group if batch.contexts.shape[1]]
    earlier = [positions(config, batch.contexts.shape[1], batch.padding, np.int32(0)) for batch in with_context]
    contexts = iter(embed_group(config, outer, [batch.contexts for batch in with_context], earlier))
    before = iter(earlier)
    return [
        _Streams(
            next(contexts) if batch.contexts.shape[1] else None,
            residual,
            next(before) if batch.contexts.shape[1] else None,
            where,
            jnp.asarray(batch.which),
            len(batch.requests),
        )
        for batch, residual, where in zip(group, residuals, places, strict=True)
    ]


def _score(source: BlockSource, outer: Outer, group: list[_Batch], steps: Steps) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each batch: log-probabilities summed over a row, and whether all of the row's tokens are greedy."""
    config = source.config
    streams = _embedded(config, outer, group)

    def step(block: Block, before: _Streams) -> _Streams:
        if before.context is None:
            residual = pass_block(config, block, before.residual, before.where)
            return dataclasses.replace(before, residual=residual)
        assert before.earlier is not None
        context, residual = _pass_both(
            config, block, before.context, before.residual, before.earlier, before.where, before.which
        )
        return dataclasses.replace(before, context=context, residual=residual)

    dtype = streams[0].residual.dtype
    pass_blocks(source, streams, step, dtype, lambda passed: steps.advance(passed.requests))
    targets = [jnp.asarray(batch.targets) for batch in group]
    seen = see(config, outer, [passed.residual for passed in streams], targets)
    steps.advance(sum(passed.requests for passed in streams))
    return [_of_rows(part, batch.targets) for part, batch in zip(seen, group, strict=True)]


def _of_rows(seen: Seen, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float64 [rows], bool [rows] of [rows, tokens]; a target of -1 is none."""
    log_p = -np.asarray(seen.loss, np.float64)
    greedy = np.asarray(seen.likeliest) == targets
    return np.where(targets >= 0, log_p, 0.0).sum(axis=1), np.all(greedy | (targets < 0), axis=1)


@partial(jax.jit, static_argnums=0)
def _pass_both(
    config: DecoderConfig,
    block: Block,
    context: jax.Array,
    residual: jax.Array,
    earlier: Positions,
    where: Positions,
    which: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Contexts [prefixes, width, hidden] and what follows them [rows, tokens, hidden] through one block."""
    shape = (context.shape[0], config.num_kv_heads, context.shape[1], config.head_dim)
    empty = KVCache(jnp.zeros(shape, context.dtype), jnp.zeros(shape, context.dtype))
    state = run_block(config, block, State(context, None, empty), earlier)
    assert isinstance(state.cache, KVCache)
    return state.residual, run_block(config, block, State(residual, None, Prefix(state.cache, which)), where).residual


def _bucket(length: int) -> int:
    """Lengths are rounded up, so that few of them are compiled: to 8 up to 32, 16 up to 64, 64 up to 256, 256 above."""
    return round_up(length, next(step for step, top in _STEPS if length <= top))


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
