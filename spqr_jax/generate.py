"""Text generation: prefill, then a jitted loop that decodes some tokens at a time into a donated KV cache."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spqr_jax._compat import compile_as_graph
from spqr_jax.errors import DataError, NotFiniteError, SpQRError
from spqr_jax.layout import round_up
from spqr_jax.models.attention import KVCache, positions
from spqr_jax.models.decoder import Block, Decoder, Outer, embed, logits
from spqr_jax.models.prompts import checked_prompts
from spqr_jax.models.ready import ReadyDecoder, run_parts
from spqr_jax.parallel import (
    ReadyShards,
    ShardedDecoder,
    copied_for,
    empty_cache_of,
    ready_anywhere,
    shard,
    with_cache,
)
from spqr_jax.sampling import Draw, Sampling, sample
from spqr_jax.stream.finite import not_finite

Cache = tuple[KVCache, ...]

_AT_ONCE = 16  # tokens of a prompt that one call decodes at most: each call costs Python and XLA time of its own
_SHOWN_EVERY = 0.1  # seconds: a slow model decodes fewer at once, so that text appears as it is made
_SEEDS = 1 << 63
_NO_TOKEN = -1  # drawn where the scores are not finite


@dataclasses.dataclass(frozen=True)
class Generation:
    """The result of `generate`: tokens, and how long they took.

    Attributes:
      tokens: new tokens of each prompt, without the stop token.
      prompt_tokens: number of tokens of each prompt.
      compile_seconds: time that XLA compiled, before the first prompt was read.
      prefill_seconds: time to read the prompts.
      first_token_seconds: time to the first token, without compilation.
      decode_tokens_per_second: tokens per second after the first, all prompts together (nan if there were none).
      ended: why the text of each prompt ended. "stop": a stop token, or ``stop_when`` returned True. "length": after
        ``max_new_tokens``. "context": the model's context was full; with several prompts, the context of the longest.
    """

    tokens: list[list[int]]
    prompt_tokens: list[int]
    compile_seconds: float
    prefill_seconds: float
    first_token_seconds: float
    decode_tokens_per_second: float
    ended: list[str]


def _forward(
    params: ReadyDecoder, cache: Cache, tokens: jax.Array, padding: jax.Array, start: jax.Array
) -> tuple[jax.Array, Cache]:
    """Logits of the last position, f32 [batch, vocab], and the cache with all positions."""
    config = params.config
    where = positions(config, tokens.shape[1], padding, start)
    residual, cache = run_parts(params, embed(config, params.outer, tokens, where), cache, where)
    return logits(config, params.outer, residual[:, -1]), cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Rest:
    """What stays the same while a prompt is continued.

    Attributes:
      padding: int32 [batch], left-padding tokens.
      key: of the random draws.
      stops: int32 [n], tokens that end a text.
      draw: how tokens are drawn.
    """

    padding: jax.Array
    key: jax.Array
    stops: jax.Array
    draw: Draw


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Progress:
    """How far a text has come.

    Attributes:
      tokens: int32 [batch, n], what the next step reads: the prompt, or the last token drawn.
      start: int32, position of the first of them.
      running: bool [batch], whether a row has not met a stop token, nor scores that are not finite.
    """

    tokens: jax.Array
    start: jax.Array
    running: jax.Array


def _step(params: ReadyDecoder, cache: Cache, progress: _Progress, rest: _Rest) -> tuple[Cache, _Progress]:
    """Reads the tokens at hand and draws the next one of each row: `_NO_TOKEN` where its scores are not finite."""
    scores, cache = _forward(params, cache, progress.tokens, rest.padding, progress.start)
    drawn = sample(scores, jax.random.fold_in(rest.key, progress.start), rest.draw)
    drawn = jnp.where(jnp.all(jnp.isfinite(scores), axis=-1), drawn, _NO_TOKEN)  # no family masks a token's score
    running = progress.running & (drawn != _NO_TOKEN) & ~jnp.isin(drawn, rest.stops)
    return cache, _Progress(drawn[:, None], progress.start + progress.tokens.shape[1], running)


_prefill = jax.jit(_step, donate_argnames="cache")


@partial(jax.jit, donate_argnames="cache")
def _decode(
    params: ReadyDecoder, cache: Cache, progress: _Progress, rest: _Rest, count: jax.Array
) -> tuple[Cache, _Progress, jax.Array, jax.Array]:
    """Up to `count` steps, fewer if no row is running any more.

    Returns:
      The cache, where the text stands, int32 [batch, _AT_ONCE] with the tokens drawn in its
      first columns, and how many columns these are.
    """

    def going_on(carry: Any) -> jax.Array:
        done, _, _, progress = carry
        return (done < count) & jnp.any(progress.running)

    def step(carry: Any) -> Any:
        done, made, cache, progress = carry
        cache, progress = _step(params, cache, progress, rest)
        return done + 1, jax.lax.dynamic_update_slice_in_dim(made, progress.tokens, done, axis=1), cache, progress

    made = jnp.zeros((progress.running.shape[0], _AT_ONCE), jnp.int32)
    done, made, cache, progress = jax.lax.while_loop(going_on, step, (jnp.int32(0), made, cache, progress))
    return cache, progress, made, done


# The same on all devices of a mesh, for `ReadyShards`.
_prefill_shared = jax.jit(with_cache(_step), donate_argnums=1)
_decode_shared = jax.jit(with_cache(_decode), donate_argnums=1)


class Generator:
    """A model that is ready to generate, with the programs compiled so far.

    Use it to generate text more than once: it prepares the weights once, and prompts of similar length share
    compiled programs.

    Args:
      params: the model, dense or quantized, or already prepared by `make_ready`; or a model on several devices, made
        by `shard` or by `load` with a mesh.
      mesh: devices that share the model, along the axis ``model``; as `shard`. None for one device, or for those of
        ``params``. With several processes, all must make the same calls.
      int8_activations: as in `prepare`.

    Attributes:
      config: the model's `DecoderConfig`.

    Raises:
      SpQRError: ``int8_activations`` is set and the native CPU kernels are not available; or as `shard`.

    Example:
      >>> generator = spqr_jax.Generator(model)
      >>> first = generator([[1, 5, 9]], max_new_tokens=4)
      >>> second = generator([[1, 5, 9]], max_new_tokens=4)  # compiles nothing
      >>> first.tokens == second.tokens
      True
    """

    def __init__(
        self,
        params: Decoder | ReadyDecoder | ShardedDecoder,
        *,
        mesh: jax.sharding.Mesh | None = None,
        int8_activations: bool = False,
    ) -> None:
        self.config = params.config
        if mesh is not None:
            if not isinstance(params, Decoder):
                raise SpQRError("mesh needs a model that is not prepared nor on several devices already")
            params = shard(params, mesh)
        self._params = ready_anywhere(params, int8_activations=int8_activations)
        self._programs: dict[Any, Any] = {}

    @property
    def weight_bytes(self) -> int:
        """Bytes of the prepared weights."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self._params))

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int = 128,
        sampling: Sampling = Sampling(),
        seed: int = 0,
        stop_tokens: Iterable[int] | None = None,
        stop_when: Callable[[list[int]], bool] | None = None,
        on_token: Callable[[int, int], None] | None = None,
    ) -> Generation:
        """Continues prompts. Arguments, result and errors are those of `generate`."""
        config = self.config
        lengths = checked_prompts(prompts, config, max_new_tokens)
        if not -_SEEDS <= seed < _SEEDS:
            raise DataError(f"seed must be a 64-bit number, got {seed}")
        stops = frozenset(config.eos_token_ids if stop_tokens is None else stop_tokens)
        steps = min(max_new_tokens, config.max_positions - max(lengths))
        width = min(_bucket(max(lengths)), config.max_positions - steps)
        padding = np.array([width - n for n in lengths], np.int32)
        tokens = np.zeros((len(prompts), width), np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, padding[row] :] = prompt

        begun = time.perf_counter()
        cache = empty_cache_of(self._params, len(prompts), _bucket(width + steps))
        ends = jnp.array(sorted(stops) or [-1], jnp.int32)
        rest = _Rest(jnp.asarray(padding), jax.random.key(seed), ends, sampling.draw(config.vocab_size))
        progress = _Progress(jnp.asarray(tokens), jnp.int32(0), jnp.ones(len(prompts), bool))
        rest, progress = copied_for(self._params, (rest, progress))
        prefill = self._program(_prefill, _prefill_shared, cache, progress, rest)
        last = dataclasses.replace(progress, tokens=jnp.zeros((len(prompts), 1), jnp.int32))
        last, count = copied_for(self._params, (last, jnp.int32(1)))
        decode = self._program(_decode, _decode_shared, cache, last, rest, count)
        compile_seconds = time.perf_counter() - begun

        begun = time.perf_counter()
        cache, progress = prefill(self._params, cache, progress, rest)
        text = _Text(prompts, stops, stop_when, on_token, self._not_finite)
        text.begin(progress.tokens)
        first_token_seconds = time.perf_counter() - begun
        begun = time.perf_counter()
        self._decode_into(text, decode, cache, progress, rest, steps - 1)
        seconds = time.perf_counter() - begun
        return Generation(
            tokens=text.rows,
            prompt_tokens=lengths,
            compile_seconds=compile_seconds,
            prefill_seconds=first_token_seconds,
            first_token_seconds=first_token_seconds,
            decode_tokens_per_second=text.decoded / seconds if text.decoded else float("nan"),
            ended=text.ended("length" if steps == max_new_tokens else "context"),
        )

    def _not_finite(self, row: int, tokens: Sequence[int]) -> SpQRError:
        """The error of a row whose next token cannot be drawn, after `tokens`."""
        result = f"the next token of prompt {row}"
        if isinstance(self._params, ReadyShards):
            return NotFiniteError(f"{result} is not a number: generate on one device to be told where this begins")
        return not_finite(result, _ReadOnce(self._params), np.asarray([tokens], np.int32))

    def _decode_into(
        self, text: _Text, decode: Any, cache: Cache, progress: _Progress, rest: _Rest, steps: int
    ) -> None:
        """Adds the tokens of up to `steps` steps. A call is begun before the last one's tokens are looked at."""
        begun, ordered, count = time.perf_counter(), 0, 1
        coming: list[tuple[jax.Array, jax.Array]] = []
        while (ordered < steps or coming) and text.running:
            if ordered < steps:
                count = min(count, steps - ordered)
                limit = copied_for(self._params, jnp.int32(count))
                cache, progress, made, done = decode(self._params, cache, progress, rest, limit)
                coming.append((made, done))
                ordered += count
            if len(coming) > 1 or ordered >= steps:
                made, done = coming.pop(0)
                text.add(np.asarray(made)[:, : int(done)])
                step_seconds = (time.perf_counter() - begun) / text.steps
                count = max(1, min(_AT_ONCE, int(_SHOWN_EVERY / step_seconds)))
                if jax.process_count() > 1:  # processes measure different times, but must order the same steps
                    count = _AT_ONCE

    def _program(self, alone: Any, shared: Any, cache: Cache, progress: _Progress, *rest: Any) -> Any:
        """A compiled function for arguments of these shapes, apart from its timing; `shared` on several devices."""
        function = shared if isinstance(self._params, ReadyShards) else alone
        leaves, tree = jax.tree.flatten((cache[0], progress, rest))
        key = (function, tree, *(leaf.shape for leaf in leaves))
        if key not in self._programs:
            self._programs[key] = compile_as_graph(function.lower(self._params, cache, progress, *rest))
        return self._programs[key]


