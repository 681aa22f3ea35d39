"""What a plan's budget has been spent on while a model is being quantized."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from spqr_jax.array import SpQRArray
from spqr_jax.layout import bytes_of_outlier
from spqr_jax.planning.budget import Plan
from spqr_jax.planning.curves import STEEPNESS

_TOLERANCE = 0.005  # bits per weight by which a finished model may miss its target
_GIVE = 0.1  # share by which the outliers of later weights may be changed to make up for a miss


class Ledger:
    """Keeps a model that is being quantized on its plan's budget.

    Predictions of outlier counts are off, mostly by some percent. What was over-
    or underspent is shared out over the outliers of the weights to come; a miss
    that they could not make up for with small changes is not accepted.

    Args:
      plan: to be kept.
    """

    def __init__(self, plan: Plan) -> None:
        self._left = dict(plan.choices)
        self._budget = plan.target_bits * plan.size / 8
        self._size, self._spent = plan.size, 0.0
        self._planned, self._found = 0.0, 0.0  # bytes of outliers so far

    def factor(self) -> float:
        """What the next weights' thresholds should be multiplied by, before anything is known of them."""
        total = self._planned + sum(choice.outlier_bytes for choice in self._left.values())
        wanted = self._ratio()
        if self._found and self._planned > 0.02 * total:
            wanted *= self._planned / self._found
        return _for_counts(wanted, STEEPNESS)

    def state(self) -> dict[str, Any]:
        """What was spent so far, as JSON; for `restore`."""
        return {
            "left": list(self._left), "spent": float(self._spent),
            "planned": float(self._planned), "found": float(self._found),
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on where a ledger of the same plan was when it gave `state`; all sums have the same bits."""
        self._left = {path: self._left[path] for path in state["left"]}
        self._spent, self._planned, self._found = state["spent"], state["planned"], state["found"]

    def _ratio(self) -> float:
        """Outliers that the weights to come may have, as a multiple of what was planned for them."""
        fixed = sum(choice.nbytes - choice.outlier_bytes for choice in self._left.values())
        planned = sum(choice.outlier_bytes for choice in self._left.values())
        return max(self._budget - self._spent - fixed, 0.0) / max(planned, 1e-9)

    def next_factor(self, tried: Sequence[tuple[float, dict[str, SpQRArray]]]) -> float | None:
        """Another factor to solve the same weights with, or None to accept them as they are.

        Args:
          tried: factors and what they led to, by path, the last one last.
        """
        factor, arrays = tried[-1]
        counts = [sum(_outlier_bytes(array) for array in own.values()) for _, own in tried]
        later = sum(choice.outlier_bytes for path, choice in self._left.items() if path not in arrays)
        ratio = self._ratio()
        wanted = ratio * sum(self._left[path].outlier_bytes for path in arrays)
        if abs(counts[-1] - wanted) <= max(_GIVE * ratio * later, _TOLERANCE * self._size / 8):
            return None
        steepness = STEEPNESS
        if len(tried) > 1 and tried[-2][0] != factor:
            measured = math.log(max(counts[-2], 1) / max(counts[-1], 1)) / math.log(factor / tried[-2][0])
            steepness = float(np.clip(measured, 0.3, 6.0))
        return factor * _for_counts(max(wanted, 1.0) / max(counts[-1], 1), steepness)

    def spend(self, path: str, array: SpQRArray) -> None:
        """Books a finished weight."""
        self._spent += array.stored_bytes
        self._planned += self._left.pop(path).outlier_bytes
        self._found += _outlier_bytes(array)


def _for_counts(ratio: float, steepness: float) -> float:
    """Factor on a threshold that changes outlier counts by `ratio`."""
    return float(np.clip(ratio, 1e-3, 1e3) ** (-1 / steepness))


def _outlier_bytes(array: SpQRArray) -> int:
    return array.nnz * bytes_of_outlier(array.shape[1])
