"""The page: text, tables that sort and figures in one file, with nothing fetched from anywhere."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from importlib import resources
from typing import Any

import numpy as np

from spqr_jax.report import figures
from spqr_jax.report.records import calibration_in_words, in_digits
from spqr_jax.report.runs import Run, environment


@dataclasses.dataclass(frozen=True)
class Cell:
    """One field of a table: what is shown, and what it is sorted by."""

    text: str
    order: float | str


@dataclasses.dataclass(frozen=True)
class Table:
    """A table that sorts."""

    caption: str
    columns: list[str]
    rows: list[list[Cell]]


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure and what it shows."""

    svg: str
    caption: str


@dataclasses.dataclass(frozen=True)
class Section:
    """What the page says of one run."""

    title: str
    facts: list[tuple[str, str]]
    pictures: list[Picture]
    tables: list[Table]
    config: str
    command: str


def render_page(runs: Sequence[Run], title: str, command: str = "") -> str:
    """The report as HTML.

    Args:
      runs: what it is about, at least one.
      title: of the page.
      command: that makes it again.

    Raises:
      SpQRError: matplotlib is not installed.
    """
    import jinja2  # escapes what it fills in

    template = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = resources.files("spqr_jax.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    return template.from_string(source).render(
        title=title,
        summary=_summary_table(runs),
        pictures=_shared_pictures(runs),
        sections=[_section(run) for run in runs],
        environment=list(environment().items()),
        command=command,
    )


# ---- all runs side by side ---------------------------------------------------------------


def _number(value: Any, digits: int, suffix: str = "") -> Cell:
    if value is None or not math.isfinite(value):
        return Cell("–", math.inf)
    return Cell(f"{value:.{digits}f}{suffix}", float(value))


def _summary_table(runs: Sequence[Run]) -> Table:
    texts = list(dict.fromkeys(r["data"] for run in runs for r in run.results if "perplexity" in r))
    tasks = list(dict.fromkeys(task for run in runs for r in run.results for task in r.get("results", {})))
    columns = ["model", "method", "stored bits", "ideal bits", "outliers", "size, MB"]
    for text in texts:
        columns += [f"{what}, {_short(text)}" for what in ("perplexity", "KL", "same top token")]
    compared = [r for run in runs for r in run.results if "dense_perplexity" in r]
    dense = {(r.get("against"), r["data"]): r["dense_perplexity"] for r in compared}
    columns += tasks
    rows = []
    for run in runs:
        summary = run.summary or {}
        size = summary.get("bytes")
        row = [Cell(run.label, run.label), Cell(*(str(run.provenance.get("method", "dense")),) * 2)]
        row += [_number(summary.get("stored_bits", 32.0), 3), _number(summary.get("ideal_bits", 32.0), 3)]
        row += [_number(summary.get("outlier_percent", 0.0), 2, "%"), _number(size and size / 1e6, 1)]
        for text in texts:
            found: dict[str, Any] = {}
            for result in run.results:
                if result.get("data") == text:
                    found |= result
            same = found.get("same_top")
            row.append(_number(found.get("perplexity", dense.get((run.label, text))), 3))
            row.append(_number(found.get("kl_mean"), 4))
            row += [_number(None if same is None else 100 * same, 1, "%")]
        for task in tasks:
            row.append(_number(_accuracy(run, task), 4))
        rows.append(row)
    kept = [i for i in range(len(columns)) if i < 2 or any(row[i].text != "–" for row in rows)]
    return Table("All models", [columns[i] for i in kept], [[row[i] for i in kept] for row in rows])


def _short(data: str) -> str:
    """A text's name, or those of a mixture: of files that without their folders."""
    return " + ".join(re.sub(r"^(\S+ × )?.*/", r"\1", text) for text in data.split(" + "))


def _accuracy(run: Run, task: str) -> float | None:
    for result in run.results:
        metrics = result.get("results", {}).get(task, {})
        for name in ("acc_norm,none", "acc,none", "exact_match,none"):
            if isinstance(metrics.get(name), (int, float)):
                return float(metrics[name])
    return None


def _shared_pictures(runs: Sequence[Run]) -> list[Picture]:
    pictures = []
    for text in dict.fromkeys(r["data"] for run in runs for r in run.results if "perplexity" in r):
        figure = figures.perplexity_by_bits(runs, text)
        if figure is not None:
            caption = f"Perplexity on {_short(text)} against stored bits per weight, with all stored data counted."
            pictures.append(Picture(figures.to_svg(figure, "Perplexity against stored bits"), caption))
    return pictures


# ---- one run -----------------------------------------------------------------------------


