"""The figures of a report, as SVG that takes the page's colours. matplotlib (the `plots` extra) does the drawing."""

from __future__ import annotations

import html
import io
import itertools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from spqr_jax.analysis import ModelAnalysis
from spqr_jax.errors import SpQRError
from spqr_jax.report.runs import Run

_FOREGROUND = "#010203"
"""Drawn where the page's own text colour should be."""
_COLOURS = ("#2f7ed8", "#e07b39", "#3a9a5b", "#c2478d", "#8468c4", "#a8862c", "#4aa3a2", "#8a8f98")
_COUNTER = itertools.count()  # names inside one page's figures must differ


def _style() -> Any:
    """matplotlib's settings while drawing and writing; a context, so that its other users keep theirs."""
    try:
        import matplotlib
    except ImportError:
        raise SpQRError("figures need matplotlib: pip install 'spqr-jax[plots]'") from None
    style: dict[Any, Any] = {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9, "axes.titlesize": 9}
    for name in ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color"):
        style[name] = _FOREGROUND
    return matplotlib.rc_context(style)


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, np.ndarray]:
    with _style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
    for one in axes.flat:
        one.set_facecolor("none")
        for side in ("top", "right"):
            one.spines[side].set_visible(False)
    return figure, axes


def to_svg(figure: Any, description: str) -> str:
    """The figure as an SVG element: the page's text colour, names of its own, a text for those who cannot see it."""
    buffer = io.StringIO()
    with _style():
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(_FOREGROUND, "currentColor")
    prefix = f"f{next(_COUNTER)}-"
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}\1"', svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{prefix}\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}\1)", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(description)}" ', 1)


def to_png(figure: Any, path: Any) -> None:
    """The same figure as a file, on white."""
    figure.savefig(path, dpi=110, facecolor="white")  # the foreground is black there


def kinds_of(paths: Sequence[str]) -> list[str]:
    """Names of matrices within a block, in order of first appearance."""
    return list(dict.fromkeys(path.split(".", 2)[2] for path in paths if path.startswith("layers.")))


def _by_kind_and_block(values: dict[str, float]) -> tuple[list[str], np.ndarray]:
    """[kinds, blocks], nan where there is none."""
    kinds = kinds_of(list(values))
    blocks = 1 + max(int(path.split(".")[1]) for path in values if path.startswith("layers."))
    table = np.full((len(kinds), blocks), np.nan)
    for path, value in values.items():
        if path.startswith("layers."):
            _, block, kind = path.split(".", 2)
            table[kinds.index(kind), int(block)] = np.nan if value is None else value
    return kinds, table


def heat(values: dict[str, float], label: str) -> Any:
    """One cell a matrix: kinds down, blocks across."""
    kinds, table = _by_kind_and_block(values)
    figure, axes = _figure(8, 0.75 + 0.24 * len(kinds))
    image = axes[0, 0].imshow(table, aspect="auto", cmap="viridis", interpolation="nearest")
    axes[0, 0].set_yticks(range(len(kinds)), kinds)
    axes[0, 0].set_xlabel("block")
    figure.colorbar(image, ax=axes[0, 0], label=label)
    return figure


def by_depth(values: dict[str, float], label: str) -> Any:
    """A line a kind over the blocks."""
    kinds, table = _by_kind_and_block(values)
    figure, axes = _figure(8, 3.2)
    for kind, row, colour in zip(kinds, table, itertools.cycle(_COLOURS), strict=False):
        axes[0, 0].plot(row, label=kind, color=colour, linewidth=1.4, marker="o", markersize=2.5)
    axes[0, 0].set_xlabel("block")
    axes[0, 0].set_ylabel(label)
    axes[0, 0].set_ylim(bottom=0)
    axes[0, 0].grid(alpha=0.2)
    axes[0, 0].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return figure


