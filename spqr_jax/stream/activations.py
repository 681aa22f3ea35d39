"""Activations through a model's blocks, and the Hessians of what each matrix reads.

A stage is run twice per chunk of calibration text: once with a `linear` that
records its inputs (everything behind them is dead code, which XLA removes), and
once for real, with weights already quantized. Together that is one forward pass
of the block plus the Hessians.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spqr_jax.errors import DataError
from spqr_jax.models.attention import Positions, positions
from spqr_jax.models.config import BlockKind, DecoderConfig
from spqr_jax.models.decoder import (
    STAGES,
    Block,
    Linear,
    Outer,
    State,
    embed,
    logits,
    plain_linear,
)
from spqr_jax.models.weights import abstract_block
from spqr_jax.product_jit import product_jit
from spqr_jax.solver import Hessian, accumulate_hessian, cross_gram, empty_hessian


class InputRecorder:
    """A `linear` that notes what each weight is given and returns zeros.

    Weights that are given the very same array share a Hessian: `groups` holds
    their names together, `inputs` the array once.
    """

    def __init__(self) -> None:
        self.groups: list[list[str]] = []
        self.inputs: list[jax.Array] = []

    def __call__(self, name: str, w: Any, x: jax.Array) -> jax.Array:
        for names, seen in zip(self.groups, self.inputs, strict=True):
            if seen is x:
                names.append(name)
                break
        else:
            self.groups.append([name])
            self.inputs.append(x)
        return jnp.zeros((*x.shape[:-1], w.shape[0]), x.dtype)


@lru_cache(maxsize=64)
def stage_groups(config: DecoderConfig, kind: BlockKind, stage: int) -> tuple[tuple[tuple[str, ...], int], ...]:
    """Names of a stage's weights that read one input, and that input's width, in a block of this kind."""
    recorder = InputRecorder()

    def trace(block: Block) -> None:
        tokens = jnp.zeros((1, 2), jnp.int32)
        where = positions(config, 2, jnp.zeros(1, jnp.int32), jnp.int32(0))
        state = State(jnp.zeros((*tokens.shape, config.hidden_size)))
        for index, run in enumerate(STAGES):
            state = run(config, block, state, where, recorder if index == stage else plain_linear)

    jax.eval_shape(trace, abstract_block(config, kind))
    return tuple((tuple(names), x.shape[-1]) for names, x in zip(recorder.groups, recorder.inputs, strict=True))


@product_jit(static_argnums=(0, 1), donate_argnums=5)
def _accumulate_stage(
    config: DecoderConfig, stage: int, block: Block, state: State, where: Positions, hessians: tuple[Hessian, ...]
) -> tuple[Hessian, ...]:
    recorder = InputRecorder()
    STAGES[stage](config, block, state, where, recorder)
    return tuple(accumulate_hessian(h, x) for h, x in zip(hessians, recorder.inputs, strict=True))


def rounded_linear(name: str, w: Any, x: jax.Array) -> jax.Array:
    """A `linear` that rounds its factors to bfloat16 and sums in float32.

    A processor with instructions for it is twice as fast. What a weight reads is then off by
    less than 1%, at random; quantized weights before it change it by more.
    """
    return _rounded_product(jnp.asarray(w), x)


def _rounded(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
    """Sum of products of bfloat16 factors over one axis each, in float32."""
    a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    return lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())), preferred_element_type=jnp.float32)


@jax.custom_vjp
def _rounded_product(w: jax.Array, x: jax.Array) -> jax.Array:
    return _rounded(x, w, x.ndim - 1, 1).astype(x.dtype)


def _rounded_product_back(given: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The gradient by x is rounded alike; that by w, whose sum over tokens is no faster rounded, is not."""
    w, x = given
    by_w = jnp.matmul(g.reshape(-1, g.shape[-1]).T, x.reshape(-1, x.shape[-1]))
    return by_w.astype(w.dtype), _rounded(g, w, g.ndim - 1, 0).astype(x.dtype)


_rounded_product.defvjp(lambda w, x: (_rounded_product(w, x), (w, x)), _rounded_product_back)


@product_jit(static_argnums=(0, 1), donate_argnums=7)
def _accumulate_drift(
    config: DecoderConfig,
    stage: int,
    block: Block,
    original: Block,
    state: State,
    dense_state: State,
    where: Positions,
    sums: tuple[jax.Array, ...],
) -> tuple[jax.Array, ...]:
    drifted, dense = InputRecorder(), InputRecorder()
    STAGES[stage](config, block, state, where, drifted)
    STAGES[stage](config, original, dense_state, where, dense)
    return tuple(total + cross_gram(aim, x) for total, x, aim in zip(sums, drifted.inputs, dense.inputs, strict=True))


@product_jit(static_argnums=(0, 1, 5))
def run_stage(
    config: DecoderConfig, stage: int, block: Block, state: State, where: Positions, linear: Linear = plain_linear
) -> State:
    """One stage of a block on one chunk."""
    return STAGES[stage](config, block, state, where, linear)


