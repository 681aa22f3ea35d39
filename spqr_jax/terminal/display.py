"""Messages, tables and files of results. `rich` does the drawing.

Text is never markup here: paths, model names and texts may hold brackets. What is to be
bold or dim is given as such, see `tell`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from spqr_jax.output import write_file

_GAP = 3  # between columns of a table
console = Console(highlight=False, markup=False, emoji=False)
errors = Console(stderr=True, highlight=False, markup=False, emoji=False)


def tell(*parts: str | tuple[str, str]) -> None:
    """Prints a result: texts, and (text, style) where one is to stand out, such as ``(name, "bold")``."""
    console.print(Text.assemble(*parts))


def say(message: str) -> None:
    """One dim line of what is going on."""
    errors.print(message, style="dim", soft_wrap=True)


def fail(message: str) -> None:
    """The one message of a command that cannot do what was asked."""
    errors.print(Text.assemble(("error:", "bold red"), " ", message), soft_wrap=True)


def number(value: float, digits: int = 2) -> str:
    """A number for a table; a dash where there is none."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "–"


def size(num_bytes: float) -> str:
    """Bytes as MB (10^6)."""
    return f"{num_bytes / 1e6:.1f} MB"


def table(title: str, columns: list[str], rows: list[list[str]], notes: str = "") -> None:
    """A table, first column left, the rest right. Where it is too wide, headings take a line for each word."""
    longest = [max((len(row[index]) for row in rows), default=0) for index in range(len(columns))]
    width = sum(max(len(column), cell) for column, cell in zip(columns, longest, strict=True))
    narrow = width + _GAP * (len(columns) - 1) > console.width
    drawn = Table(
        title=title,
        title_justify="left",
        caption=notes or None,
        caption_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1),
        collapse_padding=True,
    )
    for index, column in enumerate(columns):
        heading = "\n".join(column.split()) if narrow and len(column) > longest[index] else column
        drawn.add_column(heading, justify="left" if index == 0 else "right")
    for row in rows:
        drawn.add_row(*row)
    console.print(drawn)


def write_json(path: Path | None, values: dict[str, Any]) -> None:
    """Writes a command's result for machines; not-a-number becomes null."""
    if path is None:
        return

    def clean(value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            return None
        if isinstance(value, dict):
            return {key: clean(entry) for key, entry in value.items()}
        if isinstance(value, (list, tuple)):
            return [clean(entry) for entry in value]
        return value

    write_file(path, json.dumps(clean(values), indent=2) + "\n")
