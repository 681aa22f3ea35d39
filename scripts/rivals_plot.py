"""The picture of scripts/rivals.py: KL divergence against stored bits; a panel for each text, a line a method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rivals_table import BASE, by_name, kl, points

_MARKERS = {BASE: "o", "SpQR, tuned": "D", "llama.cpp": "s", "GPTQ": "^", "AWQ": "v", "HQQ": "P", "RTN": "X"}

_NAMED = "llama.cpp"


def plot(
    path: Path, done: Sequence[dict[str, Any]], labels: Sequence[str] = (), description: str | None = None
) -> None:
    """Writes a PNG file; bars are the deviation over seeds. Of llama.cpp's types each point has its name.

    Args:
      path: of the file.
      done: rows, as scripts/rivals.py has them.
      labels: texts that have a panel; none for all.
      description: kept in the file.
    """
    import matplotlib  # the `plots` extra

    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels, methods = labels or list(done[0]["texts"]), list(dict.fromkeys(row["method"] for row in done))
    figure, panels = pyplot.subplots(
        1, len(labels), figsize=(4.4 * len(labels), 4.8), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, label in zip(panels[0], labels, strict=True):
        for method in methods:
            bits, mean, deviation = np.array(points(done, method, label)).T
            axes.errorbar(
                bits, mean, yerr=np.nan_to_num(deviation), label=method, marker=_MARKERS.get(method, "."),
                markersize=6, linestyle="-" if method.startswith(BASE) else "", linewidth=2, capsize=2,
                zorder=3 if method == BASE else 2,
            )  # fmt: skip
        for seeds in by_name(done).values():
            if seeds[0]["method"] == _NAMED:
                place = float(np.mean([row["stored_bits"] for row in seeds])), kl(seeds, label)[0]
                axes.annotate(seeds[0]["name"], place, (5, 3), textcoords="offset points", fontsize=7, color="#595959")
        axes.margins(x=0.13)
        axes.set_yscale("log")
        axes.set_xlabel("stored bits per weight")
        axes.set_title(label)
        axes.grid(alpha=0.3, which="both")
    panels[0][0].set_ylabel("KL divergence from the dense model, nats")
    panels[0][0].legend(fontsize=9)
    figure.savefig(path, dpi=110, metadata=None if description is None else {"Description": description})
