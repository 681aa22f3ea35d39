"""What is told of each finished weight."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

from spqr_jax.array import SpQRArray
from spqr_jax.solver import LayerStats


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """What quantizing one weight did; `quantize` passes one to ``on_layer`` for each weight.

    Attributes:
      path: path of the weight, such as ``layers.3.down_proj``.
      shape: (out, in).
      bits: bits of a weight code.
      stats: error, outliers and size.
      seconds: time since the last report, calibration included.
    """

    path: str
    shape: tuple[int, int]
    bits: int
    stats: LayerStats
    seconds: float


OnLayer = Callable[[LayerReport], None]


class Reporter:
    """Tells `on_layer` of each weight, with the time since the last."""

    def __init__(self, on_layer: OnLayer | None) -> None:
        self._on_layer, self._last = on_layer, time.perf_counter()

    def __call__(self, path: str, array: SpQRArray, stats: LayerStats) -> None:
        now = time.perf_counter()
        if self._on_layer is not None:
            self._on_layer(LayerReport(path, array.shape, array.bits, stats, now - self._last))
        self._last = now