class _ReadOnce:
    """A prepared model as a source of blocks, whose blocks are read once, in order."""

    def __init__(self, params: ReadyDecoder) -> None:
        self.config, self._outer, self._blocks = params.config, params.outer, iter(params.layers)

    def outer(self) -> Outer:
        return self._outer

    def block(self, index: int) -> Block:
        return next(self._blocks)


class _Text:
    """Tokens made so far, row by row.

    Args:
      prompts: what is continued.
      stops: tokens that end a row.
      stop_when, on_token: as in `generate`.
      not_finite: makes the error of a row (its index, and its tokens so far) that has no next token.

    Attributes:
      rows: new tokens of each prompt, without the stop token.
      running: rows that met no stop token.
      steps: made after the first token.
      decoded: tokens in these, of rows that were running.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        stops: frozenset[int],
        stop_when: Callable[[list[int]], bool] | None,
        on_token: Callable[[int, int], None] | None,
        not_finite: Callable[[int, Sequence[int]], SpQRError],
    ) -> None:
        self._prompts, self._not_finite = prompts, not_finite
        self._stops, self._stop_when, self._on_token = stops, stop_when, on_token
        self.rows: list[list[int]] = [[] for _ in prompts]
        self.running = set(range(len(prompts)))
        self.steps = self.decoded = 0

    def begin(self, first: jax.Array) -> None:
        """Takes the first token of each row, [batch, 1]; only what comes after it is timed."""
        self.add(np.asarray(first))
        self.steps = self.decoded = 0

    def add(self, made: np.ndarray) -> None:
        """Takes what was drawn in some steps, [batch, steps]."""
        for drawn in made.T:
            self.steps += 1
            self.decoded += len(self.running)
            for row in sorted(self.running):
                self._add_token(row, int(drawn[row]))

    def ended(self, otherwise: str) -> list[str]:
        """Why each row ended; `otherwise` for those that still run."""
        return [otherwise if row in self.running else "stop" for row in range(len(self.rows))]

    def _add_token(self, row: int, token: int) -> None:
        if token == _NO_TOKEN:
            raise self._not_finite(row, [*self._prompts[row], *self.rows[row]])
        if token in self._stops:
            self.running.discard(row)
            return
        self.rows[row].append(token)
        if self._on_token is not None:
            self._on_token(row, token)
        if self._stop_when is not None and self._stop_when(self.rows[row]):
            self.running.discard(row)


def _bucket(length: int) -> int:
    """Lengths are rounded up, so that few of them are compiled: to 64 up to 256, to 256 above."""
    return round_up(length, 64 if length <= 256 else 256)


def generate(params: Decoder | ShardedDecoder, prompts: Sequence[Sequence[int]], **options: Any) -> Generation:
    """Continues prompts.

    To generate more than once with a model, use a `Generator`: it compiles less.

    Args:
      params: the model, dense or quantized; or a model on several devices, see `shard`.
      prompts: token ids of each prompt; lengths may differ.
      max_new_tokens (int): most new tokens of each prompt, 128 by default. Fewer if the model's context ends.
      sampling (Sampling): how tokens are chosen; greedy by default.
      seed (int): seed of the random draws, 0 by default. The same seed gives the same text.
      stop_tokens (Iterable[int] | None): tokens that end a text; by default those of the model.
      stop_when (Callable[[list[int]], bool] | None): called after each token with the new tokens of its prompt;
        True ends the text.
      on_token (Callable[[int, int], None] | None): called with (prompt index, token) for each new token.

    Returns:
      The new tokens of each prompt, and timings.

    Raises:
      DataError: no prompt, an empty prompt, a prompt that fills the model's context, token ids outside the
        vocabulary, or a seed of more than 64 bits.
      NotFiniteError: the logits of a next token are not finite. The message says where in the model this begins.

    Example:
      >>> prompt = [1, 5, 9]  # tokenizer("Once upon a time")["input_ids"]
      >>> sampling = spqr_jax.Sampling(temperature=0.8)
      >>> out = spqr_jax.generate(model, [prompt], max_new_tokens=4, sampling=sampling)
      >>> len(out.tokens[0]) <= 4
      True
    """
    return Generator(params)(prompts, **options)
