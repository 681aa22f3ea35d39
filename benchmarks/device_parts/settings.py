"""What a kernel's configuration changes: programmatic dependent launch, steps read ahead, clusters."""

from __future__ import annotations

import accelerator
from accelerator import Shape
from device_loop import LEAST, MOST, Timing, compare
from report import Report
from tune_pallas import candidates

from device_parts.products import kernel_name

SHAPES = [Shape(4096, 4096), Shape(11008, 4096)]


def measure(report: Report, small: bool) -> None:
    """The configurations that tuning would try, for one row of x; the first is what the rule chooses."""
    for shape in [Shape(64, 128)] if small else SHAPES:
        configs = candidates(kernel_name(), shape, rows=1, bits=3, group_size=16)
        packed = accelerator.packed_rival(kernel_name(), shape, most=LEAST if small else MOST)
        chosen = list(configs.items())[: 1 if small else 10]
        rivals = [accelerator.configured(packed, kernel_name(), config, label) for label, config in chosen]
        x = accelerator.activations(1, shape.inner)
        timings = compare([(rival, x) for rival in rivals], products=8 if small else 256, rounds=1 if small else 7)
        for rival, timing in zip(rivals, timings, strict=True):
            values = {"us": 1e6 * timing.elapsed} if isinstance(timing, Timing) else {"failed": timing}
            report.line(shape=str(shape), config=rival.name, **values)
