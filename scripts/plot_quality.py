#!/usr/bin/env python3
"""Draws docs/images/quality.png from benchmarks/results/quality.csv: perplexity against bits per weight.

    scripts/plot_quality.py              draw (needs matplotlib: the extra `plots`)
    scripts/plot_quality.py --check      exit with 1 if the picture was drawn from other numbers

The picture carries the numbers it was drawn from as a PNG text chunk; --check compares them with the CSV.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import struct
import sys
from pathlib import Path
from typing import Any

from quality_csv import RESULTS, read_rows

PICTURE = Path(__file__).parent.parent / "docs" / "images" / "quality.png"
TEXTS = ("WikiText-2 test", "PTB validation")
CURVES = {
    "spqr-jax": ("spqr-jax 3bit", "spqr-jax 4bit (default)", "spqr-jax near-lossless"),
    "spqr-jax, tuned": ("spqr-jax 3bit, tuned", "spqr-jax 4bit, tuned", "spqr-jax near-lossless, tuned"),
    "public SpQR": ("public SpQR, 3 bits, τ 1.0", "public SpQR, 3 bits, τ 0.2", "public SpQR, 4 bits, τ 0.2"),
    "GPTQ 4-bit": ("GPTQ, 4 bits, groups of 64",),
    "GPTQ 3-bit": ("GPTQ, 3 bits, groups of 64",),
    "round to nearest 3-bit": ("round to nearest, 3 bits, groups of 16",),
    "dense": ("dense model",),
}

# From the palette of Okabe and Ito, which colour-blind people can tell apart; each curve has its own marker, too.
BLUE, ORANGE, GRAY, BLACK = "#0072B2", "#C24E00", "#595959", "#1A1A1A"

FOOTNOTE = (
    "Model: SmolLM2-135M-Instruct. Bits are stored bits. "
    "*No stored size is published: bits by the paper's formula (for spqr-jax, 0.07 lower)."
)

Points = list[tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Panel:
    """One text: its name, and the (bits per weight, perplexity) of each curve."""

    text: str
    curves: dict[str, Points]


def read_panels() -> list[Panel]:
    """The numbers of the picture. Bits are stored bits, or ideal bits where no stored size is published."""
    rows = {(row["name"], row["text"]): row for row in read_rows(RESULTS / "quality.csv") if row["table"] == "main"}

    def point(name: str, text: str) -> tuple[float, float]:
        row = rows[name, text]
        return float(row["stored_bits"] or row["ideal_bits"]), float(row["perplexity"])

    return [Panel(text, {label: [point(n, text) for n in names] for label, names in CURVES.items()}) for text in TEXTS]


def as_text(panels: list[Panel]) -> str:
    """The numbers as they are written into the picture."""
    return json.dumps([dataclasses.asdict(panel) for panel in panels])


def text_chunk(png: bytes, keyword: str) -> str | None:
    """The value of a PNG's tEXt chunk, or None."""
    position = 8  # after the signature
    while position < len(png):
        length, name = struct.unpack_from(">I4s", png, position)
        data = png[position + 8 : position + 8 + length]
        if name == b"tEXt" and data.startswith(keyword.encode() + b"\0"):
            return data[len(keyword) + 1 :].decode("latin-1")
        position += 12 + length
    return None


def draw_curves(axes: Any, panel: Panel) -> None:
    """The points and the axes that both panels share. A line joins presets: `--target-bits` gives sizes between."""
    curves = panel.curves
    axes.axhline(curves["dense"][0][1], color=BLACK, linestyle=(0, (6, 4)), linewidth=2)
    axes.plot(*zip(*curves["public SpQR"], strict=True), "D", color=ORANGE, markerfacecolor="white")
    axes.plot(*zip(*curves["GPTQ 4-bit"], strict=True), "s", color=GRAY)
    axes.plot(*zip(*curves["spqr-jax, tuned"], strict=True), ":^", color=BLUE, markerfacecolor="white")
    axes.plot(*zip(*curves["spqr-jax"], strict=True), "-o", color=BLUE)
    axes.grid(axis="y", color="#E4E4E4", linewidth=1)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("bits per weight")


def label(
    axes: Any, text: str, point: tuple[float, float], offset: tuple[float, float], color: str, **style: Any
) -> None:
    """Writes beside a point; the offset is in points of 1/72 inch."""
    axes.annotate(text, point, offset, textcoords="offset points", color=color, **style)


