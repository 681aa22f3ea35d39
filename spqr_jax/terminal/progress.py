"""Bars with the time left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from spqr_jax.terminal import interrupt
from spqr_jax.terminal.display import errors


class _TimeLeft(ProgressColumn):
    """Time left at the average pace so far; steps come in bursts, so a recent pace would mislead."""

    def render(self, task: Task) -> Text:
        done = task.completed - task.fields.get("first", 0)  # less what was done before the bar began
        if done <= 0 or task.total is None or task.elapsed is None:
            return Text("-:-- left")
        seconds = round(task.elapsed / done * (task.total - task.completed))
        return Text(f"{seconds // 60}:{seconds % 60:02d} left")


@contextmanager
def progress_bar(label: str, total: int) -> Iterator[Callable[[str], None]]:
    """A bar with time left; yields a function that advances it by one and notes what is done."""
    interrupt.check()
    with new_bar() as bar:
        task = bar.add_task(label, total=total, note="")

        def advance(note: str) -> None:
            interrupt.check()
            bar.update(task, advance=1, note=note)

        yield advance


def new_bar() -> Progress:
    """A bar for tasks that have a `note`, on stderr."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        _TimeLeft(),
        TextColumn(
            "{task.fields[note]}", style="dim", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")
        ),
        console=errors,
    )
