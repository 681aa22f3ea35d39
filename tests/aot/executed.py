"""The compiled PTX of tiny products, executed in the emulator: how wrong its result is, and what it costs."""

from __future__ import annotations

from typing import Any

import numpy as np
from product import Form, kernel, problem
from support.ptx import emulator

EARLY = ("words", "spans", "entries", "starts")  # what no launch writes: loaded before the launch before has ended


def run(form: Form, ptx: str, shorten: str | None = None) -> tuple[float, emulator.Costs]:
    """(the worst row's relative error of what the PTX computes, what it cost).

    Args:
      form: of the product.
      ptx: the compiled kernel.
      shorten: an array whose last sixteenth is left out, to see that reads past it are noticed.
    """
    prepared, x, want = problem(form)
    _, _, plan = kernel(form, prepared)
    columns = -(-form.inner // 16) * 16
    x = np.pad(x, ((0, 0), (0, columns - form.inner)))
    arrays = {name: getattr(prepared, name) for name in EARLY}
    arrays |= {"index": np.array([len(form.bits) - 1], np.int32)}
    arrays["x"] = x if form.wide_x else (x.view(np.uint32) >> 16).astype(np.uint16)
    arrays = {name: np.asarray(arrays[name]) for name in sorted(arrays) if arrays[name] is not None}
    if shorten is not None:
        flat = arrays[shorten].reshape(-1)
        arrays[shorten] = flat[: len(flat) * 15 // 16]
    out = np.zeros((form.batch, plan.rows), np.float32 if form.exact else np.uint16)
    early = [i for i, name in enumerate(arrays) if name in (*EARLY, "index")]
    results, costs = emulator.launch(
        emulator.parse(ptx),
        [*arrays.values(), out],
        grid=plan.config.blocks * plan.config.cluster,
        threads=plan.threads,
        cluster=plan.config.cluster,
        shared_bytes=plan.shared_bytes,
        early=early if plan.config.pdl else None,
    )
    got = results[-1] if form.exact else (results[-1].astype(np.uint32) << 16).view(np.float32)
    starts = np.concatenate([[0], np.cumsum([-(-rows // 16) * 16 for rows in form.parts])])
    parts = [got[:, start : start + rows] for start, rows in zip(starts, form.parts, strict=False)]
    difference = np.concatenate(parts, axis=1).astype(np.float64) - want
    return float((np.linalg.norm(difference, axis=1) / np.linalg.norm(want, axis=1)).max()), costs


def measured(costs: emulator.Costs) -> dict[str, Any]:
    """What of the costs is held to a budget: the busiest warp's instructions and the blocks' wavefronts, by phase."""
    return {
        "instructions": costs.by_phase().max(axis=1).tolist(),
        "wavefronts": costs.wavefronts.sum(axis=1).tolist(),
        "least_wavefronts": costs.least_wavefronts.sum(axis=1).tolist(),
    }
