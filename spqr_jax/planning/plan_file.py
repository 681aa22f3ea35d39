"""Plans in files: what was measured of each weight, so that other runs and other targets need not measure it again."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from spqr_jax.config import SpQRConfig
from spqr_jax.errors import SpQRError
from spqr_jax.files.entries import Entries, is_number
from spqr_jax.files.json_file import read_object
from spqr_jax.models.config import DecoderConfig
from spqr_jax.models.weights import matrix_names, weight_shapes
from spqr_jax.output import write_file
from spqr_jax.planning.budget import Plan, make_plan
from spqr_jax.planning.curves import PRICES, Candidate, WeightCurve, widths_for
from spqr_jax.planning.record import curve_to_json

_FORMAT = "spqr-jax plan 1"
_MEASURED_WITH = (
    "group_size", "stats_bits", "stats_group_size", "fit", "order", "input_shards", "damping",
)  # fmt: skip
"""Settings that change what a weight loses; the target and the widths to choose from do not."""


def write_plan(path: Path | str, plan: Plan, config: SpQRConfig) -> None:
    """Writes a plan as JSON, whole or not at all.

    Args:
      path: of the file; one that is there is replaced.
      plan: as `plan_budget` made it.
      config: that it was made with.

    Raises:
      CheckpointError: it cannot be written.
    """
    values = {
        "format": _FORMAT,
        "target_bits": plan.target_bits,
        "measured_with": _settings(config),
        "prices": PRICES.tolist(),
        "weights": [_written(choice.curve) for choice in plan.choices.values()],
    }
    write_file(Path(path), json.dumps(values, allow_nan=False) + "\n")


def read_plan(path: Path | str, model: DecoderConfig, config: SpQRConfig) -> Plan:
    """The plan for a target from what a file knows of each weight.

    The file may be of another target, of another model of the same shapes, or of more widths and weights.

    Args:
      path: a file that `write_plan` wrote.
      model: which is to be quantized.
      config: how, with `target_bits`.

    Raises:
      SpQRError: the file is no plan, was measured with other settings, or lacks a weight or a width that is needed; or
        the target is out of reach.
    """
    assert config.target_bits is not None
    entries = read_object(Path(path), SpQRError)
    if entries.raw("format") != _FORMAT:
        entries.refuse("format", f"{_FORMAT!r}, as --save-plan of this version writes it")
    if not np.array_equal(entries.numbers("prices"), PRICES):
        entries.refuse("prices", "those of this version: save the plan anew")
    _refuse_other_settings(entries, config)
    curves = {curve.path: curve for curve in (_curve(entry, str(path)) for entry in _objects(entries))}
    shapes, kinds = weight_shapes(model), enumerate(model.kinds)
    names = [f"layers.{index}.{name}" for index, kind in kinds for name in matrix_names(model, kind)]
    wanted = [name for name in names if config.for_path(name) is not None]
    chosen = {name: _allowed(curves, name, shapes[name], config, str(path)) for name in wanted}
    in_order = [chosen[name] for name in curves if name in chosen]  # the file's, so that the result has the same bytes
    return make_plan(in_order, config.target_bits, config)


def _written(curve: WeightCurve) -> dict[str, Any]:
    """As JSON, which has no infinity: null stands for it."""
    values = curve_to_json(curve)
    for candidate in values["candidates"]:
        for name in ("loss", "outliers"):
            candidate[name] = [value if math.isfinite(value) else None for value in candidate[name]]
    return values


def _settings(config: SpQRConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in _MEASURED_WITH}


def _refuse_other_settings(entries: Entries, config: SpQRConfig) -> None:
    before, now = entries.nested("measured_with").to_dict(), _settings(config)
    if unlike := [name for name in _MEASURED_WITH if before.get(name) != now[name]]:
        words = ", ".join(f"{name} {before.get(name)!r}, now {now[name]!r}" for name in unlike)
        raise SpQRError(f"{entries.label} was measured with {words}: give the same settings, or plan anew")


def _objects(entries: Entries) -> list[Mapping[str, Any]]:
    values = entries.raw("weights")
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        entries.refuse("weights", "a list of objects")
    return list(values)


def _curve(values: Mapping[str, Any], label: str) -> WeightCurve:
    """A weight, every entry checked."""
    weight = Entries(values, label, error=SpQRError)
    path = weight.text("path")
    shape = weight.integers("shape", least=1)
    if len(shape) != 2:
        weight.refuse("shape", "two numbers, [out, in]")
    candidates = weight.raw("candidates")
    if not isinstance(candidates, list) or not candidates:
        weight.refuse("candidates", "a list with an entry for each width")
    return WeightCurve(
        path,
        (shape[0], shape[1]),
        weight.number("tau_per_price", least=0.0),
        tuple(_candidate(entry, label, path) for entry in candidates),
        weight.maybe_number("gap", least=0.0),
        weight.number("factor", least=0.0),
    )


def _candidate(values: Any, label: str, path: str) -> Candidate:
    entries = Entries(values if isinstance(values, dict) else {}, label, prefix=f"{path}: ", error=SpQRError)
    loss, outliers = (_at_prices(entries, name) for name in ("loss", "outliers"))
    return Candidate(entries.integer("bits", least=2, most=8), loss, outliers)


def _at_prices(entries: Entries, name: str) -> np.ndarray:
    """A number for each price, f64 [prices]; null stands for one that could not be measured."""
    values = entries.raw(name)
    if not isinstance(values, list) or len(values) != len(PRICES):
        entries.refuse(name, f"{len(PRICES)} numbers, as many as there are prices")
    if not all(value is None or (is_number(value) and 0 <= value < math.inf) for value in values):
        entries.refuse(name, "numbers of at least 0, or null")
    return np.array([math.inf if value is None else value for value in values], np.float64)


def _allowed(
    curves: Mapping[str, WeightCurve], name: str, shape: Collection[int], config: SpQRConfig, label: str
) -> WeightCurve:
    """What the file knows of a weight, with the widths that it may have."""
    curve = curves.get(name)
    if curve is None or curve.shape != tuple(shape):
        known = "no such weight" if curve is None else f"one of shape {list(curve.shape)}"
        raise SpQRError(
            f"{label} has no plan for {name} {list(shape)}, but {known}: it is of another model, or was made with "
            "other rules; plan anew"
        )
    widths = widths_for(config, name)
    candidates = tuple(candidate for candidate in curve.candidates if candidate.bits in widths)
    if {candidate.bits for candidate in candidates} != set(widths):
        measured = ", ".join(str(candidate.bits) for candidate in curve.candidates)
        raise SpQRError(
            f"{label} knows {name} with {measured} bits, not with all of {', '.join(map(str, widths))}: "
            "set --bits or --rule as when it was made, or plan anew"
        )
    return dataclasses.replace(curve, candidates=candidates)
