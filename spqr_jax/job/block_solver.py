"""Quantizes the weights of one block: the ways to take the text through it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Protocol

import jax.numpy as jnp
import numpy as np

from spqr_jax.array import SpQRArray
from spqr_jax.job.group_solver import GroupSolver
from spqr_jax.models.config import DecoderConfig
from spqr_jax.models.decoder import STAGES, Block, matrix_names
from spqr_jax.stream.activations import Activations
from spqr_jax.stream.sums import SumsPlace


@dataclasses.dataclass(frozen=True)
class BlockPlace:
    """Where the work on a block is; inside the output head's, only the sums count.

    Attributes:
      sums: of the Hessians that come next.
      solved: the block's weights that are quantized, by name.
      starved: experts so far that few tokens reached, and how many.
    """

    sums: SumsPlace
    solved: Mapping[str, SpQRArray] = dataclasses.field(default_factory=dict)
    starved: Mapping[str, int] = dataclasses.field(default_factory=dict)


KeepPlace = Callable[[BlockPlace], None]
"""Is given each place inside a block that a run can go on from; see `KeepSums`."""


class BlockSolver(Protocol):
    """Quantizes the weights of one block after the other."""

    def solve(
        self,
        activations: Activations | None,
        block: Block,
        prefix: str,
        last: bool,
        begin: BlockPlace | None = None,
        keep: KeepPlace | None = None,
    ) -> Block:
        """Quantizes a block, and takes the text through it.

        Args:
          activations: the text before the block; afterwards behind it, unless `last`. None without calibration.
          block: its dense weights.
          prefix: of its weights' paths, such as ``layers.3.``.
          last: nothing reads the text behind this block.
          begin: where an earlier run was inside this block; None to begin with it. The result has the same bits.
          keep: is given places inside the block; a solver that has none never calls it.

        Returns:
          The block with a `SpQRArray` for each weight that the configuration does not skip.
        """
        ...

    def replay(self, activations: Activations | None, original: Block, finished: Block) -> None:
        """Takes the text through a block that an earlier run has finished, exactly as `solve` did.

        Args:
          activations: the text before the block; afterwards behind it.
          original: the dense block.
          finished: what `solve` made of it.
        """
        ...

    @property
    def streams(self) -> tuple[Activations, ...] | None:
        """Other activations that `solve` takes along, to be saved with the text's; None where there is more to it."""
        ...


class Uncalibrated:
    """Rounds to nearest: no text is needed."""

    def __init__(self, weights: GroupSolver, model: DecoderConfig) -> None:
        self._weights, self._model = weights, model

    def solve(
        self,
        activations: Activations | None,
        block: Block,
        prefix: str,
        last: bool,
        begin: BlockPlace | None = None,
        keep: KeepPlace | None = None,
    ) -> Block:
        return self._weights.solve(block, matrix_names(self._model, block.kind), prefix, None)[0]

    def replay(self, activations: Activations | None, original: Block, finished: Block) -> None:
        """There is no text."""

    @property
    def streams(self) -> tuple[Activations, ...]:
        return ()


class Sequential:
    """Each stage sees activations that have passed the block's earlier, quantized stages.

    Args:
      weights: quantizes weights that read one input.
      dense: the same text on its way through the dense model, to correct drift; None for no correction.
    """

    def __init__(self, weights: GroupSolver, dense: Activations | None = None) -> None:
        self._weights, self._dense = weights, dense

    def solve(
        self,
        activations: Activations | None,
        block: Block,
        prefix: str,
        last: bool,
        begin: BlockPlace | None = None,
        keep: KeepPlace | None = None,
    ) -> Block:
        assert activations is not None
        work = _BlockWork(block, prefix, self._weights, begin, keep)
        for stage in range(len(STAGES)):
            work.solve_stage(stage, activations, work.dense, self._dense)
            if not (last and stage + 1 == len(STAGES)):
                activations.advance(stage, work.dense)
                if self._dense is not None:
                    self._dense.advance(stage, block)
        self._weights.warn_of_starved(prefix)
        return work.quantized

    def replay(self, activations: Activations | None, original: Block, finished: Block) -> None:
        advance_as_stored(activations, original, finished, self._weights.by_columns)
        if self._dense is not None:
            for stage in range(len(STAGES)):
                self._dense.advance(stage, original)

    @property
    def streams(self) -> tuple[Activations, ...]:
        return () if self._dense is None else (self._dense,)


