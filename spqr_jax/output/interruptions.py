"""Steps that Ctrl-C and termination do not cut in two."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def interruptions_wait() -> Iterator[None]:
    """SIGINT and SIGTERM that come while the body runs are handled when it has ended.

    Other threads than the main one are never interrupted; there this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    earlier: dict[signal.Signals, Any] = {}

    def keep(number: int, frame: FrameType | None) -> None:
        came.append((number, frame))

    try:
        for which in _SIGNALS:
            earlier[which] = signal.signal(which, keep)
        yield
    finally:
        for which, handler in reversed(earlier.items()):
            signal.signal(which, signal.SIG_DFL if handler is None else handler)  # None: not set from Python
        for number, frame in came[:1]:
            _handle(number, frame)


def _handle(number: int, frame: FrameType | None) -> None:
    handler = signal.getsignal(number)
    if callable(handler):
        handler(number, frame)
    elif handler == signal.SIG_DFL:
        signal.raise_signal(number)