def by_column(analysis: ModelAnalysis) -> Any:
    """Where among the columns, in the solver's order, the cost lies: the mean over blocks, a line a kind."""
    figure, axes = _figure(8, 3.0)
    kinds = kinds_of([weight.path for weight in analysis.weights])
    for kind, colour in zip(kinds, itertools.cycle(_COLOURS), strict=False):
        shares = np.mean([weight.by_column for weight in analysis.weights if weight.kind == kind], axis=0)
        places = (np.arange(len(shares)) + 0.5) / len(shares)
        axes[0, 0].plot(100 * places, 100 * shares, label=kind, color=colour, linewidth=1.4)
    axes[0, 0].set_xlabel("position in the solver's column order, %")
    axes[0, 0].set_ylabel("share of cost, %")
    axes[0, 0].set_ylim(bottom=0)
    axes[0, 0].grid(alpha=0.2)
    axes[0, 0].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return figure


def structure_shares(analysis: ModelAnalysis) -> Any:
    """What the costliest 1% of weights are made of, kind by kind, over all blocks."""
    kinds = kinds_of([weight.path for weight in analysis.weights])
    names = ("rows", "columns", "heads", "rotary", "unstructured")
    figure, axes = _figure(8, 0.8 + 0.28 * len(kinds))
    left = np.zeros(len(kinds))
    for name, colour in zip(names, _COLOURS, strict=False):
        if name == "unstructured":
            colour = _COLOURS[-1]
        own = [[w.structures.shares.get(name, 0.0) for w in analysis.weights if w.kind == kind] for kind in kinds]
        shares = [100 * np.mean(each) for each in own]
        axes[0, 0].barh(kinds, shares, left=left, label=name, color=colour)
        left += shares
    axes[0, 0].invert_yaxis()
    axes[0, 0].set_xlim(0, 100)
    axes[0, 0].set_xlabel("share of the 1% most costly weights, %")
    axes[0, 0].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return figure


def sensitivity_maps(maps: dict[str, np.ndarray], title: str = "") -> Any:
    """Maps side by side, each on a logarithmic scale from its median up."""
    columns = min(4, len(maps))
    rows = -(-len(maps) // columns)
    figure, axes = _figure(8, 2.2 * rows + 0.2, rows, columns)
    for one in axes.flat[len(maps) :]:
        one.set_visible(False)
    for one, (path, values) in zip(axes.flat, maps.items(), strict=False):
        positive = values[values > 0]
        low, high = np.quantile(positive, (0.5, 0.9995)) if positive.size else (1.0, 10.0)
        shown = np.log10(np.maximum(values, low)) - np.log10(low)
        one.imshow(shown, cmap="magma", interpolation="nearest", vmin=0, vmax=max(np.log10(high / low), 0.1))
        one.set_title(path.replace("layers.", ""))
        one.set_xticks([])
        one.set_yticks([])
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def perplexity_by_bits(runs: Sequence[Run], data: str) -> Any | None:
    """Perplexity against stored bits of the runs measured on one text; None where fewer than two were."""
    points = [
        (run.summary["stored_bits"], result["perplexity"], run.label, result.get("dense_perplexity"))
        for run in runs
        if run.summary is not None
        for result in run.results
        if result.get("data") == data and "perplexity" in result
    ]
    if len({label for _, _, label, _ in points}) < 2:
        return None
    figure, axes = _figure(8, 3.6)
    for (bits, perplexity, label, _), colour in zip(points, itertools.cycle(_COLOURS), strict=False):
        axes[0, 0].scatter([bits], [perplexity], color=colour, s=36, label=label.rsplit("/", 1)[-1], zorder=3)
    for dense in sorted({point[3] for point in points if point[3] is not None})[:1]:
        axes[0, 0].axhline(dense, color=_FOREGROUND, linewidth=0.8, linestyle="--", label=f"dense model: {dense:.2f}")
    axes[0, 0].set_xlabel("stored bits per weight")
    axes[0, 0].set_ylabel("perplexity")
    axes[0, 0].margins(0.12)
    axes[0, 0].grid(alpha=0.2)
    axes[0, 0].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return figure
