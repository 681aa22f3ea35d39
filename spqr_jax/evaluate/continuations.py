"""How likely a model thinks continuations of contexts, many at a time.

Continuations of one context share what is read of it: a context goes through each
block once, and then all its continuations go on from its keys and values. Only one
block's keys and values are held.

All batches advance together, block by block: a quantized block is made dense once for
all of them, or once for each group of batches whose residual streams take up to 1 GiB.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spqr_jax.errors import DataError
from spqr_jax.evaluate.passes import Steps, embed_batch, groups, pass_blocks
from spqr_jax.layout import round_up
from spqr_jax.models.attention import KVCache, Positions, Prefix, positions
from spqr_jax.models.config import DecoderConfig
from spqr_jax.models.decoder import Block, Decoder, Outer, State, logits, pass_block, run_block
from spqr_jax.models.dense import embedding_part, head_part
from spqr_jax.stream.blocks import TreeSource
from spqr_jax.stream.finite import not_finite

_HEAD_CHUNK = 128  # positions whose logits are held at once

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
    params: Decoder,
    requests: Sequence[tuple[Tokens, Tokens]],
    *,
    batch_tokens: int = 4096,
    progress: Callable[[int], None] | None = None,
) -> list[ContinuationScore]:
    """Scores continuations.

    Args:
      params: the model, dense or quantized.
      requests: (context, continuation) as token ids, neither empty. A context that is too
        long for the model beside its continuation loses its first tokens.
      batch_tokens: about how many tokens to read at a time.
      progress: called with how many more requests are done. Between blocks this is the share of blocks that all
        requests have passed.

    Returns:
      A score for each request, in their order.

    Raises:
      DataError: an empty context or continuation, a continuation longer than the model's
        context, ids outside its vocabulary.
      NotFiniteError: a score is no number; says where in the model that begins.
    """
    config = params.config
    batches = [
        _arranged(batch)
        for batch in _batches([_checked(i, *pair, config) for i, pair in enumerate(requests)], batch_tokens)
    ]
    steps = Steps(len(requests) * (config.num_layers + 1), _as_requests(progress, config.num_layers + 1))
    scores: list[ContinuationScore | None] = [None] * len(requests)
    for group in groups(batches, lambda batch: batch.positions * config.hidden_size):
        for batch, (totals, greedy) in zip(group, _score(params, group, steps), strict=True):
            for request, total, is_greedy in zip(batch.requests, totals, greedy, strict=False):  # the rest is padding
                if not np.isfinite(total):
                    text = np.array([[*request.prefix, *request.suffix]], np.int32)
                    raise not_finite(f"the log-probability of request {request.index}", TreeSource(params), text)
                scores[request.index] = ContinuationScore(float(total), bool(is_greedy))
    return [score for score in scores if score is not None]


def _as_requests(progress: Callable[[int], None] | None, steps_a_request: int) -> Callable[[int, int], None] | None:
    """A callback for `Steps` that tells `progress` how many more requests the steps amount to."""
    if progress is None:
        return None
    told = 0

    def advanced(done: int, total: int) -> None:
        nonlocal told
        requests = done // steps_a_request
        if requests > told:
            progress(requests - told)
        told = requests

    return advanced


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


def _embedded(config: DecoderConfig, outer: Outer, batch: _Batch) -> _Streams:
    """The streams before the first block; `outer` is dense."""
    width, which = batch.contexts.shape[1], jnp.asarray(batch.which)
    where = positions(config, batch.suffixes.shape[1], batch.padding[batch.which], np.int32(width))
    residual = embed_batch(config, outer, jnp.asarray(batch.suffixes), where)
    if not width:
        return _Streams(None, residual, None, where, which, len(batch.requests))
    earlier = positions(config, width, batch.padding, np.int32(0))
    context = embed_batch(config, outer, jnp.asarray(batch.contexts), earlier)
    return _Streams(context, residual, earlier, where, which, len(batch.requests))


def _score(params: Decoder, group: list[_Batch], steps: Steps) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each batch: log-probabilities summed over a row, and whether all of the row's tokens are greedy."""
    config = params.config
    outer = embedding_part(params.outer)
    streams = [_embedded(config, outer, batch) for batch in group]
    del outer  # a dense copy where the embedding is quantized

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
    pass_blocks(params.layers, streams, step, dtype, lambda passed: steps.advance(passed.requests))
    head = head_part(config, params.outer, dtype)
    scores = []
    for batch, passed in zip(group, streams, strict=True):
        totals, greedy = _target_log_probabilities(config, head, passed.residual, jnp.asarray(batch.targets))
        scores.append((np.asarray(totals, np.float64), np.asarray(greedy)))
        steps.advance(passed.requests)
    return scores


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


@partial(jax.jit, static_argnums=0)
def _target_log_probabilities(
    config: DecoderConfig, outer: Outer, residual: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """f32 [rows], bool [rows] of [rows, tokens, hidden]; a target of -1 is none."""
    rows, tokens, _ = residual.shape
    chunk = min(_HEAD_CHUNK, rows * tokens)
    padded = round_up(rows * tokens, chunk)

    def by_chunk(x: jax.Array, fill: int) -> jax.Array:
        flat = x.reshape(rows * tokens, *x.shape[2:])
        width = [(0, padded - rows * tokens)] + [(0, 0)] * (flat.ndim - 1)
        return jnp.pad(flat, width, constant_values=fill).reshape(-1, chunk, *flat.shape[1:])

    def one(part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        scores, target = logits(config, outer, part[0]), part[1]
        picked = jnp.take_along_axis(scores, jnp.maximum(target, 0)[:, None], axis=-1)[:, 0]
        log_p = jnp.where(target >= 0, picked - jax.nn.logsumexp(scores, axis=-1), 0.0)
        return log_p, (jnp.argmax(scores, axis=-1) == target) | (target < 0)

    log_p, greedy = lax.map(one, (by_chunk(residual, 0), by_chunk(targets, -1)))
    log_p, greedy = (a.reshape(-1)[: rows * tokens].reshape(rows, tokens) for a in (log_p, greedy))
    return jnp.sum(log_p, axis=1), jnp.all(greedy, axis=1)


def _bucket(length: int) -> int:
    """Lengths are rounded up, so that few of them are compiled: to 8 up to 32, 16 up to 64, 64 up to 256, 256 above."""
    return round_up(length, next(step for step, top in _STEPS if length <= top))


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
