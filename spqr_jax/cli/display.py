"""What the terminal shows: progress, tables, messages. `rich` does the drawing.

Text is never markup here: paths, model names and texts may hold brackets. What is to be
bold or dim is given as such, see `tell`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column, Table
from rich.text import Text

from spqr_jax.cli import interrupt
from spqr_jax.events import Event, Events
from spqr_jax.job.report import LayerReport
from spqr_jax.output import write_file
from spqr_jax.planning.budget import Plan

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


class _TimeLeft(ProgressColumn):
    """Time left at the average pace so far; steps come in bursts, so a recent pace would mislead."""

    def render(self, task: Task) -> Text:
        if not task.completed or task.total is None or task.elapsed is None:
            return Text("-:-- left")
        seconds = round(task.elapsed / task.completed * (task.total - task.completed))
        return Text(f"{seconds // 60}:{seconds % 60:02d} left")


@contextmanager
def progress_bar(label: str, total: int) -> Iterator[Callable[[str], None]]:
    """A bar with time left; yields a function that advances it by one and notes what is done."""
    with _bar() as bar:
        task = bar.add_task(label, total=total, note="")

        def advance(note: str) -> None:
            interrupt.check()
            bar.update(task, advance=1, note=note)

        yield advance


@contextmanager
def counted_bar(label: str) -> Iterator[Events]:
    """A bar with time left, `label` until the first event; yields what shows events in it, one phase after another."""
    with _bar() as bar:
        task = bar.add_task(label, total=None, note="")
        phase = ""

        def show(event: Event) -> None:
            nonlocal phase
            interrupt.check()
            if event.phase != phase:
                phase = event.phase
                bar.reset(task, description=phase)
            bar.update(task, completed=event.done, total=event.total, note=event.note)

        yield show


@contextmanager
def _bar() -> Iterator[Progress]:
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        _TimeLeft(),
        TextColumn(
            "{task.fields[note]}", style="dim", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")
        ),
        console=errors,
    )
    interrupt.check()
    with bar:
        yield bar


class QuantizeProgress:
    """The live view of `spqr quantize`: a bar, and one line a block."""

    def __init__(self, advance: Callable[[str], None]) -> None:
        self._advance = advance
        self._block: list[LayerReport] = []
        self.reports: list[LayerReport] = []
        errors.print(
            f"{'block':>12}  {'error':>7}  {'worst weight':>18}  {'outliers':>8}  {'ideal':>6}  {'stored':>6}",
            style="bold",
        )

    def __call__(self, report: LayerReport) -> None:
        if self._block and _block_of(report.path) != _block_of(self._block[0].path):
            self._print_block()
        self._block.append(report)
        self.reports.append(report)
        self._advance(f"{report.path}  error {report.stats.output_error:.3f}")

    def finish(self) -> None:
        """Prints the last block."""
        if self._block:
            self._print_block()

    def _print_block(self) -> None:
        block, self._block = self._block, []
        weights = sum(r.shape[0] * r.shape[1] for r in block)

        def mean(of: Callable[[LayerReport], float]) -> float:
            return sum(of(r) * r.shape[0] * r.shape[1] for r in block) / weights

        worst = max(block, key=lambda r: r.stats.output_error)
        name = worst.path.rpartition(".")[2]
        errors.print(
            f"{_block_of(block[0].path):>12}  {mean(lambda r: r.stats.output_error):7.3f}  "
            f"{name:>11} {worst.stats.output_error:6.3f}  {mean(lambda r: 100 * r.stats.outlier_share):7.2f}%  "
            f"{mean(lambda r: r.stats.ideal_bits):6.3f}  {mean(lambda r: r.stats.stored_bits):6.3f}"
        )


def describe_head(summary: dict[str, Any]) -> str:
    """What `summarize` says of the output head."""
    bits = summary["head_bits"]
    return "output head: dense" if bits is None else f"output head: {bits:.2f} stored bits per weight"


def show_plan(plan: Plan) -> None:
    """One line on how a budget is spent."""
    shares = ", ".join(f"{bits} bits for {100 * share:.0f}%" for bits, share in plan.share_of_bits().items())
    errors.print(
        f"plan for {plan.target_bits:g} stored bits per weight: {shares} of the weights; "
        f"expected increase of the loss: {plan.loss:.3f} nats per token"
    )


def _block_of(path: str) -> str:
    return ".".join(path.split(".")[:2])


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
