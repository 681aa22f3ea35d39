"""What commands show of long work: one view for all events, and a few lines about models."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Self

from rich.progress import Progress, TaskID

from spqr_jax.events import Event, Remark, SafePoint
from spqr_jax.forecast.words import short_duration
from spqr_jax.methods.report import LayerReport
from spqr_jax.planning.budget import Plan
from spqr_jax.terminal import interrupt
from spqr_jax.terminal.display import console, errors, fail, number, say, size, table, tell, write_json
from spqr_jax.terminal.progress import new_bar, progress_bar

__all__ = [
    "EventView", "console", "describe_head", "errors", "fail", "number", "progress_bar", "say",
    "show_plan", "size", "table", "tell", "write_json",
]  # fmt: skip

_EVERY = 30.0  # seconds between lines, where there is no terminal to draw a bar on


class EventView:
    """Shows events: a context manager that long work is given as its `events`.

    On a terminal each phase is a bar with the time left. Elsewhere, as in a log, a phase is a line when it
    starts, and then a line with the time left at least every 30 seconds; a thread sees to it where no event
    comes for longer. Quantized weights become one line a block. Raises KeyboardInterrupt where one got lost.

    Args:
      clock: seconds that only grow.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._blocks = clock, _BlockTable()
        self._bar: Progress | None = new_bar() if errors.is_terminal else None
        self._task: TaskID | None = None
        self._event: Event | None = None
        self._begun = self._said = clock()
        self._first = 0  # steps of the phase that were done before this run
        self._lock, self._left = threading.RLock(), threading.Event()

    def __enter__(self) -> Self:
        interrupt.check()
        if self._bar is not None:
            self._bar.start()
        else:
            threading.Thread(target=self._look, daemon=True).start()
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        self._left.set()
        with self._lock:
            if kind is None:
                self._blocks.finish()
            if self._bar is not None:
                self._bar.stop()
            self._event = None

    def __call__(self, event: Event) -> None:
        if isinstance(event.detail, SafePoint):
            interrupt.at_safe_point(event.detail.save)
        interrupt.check()
        if isinstance(event.detail, Remark):
            say(event.detail.text)
            return
        with self._lock:
            starts = self._event is None or self._event.phase != event.phase
            self._event = event
            if starts:
                self._begun, self._first = self._clock(), event.done
            self._draw(event, starts)
            if isinstance(event.detail, LayerReport):
                self._blocks.add(event.detail)
            if isinstance(event.detail, Plan):
                show_plan(event.detail)

    def tick(self) -> None:
        """Says where the work is if nothing was said for 30 seconds; a thread asks every second."""
        with self._lock:
            if self._event is not None and self._bar is None and self._clock() - self._said >= _EVERY:
                self._say(self._event)

    def _look(self) -> None:
        while not self._left.wait(1.0):
            self.tick()

    def _draw(self, event: Event, starts: bool) -> None:
        if self._bar is None:
            if starts:
                self._say(event)
            self.tick()
            return
        if starts or self._task is None:
            self._task = self._bar.add_task(event.phase, total=event.total, note="", first=event.done)
        self._bar.update(self._task, completed=event.done, total=event.total, note=_note(event, "  "))

    def _say(self, event: Event) -> None:
        """One line: where the work is, and how long it will take."""
        self._said = self._clock()
        words = [f"{event.phase} {event.done} of {event.total}"]
        if note := _note(event, ", "):
            words.append(note)
        done, elapsed = event.done - self._first, self._said - self._begun
        if done > 0:
            words.append(f"about {short_duration(elapsed / done * (event.total - event.done))} left")
        say(", ".join(words))


def _note(event: Event, separator: str) -> str:
    if isinstance(event.detail, LayerReport):
        return f"{event.note}{separator}error {event.detail.stats.output_error:.3f}"
    return event.note


class _BlockTable:
    """One line for each block's quantized weights."""

    def __init__(self) -> None:
        self._block: list[LayerReport] = []
        self._has_head = False

    def add(self, report: LayerReport) -> None:
        if self._block and _block_of(report.path) != _block_of(self._block[0].path):
            self.finish()
        self._block.append(report)

    def finish(self) -> None:
        """Prints the last block."""
        block, self._block = self._block, []
        if not block:
            return
        if not self._has_head:
            errors.print(
                f"{'block':>12}  {'error':>7}  {'worst weight':>18}  {'outliers':>8}  {'ideal':>6}  {'stored':>6}",
                style="bold",
            )
            self._has_head = True
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


def _block_of(path: str) -> str:
    return ".".join(path.split(".")[:2])


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