def _section(run: Run) -> Section:
    pictures, tables = [], []

    def add(figure: Any, name: str, caption: str) -> None:
        pictures.append(Picture(figures.to_svg(figure, name), caption))

    layers = {} if run.summary is None else {p: v for p, v in run.summary["layers"].items() if p.startswith("layers.")}
    if layers:
        stored = {path: layer["stored_bits"] for path, layer in layers.items()}
        outliers = {path: layer["outlier_percent"] for path, layer in layers.items()}
        errors = {path: layer["output_error"] for path, layer in layers.items()}
        add(
            figures.heat(stored, "stored bits"),
            "Stored bits by block",
            "Stored bits per weight of each matrix, by block.",
        )
        add(
            figures.heat(outliers, "outliers, %"), "Outliers by block",
            "Percentage of each matrix's weights that are outliers, by block.",
        )  # fmt: skip
        if any(value is not None for value in errors.values()):
            add(
                figures.by_depth(errors, "relative output error"), "Output error by block",
                "Relative error of each matrix's output on the calibration text after quantization, ‖(W-Ŵ)X‖/‖WX‖.",
            )  # fmt: skip
    if run.analysis is not None:
        _add_analysis(run, add)
    rows = _weight_rows(run, layers)
    if rows:
        tables.append(Table("All matrices", *rows))
    config = run.setting.get("config") or (run.summary or {}).get("quantization")
    command = run.provenance.get("command") or run.setting.get("command", "")
    return Section(run.label, _facts(run), pictures, tables, json.dumps(config, indent=2) if config else "", command)


def _add_analysis(run: Run, add: Any) -> None:
    analysis = run.analysis
    assert analysis is not None
    top = {weight.path: 100 * weight.structures.top_share for weight in analysis.weights}
    add(
        figures.heat(top, "share of cost, %"), "Cost of the most costly weights",
        "Share of a matrix's rounding cost that its 1% most costly weights cause. With equal costs it would be 1%.",
    )  # fmt: skip
    add(
        figures.structure_shares(analysis), "Structures among the most costly weights",
        "Structures that the 1% most costly weights form: rows and columns with at least a tenth of their weights "
        "among them, attention heads and rotary pairs with at least three times the mean, and the rest. Mean over "
        "blocks.",
    )  # fmt: skip
    add(
        figures.by_column(analysis), "Cost by column",
        "How the cost is distributed over a matrix's columns, in the solver's column order. Mean over blocks.",
    )  # fmt: skip
    by_block: dict[int, dict[str, np.ndarray]] = {}
    for path, values in analysis.maps().items():
        by_block.setdefault(int(path.split(".")[1]), {})[path] = values
    for block, maps in by_block.items():
        add(
            figures.sensitivity_maps(maps), f"Sensitivities in block {block}",
            f"Block {block}: the cost of rounding each weight alone, in powers of ten above the median. Rows are "
            "outputs, columns are inputs. The maps are reduced so that thin rows and columns stay visible.",
        )  # fmt: skip


def _facts(run: Run) -> list[tuple[str, str]]:
    facts: list[tuple[str, str]] = []
    summary, origin = run.summary, run.provenance
    if summary is not None:
        head = summary["head_bits"]
        facts += [
            ("quantized from", str(origin.get("model", "unknown"))),
            ("method", str(origin.get("method", "unknown"))),
            (
                "bits per weight",
                f"{in_digits(summary['ideal_bits'], 3)} by the paper's formula, "
                f"{in_digits(summary['stored_bits'], 3)} stored",
            ),
            ("outliers", f"{in_digits(summary['outlier_percent'], 2)}%"),
            ("output head", "dense" if head is None else f"{head:.2f} stored bits per weight"),
            ("size", f"{summary['bytes'] / 1e6:.1f} MB (dense model: {summary['dense_bytes'] / 1e6:.1f} MB)"),
        ]
    for name, values in (("calibration", origin.get("calibration")), ("analysis", run.setting.get("calibration"))):
        if values:
            facts.append((name, calibration_in_words(values)))
    for result in run.results:
        if "perplexity" in result:
            text = f"{result['perplexity']:.4f} on {result['windows']} windows of {result['seqlen']} tokens"
            if "kl_mean" in result:
                text += f"; KL {result['kl_mean']:.4f} nats, same top token {100 * result['same_top']:.1f}%"
            facts.append((f"perplexity, {_short(result['data'])}", text))
    return facts


def _weight_rows(run: Run, layers: dict[str, Any]) -> tuple[list[str], list[list[Cell]]] | None:
    found = {} if run.analysis is None else {weight.path: weight for weight in run.analysis.weights}
    paths = list(layers or found)
    if not paths:
        return None
    columns, rows = ["weight", "shape"], []
    columns += ["bits", "stored", "outliers", "output error"] if layers else []
    columns += ["cost", "cost of top 1%", "rows", "columns", "heads", "rotary pairs", "unstructured"] if found else []
    for index, path in enumerate(paths):
        shape = layers[path]["shape"] if layers else list(found[path].shape)
        row = [Cell(path, index), Cell(f"{shape[0]}×{shape[1]}", float(shape[0] * shape[1]))]
        if layers:
            layer = layers[path]
            row += [_number(layer["bits"], 0), _number(layer["stored_bits"], 3)]
            row += [_number(layer["outlier_percent"], 2, "%"), _number(layer["output_error"], 4)]
        if found:
            weight = found.get(path)
            if weight is None:
                row += [Cell("–", math.inf)] * 7
            else:
                s = weight.structures
                row += [_number(weight.cost, 4), _number(100 * s.top_share, 1, "%")]
                row += [_number(len(each), 0) for each in (s.rows, s.columns, s.heads, s.rotary_pairs)]
                row += [_number(100 * s.shares["unstructured"], 1, "%")]
        rows.append(row)
    return columns, rows
