"""Activations through a model's blocks, and the Hessians of what each matrix reads."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spqr_jax._compat import give_back_memory
from spqr_jax.errors import DataError
from spqr_jax.models.attention import Positions, positions
from spqr_jax.models.config import DecoderConfig
from spqr_jax.models.decoder import Block, Linear, Outer, State, embed, plain_linear
from spqr_jax.solver import Hessian, empty_hessian
from spqr_jax.stream.chunk_states import ChunkStates
from spqr_jax.stream.spill import Spill
from spqr_jax.stream.stages import (
    EXPERT_HESSIAN_BYTES,
    Part,
    accumulate_drift,
    accumulate_head,
    accumulate_stage,
    run_stage,
    stage_parts,
)
from spqr_jax.stream.sums import KeepSums, PartSums, SumsPlace
from spqr_jax.stream.windows import checked_batch

_CHUNKS_TO_TRIM = 16  # after so many, what they freed is given back
KEPT_BYTES = 3 * 2**27  # of freed memory that a run keeps: new pages each time would take a tenth of its CPU seconds
_INNER_STAGES = (0, 2)  # which leave the residual stream as it is
_MLP = 2  # the stage whose results, what `down_proj` reads, are larger than the residual stream
HELD_BYTES, HELD_SHARE = 2**28, 0.5
"""Of the MLP's results so many bytes are held, or this share of the residual stream's bytes if that is more."""


class Activations:
    """The calibration text on its way through the blocks, chunk by chunk.

    Args:
      config: of the model.
      outer: its embedding.
      batches: int32 [batch, seq] each, shapes may differ.
      linear: what takes them through the stages, such as `rounded_linear`.
      spill: where the activations are kept on disk; None to keep them in memory.
      hessian_bytes: of experts' Hessians that are summed at once. It does not change them.

    Attributes:
      stream_bytes: of the residual stream, all chunks together.

    Raises:
      DataError: no batch, or one that the model cannot take.
    """

    def __init__(
        self,
        config: DecoderConfig,
        outer: Outer,
        batches: Iterable[Any],
        linear: Linear = plain_linear,
        spill: Spill | None = None,
        hessian_bytes: int = EXPERT_HESSIAN_BYTES,
    ) -> None:
        self.config, self._linear, self._hessian_bytes = config, linear, hessian_bytes
        self._states = ChunkStates([] if spill is None else spill.states())
        self._where: list[Positions] = []
        self.stream_bytes = 0
        for tokens in checked_batches(config, batches):
            self._where.append(places(config, tokens))
            residual = embed(config, outer, jnp.asarray(tokens), self._where[-1])
            self._states.append(State(residual))
            self.stream_bytes += residual.nbytes
        self._held_bytes = math.inf if spill is not None else max(HELD_BYTES, HELD_SHARE * self.stream_bytes)

    def hessians(self, stage: int, block: Block) -> tuple[Hessian, ...]:
        """One Hessian for each of `stage_groups`, over all chunks, all at once."""
        return tuple(hessian for _, hessian, _ in self.calibrate(stage, block))

    def calibrate(
        self,
        stage: int,
        block: Block,
        dense: Activations | None = None,
        original: Block | None = None,
        *,
        begin: SumsPlace | None = None,
        keep: KeepSums | None = None,
    ) -> Iterator[tuple[tuple[str, ...], Hessian, jax.Array | None]]:
        """What to know of each input of a stage, over all chunks, in the order of `stage_groups`.

        Hessians are held for one `Part` of the stage at a time.

        Args:
          stage: of the block.
          block: with which these activations run.
          dense: the same text's activations in the dense model, at the same stage; None for no drift.
          original: the dense model's block.
          begin: where an earlier run was. If it is in this stage, parts before it are passed over, and its sums go on.
          keep: is given the place after each chunk, and after each input once the caller asks for the next one.

        Yields:
          The names of the weights that read the input, its Hessian, and its drift as `drifts` gives it.
        """
        states, beside = self._states.copy(), None if dense is None else dense._states.copy()
        parts = stage_parts(self.config, block.kind, stage, self._hessian_bytes)
        first = begin.part if begin is not None and begin.stage == stage else 0
        for number, part in enumerate(parts[first:], first):
            sums = PartSums(stage, number, begin, keep)
            hessians = self._hessian_sums(stage, block, states, part, sums)
            drifts: Iterator[jax.Array | None] = itertools.repeat(None)
            if beside is not None and original is not None:
                drifts = part.split(self._drift_sums(stage, block, states, beside, original, part, sums))
            groups = zip(part.groups, part.split(hessians), drifts, strict=False)
            for index, ((names, _), hessian, total) in enumerate(groups, 1):
                yield names, hessian, None if total is None else _mean_drift(hessian, total)
                sums.keep(is_last=index == len(part.groups))

    def _hessian_sums(
        self, stage: int, block: Block, states: ChunkStates, part: Part, sums: PartSums
    ) -> tuple[Hessian, ...]:
        def add(chunk: int, hessians: tuple[Hessian, ...]) -> tuple[Hessian, ...]:
            state, where = states[chunk], self._where[chunk]
            if states.is_postponed(chunk):  # else many states would be made before the first ones are used up
                jax.block_until_ready(hessians)
                self._trim(chunk)
            return accumulate_stage(self.config, stage, block, state, where, hessians, part.experts, self._linear)

        return sums.total(part.empty_sums(), len(states), add)

    def _drift_sums(
        self,
        stage: int,
        block: Block,
        states: ChunkStates,
        dense: ChunkStates,
        original: Block,
        part: Part,
        sums: PartSums,
    ) -> tuple[jax.Array, ...]:
        def add(chunk: int, drifts: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            state, aim, where = states[chunk], dense[chunk], self._where[chunk]
            return accumulate_drift(self.config, stage, block, original, state, aim, where, drifts, part.experts)

        return sums.total(tuple(hessian.gram for hessian in part.empty_sums()), len(states), add)

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
        drifts: list[jax.Array] = []
        for number, part in enumerate(stage_parts(self.config, block.kind, stage, self._hessian_bytes)):
            sums = PartSums(stage, number)
            drifts += part.split(self._drift_sums(stage, block, self._states, dense._states, original, part, sums))
        return tuple(map(_mean_drift, hessians, drifts))

    def advance(self, stage: int, block: Block) -> None:
        """Takes every chunk through a stage.

        Of what the MLP hands to its last weight, the largest activations of a block, so much is held as takes half the
        residual stream's memory, or 256 MiB. The others are made twice: for the Hessian, and for the next stage.
        """
        held, before = 0, None
        for index, where in enumerate(self._where):
            step = partial(_through, self.config, self._linear, stage, block, where)  # refers to no text
            if stage == _MLP and held > self._held_bytes:
                self._states.postpone(index, step)
                continue
            state = step(self._states[index])
            jax.block_until_ready(before)  # only one chunk is asked for ahead: it needs memory
            self._states[index] = before = state
            held += 0 if state.inner is None else state.inner.nbytes
            self._trim(index)
        give_back_memory(KEPT_BYTES)  # between arrays in use there is room of sizes that the next arrays do not have

    def _trim(self, chunk: int) -> None:
        if chunk % _CHUNKS_TO_TRIM == 0:
            give_back_memory(KEPT_BYTES)

    def chunks(self) -> Iterator[tuple[State, Positions]]:
        """Each chunk's state as it is now, and where its tokens stand."""
        return zip(self._states, self._where, strict=True)

    def head_hessian(self, outer: Outer, *, begin: SumsPlace | None = None, keep: KeepSums | None = None) -> Hessian:
        """Hessian of what the output head reads, once all blocks are passed; `begin` and `keep` as in `calibrate`."""

        def add(chunk: int, hessian: Hessian) -> Hessian:
            return accumulate_head(self.config, outer, self._states[chunk].residual, hessian)

        return PartSums(0, 0, begin, keep).total(empty_hessian(self.config.hidden_size), len(self._states), add)

    def residuals(self) -> list[np.ndarray]:
        """The residual stream of each chunk between two blocks, [batch, tokens, hidden], to be restored one day."""
        return [np.asarray(state.residual) for state, _ in self.chunks()]

    def restore(self, residuals: Sequence[np.ndarray]) -> None:
        """Goes to the place between two blocks where `residuals` were taken from the same text."""
        for index, residual in enumerate(residuals):
            self._states[index] = State(jax.device_put(residual))

    def drop(self) -> None:
        """Lets go of the text, once nothing reads it or saves it any more."""
        del self._states

    def copy(self) -> Activations:
        """The same place in the model, to go on from twice."""
        twin = object.__new__(Activations)
        twin.config, twin._linear, twin._hessian_bytes = self.config, self._linear, self._hessian_bytes
        twin._states, twin._where = self._states.copy(), self._where
        twin.stream_bytes, twin._held_bytes = self.stream_bytes, self._held_bytes
        return twin


