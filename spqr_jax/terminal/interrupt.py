"""Ctrl-C and termination, so that neither is ever lost.

Python raises where the program happens to be. If that is a destructor or a
callback from native code, the exception is printed or dropped and the program
goes on; long loops therefore ask again with `check`.
"""

from __future__ import annotations

import signal
from types import FrameType

_received: list[int] = []


def install() -> None:
    """From here on SIGINT and SIGTERM raise KeyboardInterrupt and are remembered."""
    _received.clear()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)


def check() -> None:
    """Raises KeyboardInterrupt if one was raised before and got lost."""
    if _received:
        raise KeyboardInterrupt


def received() -> bool:
    """Whether a signal came, also one whose exception another library turned into an error of its own."""
    return bool(_received)


def _stop(number: int, frame: FrameType | None) -> None:
    _received.append(number)
    raise KeyboardInterrupt
