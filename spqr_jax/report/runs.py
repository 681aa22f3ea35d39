"""What a report is made of: checkpoints, what `spqr analyze` wrote, and measured results."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

from spqr_jax.analysis import ModelAnalysis
from spqr_jax.checkpoint import CheckpointSource, is_checkpoint
from spqr_jax.errors import DataError, ModelError
from spqr_jax.inspection import summarize

ANALYSIS_FILE, MAPS_FILE = "analysis.json", "maps.npz"
_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Run:
    """A model that a report is about.

    Attributes:
      label: what it is called in the report.
      summary: of a quantized model (`spqr_jax.inspection.summarize`); None for a dense one.
      analysis: its sensitivities, or None.
      setting: how these were found: `dense`, `calibration`, `config`, `command`, `seconds`.
      results: what `spqr perplexity`, `compare` and `eval` wrote of it with ``--json``.
    """

    label: str
    summary: dict[str, Any] | None
    analysis: ModelAnalysis | None
    setting: dict[str, Any]
    results: tuple[dict[str, Any], ...] = ()

    @property
    def provenance(self) -> dict[str, Any]:
        """Where a quantized model comes from; empty where that is not known."""
        return {} if self.summary is None else self.summary["provenance"] or {}


def environment() -> dict[str, str]:
    """Where a report's figures were made."""
    device = jax.devices()[0]
    processor = platform.processor() or platform.machine()
    return {
        "spqr-jax": _version("spqr-jax"),
        "JAX": jax.__version__,
        "NumPy": np.__version__,
        "Python": platform.python_version(),
        "device": f"{device.platform}: {device.device_kind}",
        "system": f"{platform.system()} {platform.release()}, {processor}, {os.cpu_count()} processors",
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "from source"


def write_analysis(
    directory: Path, label: str, analysis: ModelAnalysis, summary: dict[str, Any] | None, setting: dict[str, Any]
) -> None:
    """Writes what `read_run` reads: a JSON file, and the maps as NumPy arrays."""
    values = {
        "version": _VERSION,
        "label": label,
        "setting": setting,
        "environment": environment(),
        "summary": _finite(summary),
        "analysis": analysis.to_json(),
    }
    (directory / ANALYSIS_FILE).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    np.savez_compressed(directory / MAPS_FILE, allow_pickle=False, **analysis.maps())


def _finite(value: Any) -> Any:
    """With None in place of numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def read_run(path: Path, results: list[dict[str, Any]]) -> Run:
    """A checkpoint, or a directory that `spqr analyze` wrote.

    Args:
      path: of it.
      results: measured, of any models; those whose `model` is this one are kept.

    Raises:
      ModelError: it is neither.
      DataError: an analysis that cannot be read.
    """
    if is_checkpoint(path):
        summary = summarize(CheckpointSource(path))
        return Run(str(path), _finite(summary), None, {}, _of_model(path, results))
    if not (path / ANALYSIS_FILE).is_file():
        raise ModelError(f"{path} is no quantized model of ours, nor what `spqr analyze --out` wrote")
    try:
        values = json.loads((path / ANALYSIS_FILE).read_text(encoding="utf-8"))
        if values["version"] != _VERSION:
            raise DataError(f"{path} was written by another version of `spqr analyze`: run it again")
        with np.load(path / MAPS_FILE, allow_pickle=False) as maps:
            analysis = ModelAnalysis.from_json(values["analysis"], dict(maps))
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise DataError(f"{path} is damaged ({type(error).__name__}: {error}): run `spqr analyze` again") from None
    label = values["label"]
    return Run(label, values["summary"], analysis, values["setting"], _of_model(Path(label), results))


def _of_model(path: Path, results: list[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """Results of the model at `path`; relative and absolute names of one place are the same."""
    return tuple(r for r in results if str(r.get("model")) == str(path) or _same(Path(str(r.get("model"))), path))


def _same(a: Path, b: Path) -> bool:
    return a.exists() and b.exists() and a.resolve() == b.resolve()
