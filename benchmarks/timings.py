"""Timings in CSV files: typed rows, one dataclass for each file of benchmarks/results.

A script that measures takes `--csv FILE`. It adds its rows to that file; a new row takes the place of an older one
with the same key (`KEY`), all other rows stay. The file is replaced as a whole, so an interrupted script leaves it
as it was. An empty cell means: not measured, or not known.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import datetime
import importlib.metadata
import io
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_type_hints

from spqr_jax.output import write_file

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
UNKNOWN = "unknown"


class TimingsError(ValueError):
    """A CSV file that does not have the columns or the values of its rows."""


def figure(digits: int) -> Any:
    """A column of numbers with so many digits after the point; None is an empty cell."""
    return dataclasses.field(default=None, metadata={"digits": digits})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """Where and when a row was measured: the first columns of every file.

    Attributes:
      machine: a short name, the same in all files.
      processor: its name.
      cores: processors that the system shows.
      kernels: the CPU kernels that spqr chooses on it.
      jax: version of JAX.
      python: version of Python.
      date: day of the measurement, YYYY-MM-DD.
      revision: of this repository.
      run: tells several runs on one machine apart.
      note: what else a reader must know.
    """

    KEY: ClassVar[tuple[str, ...]] = ("machine", "run")
    machine: str
    processor: str
    cores: int | None
    kernels: str
    jax: str
    python: str
    date: str
    revision: str
    run: str
    note: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProductRow(Row):
    """One matrix product of cpu_matmul.py. `shape` is OUTxIN, `ratio_to_dense_f32` is a ratio of speeds."""

    KEY = ("machine", "run", "bits", "shape", "batch", "rival")
    memory_gb_per_s: float | None = figure(1)
    bits: int
    shape: str
    batch: int
    rival: str
    median_ms: float | None = figure(3)
    least_ms: float | None = figure(3)
    ratio_to_dense_f32: float | None = figure(2)
    gb_per_s: float | None = figure(1)
    weight_bytes: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationRow(Row):
    """One rival of cpu_decode.py. Speeds are medians over turns, ratios are ratios of speeds."""

    KEY = ("machine", "run", "model", "rival")
    memory_gb_per_s: float | None = figure(1)
    model: str
    rival: str
    turns: int | None = None
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    tokens_per_s: float | None = figure(1)
    least_tokens_per_s: float | None = figure(1)
    most_tokens_per_s: float | None = figure(1)
    ratio_to_dense_f32: float | None = figure(2)
    ratio_to_llama_q4_1: float | None = figure(2)
    prefill_tokens_per_s: float | None = figure(0)
    prefill_ratio_to_dense_f32: float | None = figure(2)
    weights_mb: float | None = figure(0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StartRow(Row):
    """One command of first_and_second_run.py. Seconds are of the whole process."""

    KEY = ("machine", "run", "model", "command")
    model: str
    command: str
    turns: int
    first_s: float | None = figure(1)
    first_programs: int
    second_s: float | None = figure(1)
    second_programs: int
    ratio: float | None = figure(2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryRow(Row):
    """What a process that generates holds (cpu_memory.py); MB are 10^6 bytes."""

    KEY = ("machine", "run", "model")
    model: str
    runtime_mb: float | None = figure(0)
    weights_mb: float | None = figure(0)
    cache_mb: float | None = figure(0)
    held_mb: float | None = figure(0)
    excess_percent: float | None = figure(0)
    peak_mb: float | None = figure(0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadRow(Row):
    """What reading a file takes at most (load_memory.py); GiB are 2^30 bytes."""

    KEY = ("machine", "run", "layers", "file", "read_as")
    layers: int
    file: str
    read_as: str
    weights_gib: float | None = figure(2)
    peak_gib: float | None = figure(2)
    ratio: float | None = figure(2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizeRow(Row):
    """One part of quantizing (quantize_time.py): wall-clock and CPU seconds."""

    KEY = ("machine", "run", "problem", "part")
    problem: str
    part: str
    wall_s: float | None = figure(3)
    cpu_s: float | None = figure(3)
    peak_gib: float | None = figure(2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareRow(Row):
    """Seconds of perplexity and comparison (compare_cost.py)."""

    KEY = ("machine", "run", "model", "seqlen", "windows", "rival")
    model: str
    seqlen: int
    windows: int
    rival: str
    median_s: float | None = figure(2)
    ratio_to_dense_perplexity: float | None = figure(2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AcceleratorRow(Row):
    """One product on a GPU or TPU (accelerator_check.py). `ratio_to_dense_16bit` is a ratio of speeds."""

    KEY = ("machine", "run", "shape", "batch", "rival")
    shape: str
    batch: int
    rival: str
    median_us: float | None = figure(1)
    ratio_to_dense_16bit: float | None = figure(2)


RowType = TypeVar("RowType", bound=Row)


def read(path: Path, row_type: type[RowType]) -> list[RowType]:
    """The rows of a CSV file.

    Raises:
      TimingsError: other columns, or a cell that is not of its column's type.
      OSError: the file cannot be read.
    """
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file, restkey="", strict=True)
        check_header(path, list(reader.fieldnames or []), row_type)
        return [_parse(path, reader.line_num, cells, row_type) for cells in reader]


def check_header(path: Path, header: list[str], row_type: type[Row]) -> None:
    """Raises TimingsError where a file's columns are not those of the rows."""
    expected = _columns(row_type)
    if header == expected:
        return
    missing = [name for name in expected if name not in header]
    unknown = [name for name in header if name not in expected]
    if missing or unknown:
        difference = f"missing: {', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'}"
    else:
        difference = "the same columns in another order"
    raise TimingsError(
        f"{path} does not have the columns of {row_type.__name__} ({difference}). "
        "Give --csv another file, or correct the first line of this one."
    )


