"""Text generation: prefill, then one jitted decode step with a donated KV cache."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spqr_jax.errors import DataError
from spqr_jax.layout import round_up
from spqr_jax.linear import prepare
from spqr_jax.models.attention import KVCache, positions
from spqr_jax.models.config import DecoderConfig
from spqr_jax.models.decoder import Decoder, State, embed, logits, run_block
from spqr_jax.sampling import Sampling, sample

Cache = tuple[KVCache, ...]


@dataclasses.dataclass(frozen=True)
class Generation:
    """Result of :func:`generate`.

    Attributes:
      tokens: new tokens of each prompt, its stop token left out.
      prompt_tokens: tokens of each prompt.
      compile_seconds: spent by XLA before the first prompt was read.
      prefill_seconds: reading the prompts.
      first_token_seconds: until the first token, without compilation.
      decode_tokens_per_second: tokens a second after the first, all prompts
        together (nan if there were none).
    """

    tokens: list[list[int]]
    prompt_tokens: list[int]
    compile_seconds: float
    prefill_seconds: float
    first_token_seconds: float
    decode_tokens_per_second: float


def empty_cache(config: DecoderConfig, batch: int, length: int, dtype: Any) -> Cache:
    """A cache of `length` positions for every block."""
    shape = (batch, config.num_kv_heads, length, config.head_dim)
    return tuple(KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.num_layers))


def _forward(
    params: Decoder, cache: Cache, tokens: jax.Array, padding: jax.Array, start: jax.Array
) -> tuple[jax.Array, Cache]:
    """Logits of the last position, f32 [batch, vocab], and the cache with all positions."""
    config = params.config
    where = positions(config, tokens.shape[1], padding, start)
    residual, filled = embed(params.outer, tokens), []
    for block, block_cache in zip(params.layers, cache, strict=True):
        state = run_block(config, block, State(residual, None, block_cache), where)
        assert state.cache is not None
        residual = state.residual
        filled.append(state.cache)
    return logits(config, params.outer, residual[:, -1]), tuple(filled)


@partial(jax.jit, static_argnames="sampling", donate_argnames="cache")
def _step(
    params: Decoder,
    cache: Cache,
    tokens: jax.Array,
    padding: jax.Array,
    start: jax.Array,
    key: jax.Array,
    sampling: Sampling,
) -> tuple[jax.Array, Cache, jax.Array]:
    """Reads `tokens` [batch, n] at positions start.. and draws the next token of each row.

    Returns:
      The tokens [batch, 1], the cache, and where the next step starts: what it is called with.
    """
    scores, cache = _forward(params, cache, tokens, padding, start)
    drawn = sample(scores, jax.random.fold_in(key, start), sampling)
    return drawn[:, None], cache, start + tokens.shape[1]


class Generator:
    """A model made ready to generate, with the programs compiled so far.

    Use it where text is generated more than once: weights are prepared once, and
    prompts of similar length share compiled programs.

    Args:
      params: the model, dense or quantized.
      int8_activations: as in `prepare`.
    """

    def __init__(self, params: Decoder, *, int8_activations: bool = False) -> None:
        self.config = params.config
        self._params = prepare(params, int8_activations=int8_activations)
        self._programs: dict[Any, Any] = {}

    @property
    def weight_bytes(self) -> int:
        """Bytes that the prepared weights take."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self._params))

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int = 128,
        sampling: Sampling = Sampling(),
        seed: int = 0,
        stop_tokens: Iterable[int] | None = None,
        on_token: Callable[[int, int], None] | None = None,
    ) -> Generation:
        """Continues prompts; arguments, result and errors as :func:`generate`."""
        config = self.config
        lengths = _checked_prompts(prompts, config, max_new_tokens)
        stops = frozenset(config.eos_token_ids if stop_tokens is None else stop_tokens)
        steps = min(max_new_tokens, config.max_positions - max(lengths))
        width = min(_bucket(max(lengths)), config.max_positions - steps)
        padding = np.array([width - n for n in lengths], np.int32)
        tokens = np.zeros((len(prompts), width), np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, padding[row] :] = prompt

        begun = time.perf_counter()
        length = _bucket(width + steps)
        cache = empty_cache(config, len(prompts), length, self._params.outer.final_norm.dtype)
        rest = (jnp.asarray(padding), jnp.int32(0), jax.random.key(seed))
        prefill = self._program(cache, jnp.asarray(tokens), rest, sampling)
        decode = self._program(cache, jnp.zeros((len(prompts), 1), jnp.int32), rest, sampling)
        compile_seconds = time.perf_counter() - begun

        begun = time.perf_counter()
        drawn, cache, start = prefill(self._params, cache, jnp.asarray(tokens), *rest)
        jax.block_until_ready(drawn)
        first_token_seconds = time.perf_counter() - begun
        made: list[list[int]] = [[] for _ in prompts]
        running = set(range(len(prompts)))
        begun, decoded = time.perf_counter(), 0
        for step in range(steps):
            current = drawn
            if step + 1 < steps:  # begun before the last one's tokens are looked at, so that none waits for Python
                drawn, cache, start = decode(self._params, cache, current, rest[0], start, rest[2])
            decoded += len(running) if step else 0
            running = _take(np.asarray(current)[:, 0], made, running, stops, on_token)
            if not running:
                break
        seconds = time.perf_counter() - begun
        return Generation(
            tokens=made,
            prompt_tokens=lengths,
            compile_seconds=compile_seconds,
            prefill_seconds=first_token_seconds,
            first_token_seconds=first_token_seconds,
            decode_tokens_per_second=decoded / seconds if decoded else float("nan"),
        )

    def _program(self, cache: Cache, tokens: jax.Array, rest: tuple[jax.Array, ...], sampling: Sampling) -> Any:
        """The compiled step for arguments of these shapes, apart from their timing."""
        key = (tokens.shape, cache[0].keys.shape, sampling)
        if key not in self._programs:
            self._programs[key] = _step.lower(self._params, cache, tokens, *rest, sampling=sampling).compile()
        return self._programs[key]


