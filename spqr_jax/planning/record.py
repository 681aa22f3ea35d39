"""Plans, and what was measured for one, as JSON: every number comes back with the same bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from spqr_jax.planning.budget import Choice, Plan
from spqr_jax.planning.curves import Candidate, WeightCurve


def curve_to_json(curve: WeightCurve) -> dict[str, Any]:
    candidates = [
        {"bits": candidate.bits, "loss": candidate.loss.tolist(), "outliers": candidate.outliers.tolist()}
        for candidate in curve.candidates
    ]
    return {
        "path": curve.path,
        "shape": list(curve.shape),
        "tau_per_price": float(curve.tau_per_price),
        "candidates": candidates,
        "gap": curve.gap,
        "factor": float(curve.factor),
    }


def curve_from_json(values: Mapping[str, Any]) -> WeightCurve:
    candidates = tuple(
        Candidate(entry["bits"], np.array(entry["loss"], np.float64), np.array(entry["outliers"], np.float64))
        for entry in values["candidates"]
    )
    out, inner = values["shape"]
    return WeightCurve(
        values["path"], (out, inner), values["tau_per_price"], candidates, values["gap"], values["factor"]
    )


_PREDICTED = ("outlier_threshold", "nbytes", "outlier_bytes", "loss")


def plan_to_json(plan: Plan) -> dict[str, Any]:
    choices = [
        {
            "curve": curve_to_json(choice.curve),
            "bits": choice.bits,
            **{name: float(getattr(choice, name)) for name in _PREDICTED},
        }
        for choice in plan.choices.values()
    ]
    return {"target_bits": plan.target_bits, "price": float(plan.price), "choices": choices}


def plan_from_json(values: Mapping[str, Any]) -> Plan:
    choices = [
        Choice(curve_from_json(entry["curve"]), entry["bits"], *(entry[name] for name in _PREDICTED))
        for entry in values["choices"]
    ]
    return Plan({choice.curve.path: choice for choice in choices}, values["target_bits"], values["price"])
