"""What commands wrote as JSON, read back: entries that a page uses are of their type, or named in one error."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from spqr_jax.analysis import ModelAnalysis
from spqr_jax.analysis.model import COLUMN_BINS
from spqr_jax.errors import DataError
from spqr_jax.files import Entries, read_object


def read_result(path: Path) -> dict[str, Any]:
    """What `spqr perplexity`, `compare` or `eval` wrote with ``--json``.

    Returns:
      As written; `perplexity` with `data` (text), `windows`, `seqlen` (whole numbers), or `results` by task.

    Raises:
      DataError: it is something else; names the entry that is at fault.
    """
    entries = read_object(path, DataError)
    if "perplexity" not in entries and "results" not in entries:
        raise DataError(f"{path} is not a result of 'spqr perplexity', 'compare' or 'eval'")
    entries.maybe_text("model")
    entries.maybe_text("against")
    if "perplexity" in entries:
        entries.number("perplexity", least=0)
        entries.text("data")
        for name in ("windows", "seqlen"):
            entries.integer(name, least=1)
        for name in ("stderr", "dense_perplexity"):
            entries.maybe_number(name)
        if entries.maybe_number("kl_mean") is not None:
            entries.number("same_top")
    tasks = entries.nested("results")
    for task in tasks:
        tasks.nested(task)
    return entries.to_dict()


def checked_summary(summary: Entries) -> dict[str, Any]:
    """What `spqr_jax.inspection.summarize` returns, from a file; null stands for what is no number."""
    numbers = ("ideal_bits", "stored_bits", "outlier_percent", "head_bits")
    values: dict[str, Any] = {name: summary.maybe_number(name) for name in numbers}
    values |= {name: summary.number(name, least=0) for name in ("bytes", "dense_bytes")}
    values |= {name: summary.nested(name).to_dict() or None for name in ("quantization", "provenance")}
    layers, by_path = summary.nested("layers"), {}
    for path in layers:
        layer = layers.nested(path)
        if path.startswith("layers."):  # not the head
            _check_path(layers, path)
        by_path[path] = {"shape": _shape(layer), "bits": layer.integer("bits")}
        for name in ("stored_bits", "outlier_percent", "output_error"):
            by_path[path][name] = layer.maybe_number(name)
    return values | {"layers": by_path}


def checked_setting(setting: Entries) -> dict[str, Any]:
    """How an analysis was made."""
    calibration = setting.nested("calibration")
    if list(calibration):
        calibration.text("data")
        for name in ("windows", "seqlen", "seed"):
            calibration.integer(name, most=2**63)
    return setting.to_dict() | {
        "calibration": calibration.to_dict(),
        "config": setting.nested("config").to_dict(),
        "command": setting.text("command", ""),
    }


def checked_analysis(analysis: Entries, maps: dict[str, np.ndarray]) -> ModelAnalysis:
    """What `ModelAnalysis.to_json` wrote, with its maps: float [rows, columns] by path."""
    rows = analysis.raw("weights")
    if not isinstance(rows, list) or not rows:
        analysis.refuse("weights", "a list of analyses")
    for path, drawn in maps.items():
        _check_path(analysis, path)
        if drawn.ndim != 2 or drawn.dtype.kind != "f" or not drawn.size:
            raise DataError(f"{analysis.label}: the map of {path} is not a matrix: run `spqr analyze` again")
    names = [f"weights[{index}]" for index in range(len(rows))]
    by_name = analysis.changed(dict(zip(names, rows, strict=True)))
    return ModelAnalysis.from_json({"weights": [_checked_weight(by_name.nested(name)) for name in names]}, maps)


def _checked_weight(entries: Entries) -> dict[str, Any]:
    structures = entries.nested("structures")
    shares, by_column = structures.nested("shares"), entries.numbers("by_column")
    if len(by_column) != COLUMN_BINS:
        entries.refuse("by_column", f"{COLUMN_BINS} numbers")
    _check_path(entries, entries.text("path"))
    return {
        "path": entries.text("path"),
        "shape": _shape(entries),
        "cost": entries.number("cost"),
        "by_column": by_column,
        "structures": {
            **{name: structures.integers(name) for name in ("rows", "columns", "heads", "rotary_pairs")},
            "top_share": structures.number("top_share"),
            "rotary_correlation": structures.maybe_number("rotary_correlation"),
            "shares": {name: shares.number(name) for name in ("unstructured", *shares)},
        },
    }


def _shape(entries: Entries) -> list[int]:
    shape = entries.integers("shape", least=1)
    if len(shape) != 2:
        entries.refuse("shape", "two sizes: [out, in]")
    return shape


def _check_path(entries: Entries, path: str) -> None:
    """Figures are drawn by block and kind."""
    parts = path.split(".", 2)
    if parts[0] == "layers" and not (
        len(parts) == 3 and parts[1].isascii() and parts[1].isdigit() and len(parts[1]) < 6
    ):
        raise DataError(f"{entries.label}: {path!r} is not the path of a weight, such as layers.0.q_proj")


def calibration_in_words(calibration: Any) -> str:
    """The text that a model was calibrated on: as our commands note it, or what another program noted."""
    names = ("windows", "seqlen", "data", "seed")
    if isinstance(calibration, dict) and all(name in calibration for name in names):
        data = str(calibration["data"]).rsplit("/", 1)[-1]
        return "{windows} windows of {seqlen} tokens from {name}, seed {seed}".format(**calibration, name=data)
    return str(calibration)


def in_digits(value: Any, digits: int) -> str:
    """A number; a dash where there is none."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"