def _through(config: DecoderConfig, linear: Linear, stage: int, block: Block, where: Positions, state: State) -> State:
    after = run_stage(config, stage, block, state, where, linear)
    if stage in _INNER_STAGES:
        # The program returns a copy. Arrays of two sizes, freed in turn, would fragment the memory.
        after = dataclasses.replace(after, residual=state.residual)
    return after


def _mean_drift(hessian: Hessian, total: jax.Array) -> jax.Array:
    """2/n times a sum over n tokens; an expert may have none."""
    return 2.0 / jnp.maximum(hessian.tokens, 1.0) * total


def checked_batches(config: DecoderConfig, batches: Iterable[Any]) -> list[np.ndarray]:
    """Batches of token ids that the model can take, at least one; raises `DataError`."""
    checked = [checked_batch(np.asarray(batch), config) for batch in batches]
    if not checked:
        raise DataError(
            "no calibration batches: give at least one int32 [batch, seq] of token ids "
            "(a generator that was already used up is empty)"
        )
    return checked


def places(config: DecoderConfig, tokens: np.ndarray) -> Positions:
    """Where the tokens [batch, seq] of whole texts stand."""
    return positions(config, tokens.shape[1], jnp.zeros(tokens.shape[0], jnp.int32), jnp.int32(0))