class Parallel:
    """All of the block's weights see activations of the dense block."""

    def __init__(self, weights: GroupSolver) -> None:
        self._weights = weights

    def solve(
        self,
        activations: Activations | None,
        block: Block,
        prefix: str,
        last: bool,
        begin: BlockPlace | None = None,
        keep: KeepPlace | None = None,
    ) -> Block:
        assert activations is not None
        work = _BlockWork(block, prefix, self._weights, begin, keep)
        ahead = activations.copy()
        for stage in range(len(STAGES)):
            work.solve_stage(stage, ahead, block)
            if stage + 1 < len(STAGES):
                ahead.advance(stage, block)
        if not last:
            for stage in range(len(STAGES)):
                activations.advance(stage, work.dense)
        self._weights.warn_of_starved(prefix)
        return work.quantized

    def replay(self, activations: Activations | None, original: Block, finished: Block) -> None:
        advance_as_stored(activations, original, finished, self._weights.by_columns)

    @property
    def streams(self) -> tuple[Activations, ...]:
        return ()


class _BlockWork:
    """A block on its way, stage by stage.

    Attributes:
      quantized: the block with a `SpQRArray` for each weight that is solved.
      dense: the same with what these weights dequantize to.
    """

    def __init__(
        self, block: Block, prefix: str, weights: GroupSolver, begin: BlockPlace | None, keep: KeepPlace | None
    ) -> None:
        self._original, self._prefix, self._weights, self._keep = block, prefix, weights, keep
        self.quantized = self.dense = block
        self._begin: SumsPlace | None = None
        if begin is not None:
            self._begin = begin.sums
            self.quantized = block.replace(begin.solved)
            self.dense = with_stored_values(block, self.quantized, weights.by_columns)
            weights.starved = dict(begin.starved)

    def solve_stage(
        self, stage: int, activations: Activations, through: Block, beside: Activations | None = None
    ) -> None:
        """Quantizes a stage's weights, unless an earlier run has.

        Args:
          stage: of the block.
          activations: the text before the stage.
          through: the block that this text runs through. Weights of this very stage do not change what it reads.
          beside: the text in the dense model, to correct drift; None for no correction.
        """
        if self._begin is not None and stage < self._begin.stage:
            return
        keep = None if self._keep is None else self._note
        inputs = activations.calibrate(stage, through, beside, self._original, begin=self._begin, keep=keep)
        for names, hessian, drift in inputs:
            if not any(isinstance(self.quantized[name], SpQRArray) for name in names):
                self.quantized, self.dense = self._weights.solve(
                    self.quantized, names, self._prefix, hessian, self.dense, drift
                )

    def _note(self, sums: SumsPlace) -> None:
        assert self._keep is not None
        solved = {name: weight for name, weight in self.quantized.items() if isinstance(weight, SpQRArray)}
        self._keep(BlockPlace(sums, solved, self._weights.starved))


def advance_as_stored(activations: Activations | None, original: Block, finished: Block, by_columns: bool) -> None:
    """Takes text through a finished block's dequantized weights; see `with_stored_values`.

    Args:
      activations: the text before the block.
      original, finished, by_columns: as `with_stored_values` takes them.
    """
    assert activations is not None
    dense = with_stored_values(original, finished, by_columns)
    for stage in range(len(STAGES)):
        activations.advance(stage, dense)


def with_stored_values(original: Block, quantized: Block, by_columns: bool) -> Block:
    """The dense block with what its quantized weights dequantize to, with the same bits as when they were solved.

    Args:
      original: the dense block, for the types of its weights.
      quantized: the block with `SpQRArray`s.
      by_columns: they come from the column loop; other methods dequantize by `SpQRArray.to_dense`.
    """
    arrays = {name: weight for name, weight in quantized.items() if isinstance(weight, SpQRArray)}
    values = {name: array.to_dense_exactly() if by_columns else array.to_dense() for name, array in arrays.items()}
    dense = {name: np.asarray(v).astype(original[name].dtype) for name, v in values.items()}
    in_host_memory = {name for name in dense if isinstance(original[name], np.ndarray)}  # under a mesh
    return original.replace({name: v if name in in_host_memory else jnp.asarray(v) for name, v in dense.items()})