@product_jit(static_argnums=0)
def _accumulate_head(config: DecoderConfig, outer: Outer, residual: jax.Array, hessian: Hessian) -> Hessian:
    recorder = InputRecorder()
    logits(config, outer, residual, recorder)
    return accumulate_hessian(hessian, recorder.inputs[0])


class Activations:
    """The calibration text on its way through the blocks, chunk by chunk.

    Args:
      config: of the model.
      outer: its embedding.
      batches: int32 [batch, seq] each, shapes may differ.
      linear: what takes them through the stages, such as `rounded_linear`.

    Raises:
      DataError: no batch, or one that the model cannot take.
    """

    def __init__(
        self, config: DecoderConfig, outer: Outer, batches: Iterable[Any], linear: Linear = plain_linear
    ) -> None:
        self.config, self._linear = config, linear
        self._states: list[State] = []
        self._where: list[Positions] = []
        for batch in batches:
            tokens = _checked_batch(np.asarray(batch), config)
            padding = jnp.zeros(tokens.shape[0], jnp.int32)
            self._where.append(positions(config, tokens.shape[1], padding, jnp.int32(0)))
            self._states.append(State(embed(config, outer, jnp.asarray(tokens), self._where[-1])))
        if not self._states:
            raise DataError(
                "no calibration batches: give at least one int32 [batch, seq] of token ids "
                "(a generator that was already used up is empty)"
            )

    def hessians(self, stage: int, block: Block) -> tuple[Hessian, ...]:
        """One Hessian for each of `stage_groups`, over all chunks."""
        sums = tuple(empty_hessian(width) for _, width in stage_groups(self.config, block.kind, stage))
        for state, where in zip(self._states, self._where, strict=True):
            sums = _accumulate_stage(self.config, stage, block, state, where, sums)
        return sums

    def drifts(
        self, stage: int, block: Block, dense: Activations, original: Block, hessians: Sequence[Hessian]
    ) -> tuple[jax.Array, ...]:
        """How far what the weights read has drifted from what they read in the dense model.

        Args:
          stage: of the block.
          block: with which these activations run.
          dense: the same text's activations in the dense model, at the same stage.
          original: the dense model's block.
          hessians: as `hessians` gave them for this stage.

        Returns:
          (2/n) Σ (x_dense - x) xᵀ, f32 [in, in], for each of `stage_groups`.
        """
        sums = tuple(jnp.zeros_like(hessian.gram) for hessian in hessians)
        for (state, where), (aim, _) in zip(self.chunks(), dense.chunks(), strict=True):
            sums = _accumulate_drift(self.config, stage, block, original, state, aim, where, sums)
        return tuple(2.0 / hessian.tokens * total for hessian, total in zip(hessians, sums, strict=True))

    def advance(self, stage: int, block: Block) -> None:
        """Takes every chunk through a stage."""
        for index, where in enumerate(self._where):
            self._states[index] = run_stage(self.config, stage, block, self._states[index], where, self._linear)

    def chunks(self) -> Iterator[tuple[State, Positions]]:
        """Each chunk's state as it is now, and where its tokens stand."""
        return zip(self._states, self._where, strict=True)

    def head_hessian(self, outer: Outer) -> Hessian:
        """Hessian of what the output head reads, once all blocks are passed."""
        total = empty_hessian(self.config.hidden_size)
        for state in self._states:
            total = _accumulate_head(self.config, outer, state.residual, total)
        return total

    def copy(self) -> Activations:
        """The same place in the model, to go on from twice."""
        twin = object.__new__(Activations)
        twin.config, twin._linear = self.config, self._linear
        twin._states, twin._where = list(self._states), self._where
        return twin


def _checked_batch(tokens: np.ndarray, config: DecoderConfig) -> np.ndarray:
    if tokens.ndim != 2 or not tokens.size or not np.issubdtype(tokens.dtype, np.integer):
        raise DataError(
            f"a calibration batch must be integer token ids [batch, seq], got {tokens.dtype} {tokens.shape}"
        )
    if tokens.shape[1] > config.max_positions:
        raise DataError(
            f"calibration sequences of {tokens.shape[1]} tokens are longer than the model's context of "
            f"{config.max_positions}; use shorter ones (--seqlen)"
        )
    if tokens.min() < 0 or tokens.max() >= config.vocab_size:
        raise DataError(
            f"calibration token ids range from {tokens.min()} to {tokens.max()}, but the model's vocabulary has "
            f"{config.vocab_size} tokens: was the text tokenized for another model?"
        )
    return tokens.astype(np.int32)


def batched(windows: np.ndarray, tokens_per_batch: int = 1024) -> Sequence[np.ndarray]:
    """Cuts windows of text into batches of about ``tokens_per_batch`` tokens.

    Args:
      windows: token ids, int32 [count, length].
      tokens_per_batch: about how many tokens a batch has; a batch has at least one window.

    Returns:
      Batches, int32 [batch, length]. The last may be smaller.

    Example:
      >>> windows = np.zeros((5, 512), np.int32)
      >>> [batch.shape for batch in spqr_jax.batched(windows)]
      [(2, 512), (2, 512), (1, 512)]
    """
    size = max(1, tokens_per_batch // windows.shape[1])
    return [windows[first : first + size] for first in range(0, len(windows), size)]
