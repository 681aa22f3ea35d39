"""What a report is made of: checkpoints, what `spqr analyze` wrote, and measured results."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import platform
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from spqr_jax import __version__
from spqr_jax.analysis import ModelAnalysis
from spqr_jax.checkpoint import CheckpointSource, is_checkpoint
from spqr_jax.errors import DataError, ModelError
from spqr_jax.files import read_object
from spqr_jax.inspection import summarize
from spqr_jax.output import unfinished_note
from spqr_jax.report.records import checked_analysis, checked_setting, checked_summary

ANALYSIS_FILE, MAPS_FILE = "analysis.json", "maps.npz"
_VERSION = 1
_MOST_BYTES_OF_MAPS = 1 << 30  # of ten thousand matrices


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
        "spqr-jax": __version__,
        "JAX": jax.__version__,
        "NumPy": np.__version__,
        "Python": platform.python_version(),
        "device": f"{device.platform}: {device.device_kind}",
        "system": f"{platform.system()} {platform.release()}, {processor}, {os.cpu_count()} processors",
    }


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
    if not os.path.lexists(path):
        raise ModelError(f"{path} does not exist{unfinished_note(path)}")
    if is_checkpoint(path):
        return Run(str(path), _finite(summarize(CheckpointSource(path))), None, {}, _of_model(path, results))
    if not (path / ANALYSIS_FILE).is_file():
        raise ModelError(f"{path} is neither a quantized model written by spqr nor an output of `spqr analyze --out`")
    entries = read_object(path / ANALYSIS_FILE, DataError)
    if entries.integer("version") != _VERSION:
        raise DataError(f"{path} was written by another version of `spqr analyze`: run it again")
    label, maps = entries.text("label"), _read_maps(path / MAPS_FILE)
    analysis = checked_analysis(entries.nested("analysis"), maps)
    summary = checked_summary(entries.nested("summary")) if "summary" in entries else None
    setting = checked_setting(entries.nested("setting"))
    return Run(label, summary, analysis, setting, _of_model(Path(label), results))


def _read_maps(path: Path) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            told, stored = (sum(getattr(each, f"{kind}_size") for each in members) for kind in ("file", "compress"))
            if told > _MOST_BYTES_OF_MAPS or stored > path.stat().st_size:
                raise ValueError("it announces more bytes than maps can have")
            return {member.filename.removesuffix(".npy"): _read_map(archive.read(member)) for member in members}
    except Exception as error:  # of the system, of zip, of NumPy's own format
        raise DataError(f"{path} is damaged ({type(error).__name__}: {error}): run `spqr analyze` again") from None


def _read_map(data: bytes) -> np.ndarray:
    """An array as `np.save` writes it; `np.load` would reserve whatever its header tells of."""
    file = io.BytesIO(data)
    np.lib.format.read_magic(file)
    try:
        shape, columns_first, dtype = np.lib.format.read_array_header_1_0(file)
    except MemoryError:  # as Python's parser calls brackets that are nested too deeply
        raise ValueError("its header cannot be read") from None
    if math.prod(shape) * dtype.itemsize != len(data) - file.tell():
        raise ValueError(f"an array of type {dtype} and shape {shape} does not fit its {len(data)} bytes")
    return np.frombuffer(data, dtype, offset=file.tell()).reshape(shape, order="F" if columns_first else "C")


def _of_model(path: Path, results: list[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """Results of the model at `path`; relative and absolute names of one place are the same."""
    return tuple(r for r in results if str(r.get("model")) == str(path) or _same(Path(str(r.get("model"))), path))


def _same(a: Path, b: Path) -> bool:
    return a.exists() and b.exists() and a.resolve() == b.resolve()