def label_wikitext2(axes: Any, panel: Panel) -> None:
    """Names and perplexities at the points of the left panel."""
    curves = panel.curves
    three, four, near = curves["spqr-jax"]
    label(axes, "spqr-jax presets", three, (9, 30), BLUE, weight="bold")
    label(axes, f"3bit  {three[1]:.1f}", three, (9, 6), BLUE)
    label(axes, f"4bit (default)  {four[1]:.1f}", four, (-14, 24), BLUE)
    label(axes, f"near-lossless  {near[1]:.1f}", near, (13, -2), BLUE)
    three, four, near = curves["spqr-jax, tuned"]
    label(axes, f"{three[1]:.1f}", three, (-11, -6), BLUE, ha="right")
    label(axes, f"with --tune logits: {four[1]:.1f}", four, (-10, -25), BLUE, ha="right")
    label(axes, f"{near[1]:.1f}", near, (13, -17), BLUE)
    first, second, third = curves["public SpQR"]
    label(axes, "public PyTorch SpQR*", first, (14, 16), ORANGE, weight="bold")
    label(axes, f"3-bit codes  {first[1]:.1f}", first, (14, -6), ORANGE)
    label(axes, f"3-bit codes, more outliers  {second[1]:.1f}", second, (14, -6), ORANGE)
    label(axes, f"4-bit codes  {third[1]:.1f}", third, (9, 6), ORANGE)
    gptq, dense = curves["GPTQ 4-bit"][0], curves["dense"][0][1]
    label(axes, f"GPTQ 4-bit  {gptq[1]:.1f}", gptq, (12, -6), GRAY)
    label(axes, f"dense model  {dense:.1f}", (3.5, dense), (5, -21), BLACK)


def off_the_chart(panel: Panel, with_bits: bool) -> str:
    """The rows that are too high to draw."""
    lines = ["↑ off the chart"]
    for name in ("GPTQ 3-bit", "round to nearest 3-bit"):
        ((bits, perplexity),) = panel.curves[name]
        lines.append(f"{name}  {perplexity:.1f}" + f" (at {bits:.2f} bits)" * with_bits)
    return "\n".join(lines)


def as_palette(picture: bytes, description: str) -> bytes:
    """The same PNG with 48 colours, which is a third of the size, and the numbers as its description."""
    from PIL import Image, PngImagePlugin

    info, out = PngImagePlugin.PngInfo(), io.BytesIO()
    info.add_text("Description", description)
    colours = Image.open(io.BytesIO(picture)).convert("RGB").quantize(48, dither=Image.Dither.NONE)
    colours.save(out, "PNG", optimize=True, pnginfo=info)
    return out.getvalue()


def draw(panels: list[Panel], path: Path) -> None:
    """Writes the picture, 1400 × 620 pixels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {"font.size": 18, "font.family": "DejaVu Sans", "lines.linewidth": 3, "lines.markersize": 11}
    style |= {"lines.markeredgewidth": 2.5, "axes.linewidth": 1.2, "axes.titlesize": 20, "axes.titleweight": "bold"}
    style |= {"axes.titlelocation": "left", "axes.titlepad": 12}
    with pyplot.rc_context(style):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(14, 6.2), width_ratios=[2.1, 1])
        for axes, panel in zip((left, right), panels, strict=True):
            draw_curves(axes, panel)
            corner = {"ha": "right", "va": "top", "transform": axes.transAxes}
            axes.text(1, 1, off_the_chart(panel, axes is left), color=GRAY, fontsize=15, linespacing=1.25, **corner)
        left.set(xlim=(3.5, 5.3), ylim=(19, 27.5), xticks=[3.5, 4, 4.5, 5])
        right.set(xlim=(3.5, 4.95), ylim=(38.5, 60), xticks=[3.5, 4, 4.5], yticks=[40, 45, 50, 55, 60])
        left.set_title("WikiText-2 perplexity (lower is better)")
        right.set_title("Penn Treebank")
        label_wikitext2(left, panels[0])
        label(right, "dense model", (3.5, panels[1].curves["dense"][0][1]), (5, -21), BLACK)
        figure.tight_layout(rect=(0, 0.055, 1, 1), w_pad=2.5)
        figure.text(0.012, 0.02, FOOTNOTE, fontsize=14, color=GRAY)
        out = io.BytesIO()
        figure.savefig(out, dpi=100, facecolor="white")
    path.write_bytes(as_palette(out.getvalue(), as_text(panels)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare the picture's numbers with the CSV")
    panels = read_panels()
    if parser.parse_args().check:
        same = text_chunk(PICTURE.read_bytes(), "Description") == as_text(panels)
        if not same:
            print(f"{PICTURE} was drawn from other numbers: run scripts/plot_quality.py", file=sys.stderr)
        return 0 if same else 1
    draw(panels, PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
