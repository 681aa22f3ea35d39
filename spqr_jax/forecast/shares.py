"""Seconds of `spqr quantize` on this machine, part by part."""

from __future__ import annotations

import dataclasses

from spqr_jax.config import SpQRConfig
from spqr_jax.forecast.cluster import Costs
from spqr_jax.forecast.machine import Machine, seconds
from spqr_jax.forecast.passes import Text, Work, block_total, model_weights
from spqr_jax.forecast.quantizing import (
    calibration_work,
    compile_seconds,
    head_work,
    plan_work,
    solver_work,
    tuning_work,
)
from spqr_jax.models.config import DecoderConfig
from spqr_jax.tune.config import TuneConfig


def local_costs(
    model: DecoderConfig, config: SpQRConfig, text: Text, tuning: TuneConfig | None, machine: Machine, dtype: str
) -> tuple[Costs, Costs]:
    """Seconds of the whole run, and of one of its blocks (the mean), part by part; start and compilation left out."""
    start = seconds(Work(), machine, compiled=True)

    def cost(work: Work) -> float:
        return seconds(work, machine, dtype, compiled=True) - start

    solver = solver_work(model, config, text)
    weights = block_total(model)
    blocks: Costs = {"reading and writing": cost(Work(handled=weights))}
    if config.needs_calibration:
        calibration = calibration_work(model, config, text)
        blocks["forward passes"] = cost(dataclasses.replace(calibration, gram=0.0, rounded_gram=0.0))
        blocks["Hessians"] = cost(Work(gram=calibration.gram, rounded_gram=calibration.rounded_gram))
        blocks["factorization"] = cost(Work(factor=solver.factor))
    blocks["column loop"] = cost(dataclasses.replace(solver, factor=0.0))
    whole = dict(blocks)
    if config.target_bits is not None:
        whole["planning"] = cost(plan_work(model, config, text))
    whole["output head"] = cost(head_work(model, config, text) + Work(handled=model_weights(model) - weights))
    if tuning is not None:
        whole["tuning"] = cost(tuning_work(model, tuning, text))
    whole["start and compilation"] = start + machine.slowness * compile_seconds(model, config, tuning)
    return whole, {name: part / model.num_layers for name, part in blocks.items()}
