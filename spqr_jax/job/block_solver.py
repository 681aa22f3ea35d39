"""Quantizes the weights of one block: the ways to take the text through it, and what they share."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from spqr_jax.array import SpQRArray
from spqr_jax.config import SpQRConfig
from spqr_jax.errors import DataError, NotFiniteError
from spqr_jax.methods import quantize_weights
from spqr_jax.methods.report import Reporter
from spqr_jax.models.config import DecoderConfig
from spqr_jax.models.decoder import STAGES, Block, matrix_names
from spqr_jax.models.finite import advice
from spqr_jax.planning.budget import Ledger
from spqr_jax.solver import Hessian, Solved, correct_drift
from spqr_jax.stream.activations import Activations

_LEAST_DAMPING = 0.01  # that is multiplied for experts which few tokens reach
_TRIES = 6  # times that weights are solved at most to keep to a budget


class BlockSolver(Protocol):
    """Quantizes the weights of one block after the other."""

    def solve(self, activations: Activations | None, block: Block, prefix: str, last: bool) -> Block:
        """Quantizes a block, and takes the text through it.

        Args:
          activations: the text before the block; afterwards behind it, unless `last`. None without calibration.
          block: its dense weights.
          prefix: of its weights' paths, such as ``layers.3.``.
          last: nothing reads the text behind this block.

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

    def solve(self, activations: Activations | None, block: Block, prefix: str, last: bool) -> Block:
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

    def solve(self, activations: Activations | None, block: Block, prefix: str, last: bool) -> Block:
        assert activations is not None
        original = dense = block  # dense: what the activations run through, quantized weights dequantized
        for stage in range(len(STAGES)):
            for names, hessian, drift in activations.calibrate(stage, dense, self._dense, original):
                block, dense = self._weights.solve(block, names, prefix, hessian, dense, drift)
            if not (last and stage + 1 == len(STAGES)):
                activations.advance(stage, dense)
                if self._dense is not None:
                    self._dense.advance(stage, original)
        self._weights.warn_of_starved(prefix)
        return block

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

    def solve(self, activations: Activations | None, block: Block, prefix: str, last: bool) -> Block:
        assert activations is not None
        ahead, original = activations.copy(), block
        dense = block
        for stage in range(len(STAGES)):
            for names, hessian, _ in ahead.calibrate(stage, original):
                block, dense = self._weights.solve(block, names, prefix, hessian, dense)
            if stage + 1 < len(STAGES):
                ahead.advance(stage, original)
        if not last:
            for stage in range(len(STAGES)):
                activations.advance(stage, dense)
        self._weights.warn_of_starved(prefix)
        return block

    def replay(self, activations: Activations | None, original: Block, finished: Block) -> None:
        advance_as_stored(activations, original, finished, self._weights.by_columns)

    @property
    def streams(self) -> tuple[Activations, ...]:
        return ()


def advance_as_stored(activations: Activations | None, original: Block, finished: Block, by_columns: bool) -> None:
    """Takes text through a finished block's dequantized weights, which have the same bits as when they were solved.

    Args:
      activations: the text before the block.
      original: the dense block, for the types of its weights.
      finished: the block with `SpQRArray`s.
      by_columns: they come from the column loop; other methods dequantize by `SpQRArray.to_dense`.
    """
    assert activations is not None
    arrays = {name: weight for name, weight in finished.items() if isinstance(weight, SpQRArray)}
    values = {name: array.to_dense_exactly() if by_columns else array.to_dense() for name, array in arrays.items()}
    dense = original.replace({name: jnp.asarray(v).astype(original[name].dtype) for name, v in values.items()})
    for stage in range(len(STAGES)):
        activations.advance(stage, dense)