def _bucket(length: int) -> int:
    """Lengths are rounded up, so that few of them are compiled: to 64 up to 256, to 256 above."""
    return round_up(length, 64 if length <= 256 else 256)


def generate(params: Decoder, prompts: Sequence[Sequence[int]], **options: Any) -> Generation:
    """Continues prompts.

    Args:
      params: the model, dense or quantized.
      prompts: token ids, of different lengths if need be.
      max_new_tokens: at most this many each (128); fewer where the model's context ends.
      sampling: a `Sampling`; greedy by default.
      seed: of the random draws (0); the same seed gives the same text.
      stop_tokens: end a prompt's text; the model's own by default.
      on_token: called with (prompt index, token) as tokens are made.

    Raises:
      DataError: no prompt, an empty one, one that fills the model's context, or
        ids outside the vocabulary.
    """
    return Generator(params)(prompts, **options)


def _take(
    drawn: np.ndarray,
    made: list[list[int]],
    running: set[int],
    stops: frozenset[int],
    on_token: Callable[[int, int], None] | None,
) -> set[int]:
    """Appends each running prompt's token; returns those that go on."""
    going_on = set()
    for row in sorted(running):
        token = int(drawn[row])
        if token in stops:
            continue
        made[row].append(token)
        going_on.add(row)
        if on_token is not None:
            on_token(row, token)
    return going_on


def _checked_prompts(prompts: Sequence[Sequence[int]], config: DecoderConfig, max_new_tokens: int) -> list[int]:
    lengths = [len(prompt) for prompt in prompts]
    if not lengths or min(lengths) == 0:
        raise DataError(f"expected at least one prompt and one token in each, got lengths {lengths}")
    if max_new_tokens < 1:
        raise DataError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if max(lengths) >= config.max_positions:
        raise DataError(
            f"a prompt of {max(lengths)} tokens leaves no room in the model's context of {config.max_positions}"
        )
    ids = [token for prompt in prompts for token in prompt]
    if min(ids) < 0 or max(ids) >= config.vocab_size:
        raise DataError(
            f"prompt token ids reach from {min(ids)} to {max(ids)}, but the vocabulary has {config.vocab_size}"
        )
    return lengths
