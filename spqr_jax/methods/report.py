"""What is told of each finished weight."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping
from typing import Any

from spqr_jax.array import SpQRArray
from spqr_jax.events import Event, Events, ignore
from spqr_jax.solver import LayerStats


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """What quantizing one weight did; `quantize` passes one to ``events`` for each weight, as an event's ``detail``.

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

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> LayerReport:
        """Reads what `dataclasses.asdict` made of one."""
        out, inner = values["shape"]
        stats = LayerStats(**values["stats"])
        return cls(values["path"], (out, inner), values["bits"], stats, values["seconds"])


class Reporter:
    """Counts the weights that are quantized, and tells `events` of each, with the time since the last.

    Args:
      total: number of weights in all.
      events: told of each, and once before the first.
      layers: reports of an earlier run that this one goes on with.

    Attributes:
      total: as given.
      layers: the reports so far.
    """

    def __init__(self, total: int, events: Events = ignore, layers: Iterable[LayerReport] = ()) -> None:
        self.total, self._events, self._last = total, events, time.perf_counter()
        self.layers = list(layers)
        events(Event("quantizing", len(self.layers), total))

    def __call__(self, path: str, array: SpQRArray, stats: LayerStats) -> None:
        now = time.perf_counter()
        report = LayerReport(path, array.shape, array.bits, stats, now - self._last)
        self._last = now
        self.layers.append(report)
        self._events(Event("quantizing", len(self.layers), self.total, path, report))
