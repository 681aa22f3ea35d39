"""Quantizes weights that read one input, within a budget if there is one."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from spqr_jax.array import SpQRArray
from spqr_jax.config import SpQRConfig
from spqr_jax.errors import DataError, NotFiniteError
from spqr_jax.methods import quantize_weights
from spqr_jax.methods.report import Reporter
from spqr_jax.models.decoder import Block
from spqr_jax.models.finite import advice
from spqr_jax.planning.ledger import Ledger
from spqr_jax.solver import Hessian, Solved, correct_drift

_LEAST_DAMPING = 0.01  # that is multiplied for experts which few tokens reach
_TRIES = 6  # times that weights are solved at most to keep to a budget


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
        configs = {name: config for name in names if (config := self._config.for_path(prefix + name)) is not None}
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
            block = block.replace({n: result.array for n, result in zip(members, solved, strict=True)})
            values = {
                n: _in_dtype(result.dense, getattr(dense, n).dtype) for n, result in zip(members, solved, strict=True)
            }
            dense = dense.replace(values)
            for name, result in zip(members, solved, strict=True):
                self._report(prefix + name, result.array, result.stats)
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
            scaled = [dataclasses.replace(c, outlier_threshold=factor * c.outlier_threshold) for c in configs.values()]
            solved = quantize_weights(weights, hessian, scaled, self._mesh)
            tried.append((factor, {path: result.array for path, result in zip(configs, solved, strict=True)}))
            factor = ledger.next_factor(tried)
        for path, result in zip(configs, solved, strict=True):
            ledger.spend(path, result.array)
        return solved


def _in_dtype(values: jax.Array | np.ndarray, dtype: Any) -> jax.Array | np.ndarray:
    """Values of a weight as the model has them; those in host memory are converted on the device, which is faster."""
    if isinstance(values, np.ndarray):
        converted: np.ndarray = jax.device_get(jnp.asarray(values).astype(dtype))
        return converted
    return values.astype(dtype)
