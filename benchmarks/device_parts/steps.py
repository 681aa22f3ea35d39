"""A decoding step of a model of Llama-7B's shape: tokens per second, and the launches of a layer in a trace."""

from __future__ import annotations

import os
from typing import Any

import generate_program
import jax
import numpy as np
from device_loop import trace
from report import Report

from device_parts.products import kernel_name
from spqr_jax.generate import Generator

PROMPT, NEW, CONTEXT = 32, 128, 512
FORMS = ("packed 1", "dense 1", "packed 16", "dense 16")
"""Models and batches, the most important first."""


def measure(report: Report, small: bool) -> None:
    """LAYERS says how many layers, ONLY names one of `FORMS`."""
    layers = int(os.environ.get("LAYERS", "2"))
    chosen = [form for form in FORMS[: 2 if small else None] if os.environ.get("ONLY", form) == form]
    config = generate_program.shape("small" if small else "7b", 2 if small else layers, 128 if small else CONTEXT)
    for model in sorted({form.split()[0] for form in chosen}, reverse=True):
        form = "3 bits" if model == "packed" else "dense"
        generator = Generator(generate_program.random_model(config, form, kernel_name()))
        report.line(model=model, layers=layers, weight_gb=generator.weight_bytes / 1e9)
        for batch in [int(form.split()[1]) for form in chosen if form.startswith(model)]:
            _measure_batch(report, generator, model, layers, 2 if small else batch, small)
        del generator


def _measure_batch(report: Report, generator: Generator, model: str, layers: int, batch: int, small: bool) -> None:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, generator.config.vocab_size, PROMPT).tolist() for _ in range(batch)]
    options: dict[str, Any] = {"max_new_tokens": 8 if small else NEW, "stop_tokens": ()}
    first = generator(prompts, **options)
    runs = [generator(prompts, **options) for _ in range(1 if small else 3)]
    speed = float(np.median([run.decode_tokens_per_second for run in runs]))
    entry = {"model": model, "layers": layers, "batch": batch}
    report.line(
        **entry,
        tokens_per_second=speed,
        step_us=1e6 * batch / speed,
        prefill_ms=1e3 * float(np.median([run.prefill_seconds for run in runs])),
        compile_seconds=first.compile_seconds,
        flags=os.environ.get("XLA_FLAGS", ""),
    )
    if jax.default_backend() != "gpu":
        return
    # the second trace has 16 steps more, and the same prefill
    few, many = (_traced(generator, prompts, steps) for steps in (17, 33))
    kernels = {name: _difference(many[name], few.get(name, (0.0, 0)), 16) for name in many}
    kernels = dict(sorted(kernels.items(), key=lambda item: -item[1][0]))
    report.line(
        **entry,
        traced=True,
        busy_us=sum(us for us, _ in kernels.values()),
        launches=sum(count for _, count in kernels.values()),
        launches_a_layer=sum(count for _, count in kernels.values() if count >= layers) / layers,
        kernels={name: [us, count] for name, (us, count) in list(kernels.items())[:24]},
    )


def _traced(generator: Generator, prompts: list[list[int]], tokens: int) -> dict[str, tuple[float, int]]:
    return trace(lambda: generator(prompts, max_new_tokens=tokens, stop_tokens=()))


def _difference(many: tuple[float, int], few: tuple[float, int], steps: int) -> tuple[float, float]:
    """(µs, launches) of a step."""
    return 1e6 * (many[0] - few[0]) / steps, (many[1] - few[1]) / steps
