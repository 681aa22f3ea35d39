"""Ctrl-C and termination, so that neither is ever lost.

Python raises where the program happens to be. If that is a destructor or a
callback from native code, the exception is printed or dropped and the program
goes on; long loops therefore ask again with `check`.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType

_received: list[int] = []
_waits = False
"""Whether the first signal waits for a safe point."""


def install() -> None:
    """From here on SIGINT and SIGTERM raise KeyboardInterrupt and are remembered."""
    _received.clear()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)


def check() -> None:
    """Raises KeyboardInterrupt if one was raised before and got lost."""
    if len(_received) > _waits:
        raise KeyboardInterrupt


def at_safe_point(save: Callable[[], None]) -> None:
    """If a signal came, also one that waited for this: calls `save`, after which nothing is lost, and raises.

    Raises:
      KeyboardInterrupt: a signal came.
    """
    if _received:
        save()
        raise KeyboardInterrupt


@contextlib.contextmanager
def at_safe_points() -> Iterator[None]:
    """In here the first signal takes effect at the next safe point, the second one at once."""
    global _waits
    _waits = True
    try:
        yield
    finally:
        _waits = False


def received() -> bool:
    """Whether a signal came, also one whose exception another library turned into an error of its own."""
    return bool(_received)


def ask() -> None:
    """As if the first signal had come, from elsewhere: the work stops at its next safe point."""
    if not _received:
        _received.append(signal.SIGTERM)


def _stop(number: int, frame: FrameType | None) -> None:
    _received.append(number)
    if len(_received) > _waits:
        raise KeyboardInterrupt
    with contextlib.suppress(RuntimeError, OSError, ValueError):  # it came during another line, or nobody reads
        sys.stderr.write("stopping once the work so far is saved; Ctrl-C again stops at once\n")