def merge(path: Path, rows: Iterable[Row]) -> None:
    """Adds rows to a CSV file (it may not exist yet); each replaces an older row with the same key.

    Raises:
      TimingsError: the file has other columns. It stays as it was.
    """
    rows = list(rows)
    if not rows:
        return
    row_type = type(rows[0])
    by_key = {_key(row): row for row in (read(path, row_type) if path.exists() else [])}
    by_key.update({_key(row): row for row in rows})
    text = io.StringIO()
    writer = csv.DictWriter(text, _columns(row_type), lineterminator="\n")
    writer.writeheader()
    writer.writerows(texts(row) for row in by_key.values())
    write_file(path, text.getvalue())


def texts(row: Row) -> dict[str, str]:
    """A row's cells by column, as they are in the file."""
    return {name: _cell(row, name) for name in _columns(type(row))}


def _columns(row_type: type[Row]) -> list[str]:
    """The fields in order, `note` last."""
    names = [field.name for field in dataclasses.fields(row_type) if field.name != "note"]
    return [*names, "note"]


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(getattr(row, name) for name in row.KEY)


def _cell(row: Row, name: str) -> str:
    value, digits = getattr(row, name), row.__dataclass_fields__[name].metadata.get("digits")
    if value is None:
        return ""
    return str(value) if digits is None else f"{value:.{digits}f}"


def _parse(path: Path, line: int, cells: dict[str, Any], row_type: type[RowType]) -> RowType:
    values: dict[str, Any] = {}
    if "" in cells or None in cells.values():
        raise TimingsError(f"{path}, line {line}: the number of cells is not the number of columns")
    for name, hint in get_type_hints(row_type).items():
        if name not in cells:
            continue  # KEY
        text = cells[name]
        optional = hint in (float | None, int | None)
        convert = str if hint is str else float if hint == float | None else int
        try:
            values[name] = None if optional and not text else convert(text)
        except ValueError:
            raise TimingsError(f"{path}, line {line}: {name} is {text!r}, not a number") from None
    return row_type(**values)


def add_csv_options(parser: argparse.ArgumentParser, file: str) -> None:
    """Options of every script that measures; `file` is its file in benchmarks/results."""
    group = parser.add_argument_group("results")
    group.add_argument("--csv", type=Path, help=f"add the figures to this CSV file, such as benchmarks/results/{file}")
    group.add_argument("--machine", help="short name of this machine in the file (default: its processor and cores)")
    group.add_argument("--run", help="name of this run in the file (default: today's date)")


def check_csv(parser: argparse.ArgumentParser, path: Path | None, row_type: type[Row]) -> None:
    """Ends the script before it measures anything if the file cannot take its rows."""
    if path is None or not path.exists():
        return
    try:
        read(path, row_type)
    except (TimingsError, OSError) as error:
        parser.error(str(error))


def save(path: Path | None, row_type: type[Row], options: argparse.Namespace, rows: Iterable[dict[str, Any]]) -> None:
    """Adds one row for each dict (the columns after those of `Row`) to the file that `--csv` names, if any."""
    if path is None:
        return
    common = describe_machine(options.machine, options.run)
    merge(path, [row_type(**common, **values) for values in rows])
    print(f"figures: {path}")


def describe_machine(machine: str | None, run: str | None) -> dict[str, Any]:
    """The columns of `Row` for this machine, today."""
    import cpu_kernels  # imports jax

    processor, cores = _processor(), os.cpu_count() or 1
    today = datetime.date.today().isoformat()
    return {
        "machine": machine or f"{processor} ({cores} cores)",
        "processor": processor,
        "cores": cores,
        "kernels": "none" if cpu_kernels.why_unavailable() else cpu_kernels.kernel_names()[0],
        "jax": importlib.metadata.version("jax"),
        "python": platform.python_version(),
        "date": today,
        "revision": _revision(),
        "run": run or today,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _revision() -> str:
    """The commit of this repository, with "-dirty" if files differ from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return UNKNOWN
    return done.stdout.strip()
