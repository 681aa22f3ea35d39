"""What long work tells of itself, in one form for all of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Event:
    """One step of a phase of the work.

    The first event of a phase has `done` 0: it says how many steps there will be.

    Attributes:
      phase: what goes on, as a word for a progress bar: ``measuring``, ``quantizing``, ``tuning``, ``reading``.
      done: steps of this phase that are done.
      total: steps of this phase in all.
      note: what was done last, for people.
      detail: what was done last, for programs: a `LayerReport`, a `Plan`; None where there is nothing to say.
    """

    phase: str
    done: int
    total: int
    note: str = ""
    detail: Any = None


@dataclasses.dataclass(frozen=True)
class Remark:
    """An event's `detail` that is a line for people."""

    text: str


@dataclasses.dataclass(frozen=True)
class SafePoint:
    """An event's `detail` where a run that is stopped loses nothing.

    Attributes:
      save: saves what is not saved yet; to be called before the event raises. It may be called only during the event.
    """

    save: Callable[[], None] = lambda: None


Events = Callable[[Event], None]
"""Is told of each step. It may raise to stop the work: nothing is then half-written."""


def ignore(event: Event) -> None:
    """Takes an event and does nothing."""


class Steps:
    """Counts the steps of one phase.

    Args:
      phase: as in `Event`.
      total: number of steps in all.
      events: told of each step, and once before the first.
    """

    def __init__(self, phase: str, total: int, events: Events = ignore) -> None:
        self._phase, self._total, self._events = phase, total, events
        self.done = 0
        events(Event(phase, 0, total))

    def advance(self, count: int = 1, note: str = "", detail: Any = None) -> None:
        """Notes that `count` more steps are done."""
        self.done += count
        self._events(Event(self._phase, self.done, self._total, note, detail))