class GroupSolver:
    """Quantizes weights that read one input.

    Args:
      config: what to do.
      report: told of each weight.
      ledger: keeps to a budget, or None where there is none.
      mesh: of devices that solve the rows together, or None.
    """

    def __init__(self, config: SpQRConfig, report: Reporter, ledger: Ledger | None, mesh: Mesh | None = None) -> None:
        self._config, self._report, self._ledger, self._mesh = config, report, ledger, mesh
        self.by_columns = config.solver == "columns"
        self.starved: dict[str, int] = {}  # experts of the block at hand that few tokens reached, and how many

    def solve(
        self,
        block: Block,
        names: Sequence[str],
        prefix: str,
        hessian: Hessian | None,
        dense: Block | None = None,
        drift: jax.Array | None = None,
    ) -> tuple[Block, Block]:
        """Quantizes weights that read one input, those of one width together, once they are moved to make up for drift.

        Returns:
          The block with `SpQRArray`s, and `dense` with what they dequantize to.
        """
        dense = block if dense is None else dense
        together: dict[int, list[str]] = {}
        configs = {name: own for name in names if (own := self._config.for_path(prefix + name)) is not None}
        if hessian is not None and names[0].startswith("experts."):
            configs = self._damped_by_need(configs, hessian)
        for name in configs:
            together.setdefault(getattr(block, name).shape[1], []).append(name)
        for members in together.values():
            weights = [getattr(block, name) for name in members]
            if drift is not None:
                assert hessian is not None
                weights = correct_drift(weights, hessian.matrix(), drift, self._config.drift_correction)
            try:
                solved = self._quantize(weights, hessian, {prefix + name: configs[name] for name in members})
            except DataError as error:  # of its Hessian; blocks come in order, so here it begins
                raise NotFiniteError(f"inputs of {prefix}{members[0]}: {error}; {advice(weights[0].dtype)}") from None
            block = block.replace({n: one.array for n, one in zip(members, solved, strict=True)})
            values = {n: one.dense.astype(getattr(dense, n).dtype) for n, one in zip(members, solved, strict=True)}
            dense = dense.replace(values)
            for name, one in zip(members, solved, strict=True):
                self._report(prefix + name, one.array, one.stats)
        return block, dense

    def _damped_by_need(self, configs: dict[str, SpQRConfig], hessian: Hessian) -> dict[str, SpQRConfig]:
        """More damping for an expert that fewer tokens reach than it has inputs: its Hessian knows too few directions.

        With no tokens at all the Hessian is the identity, and its weights are rounded to nearest.
        """
        tokens, width = float(hessian.tokens), hessian.width
        if tokens >= width:
            return configs
        self.starved |= {name.split(".")[1]: int(tokens) for name in configs}
        more = width / max(tokens, 1.0)
        return {n: dataclasses.replace(c, damping=max(c.damping, _LEAST_DAMPING) * more) for n, c in configs.items()}

    def warn_of_starved(self, prefix: str) -> None:
        """Once a block: the experts that calibration text hardly reached."""
        if self.starved:
            listed = ", ".join(f"{expert} ({tokens})" for expert, tokens in self.starved.items())
            warnings.warn(
                f"{prefix.rstrip('.')}: these experts see few calibration tokens (number in parentheses): {listed}. "
                "They are quantized with more damping; use more calibration text (--nsamples)",
                stacklevel=2,
            )
            self.starved = {}

    def _quantize(
        self, weights: Sequence[jax.Array], hessian: Hessian | None, configs: dict[str, SpQRConfig]
    ) -> list[Solved]:
        ledger = self._ledger
        if ledger is None:
            return quantize_weights(weights, hessian, list(configs.values()), self._mesh)
        factor: float | None = ledger.factor()
        tried: list[tuple[float, dict[str, SpQRArray]]] = []
        while factor is not None and len(tried) < _TRIES:
            own = [dataclasses.replace(c, outlier_threshold=factor * c.outlier_threshold) for c in configs.values()]
            solved = quantize_weights(weights, hessian, own, self._mesh)
            tried.append((factor, {path: one.array for path, one in zip(configs, solved, strict=True)}))
            factor = ledger.next_factor(tried)
        for path, one in zip(configs, solved, strict=True):
            ledger.spend(path, one.array)
        return solved
