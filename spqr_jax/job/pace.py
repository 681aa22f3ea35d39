"""How often work that takes long is saved."""

from __future__ import annotations

import time
from collections.abc import Callable

from spqr_jax.stream.hosts import ALONE, Together

SAVE_EVERY = 60.0  # seconds between two saves of one kind of work
_MOST_OF_THE_TIME = 0.1  # that saving may take; then it is rarer


class Pace:
    """Saves one kind of work once a minute, or more rarely where a save takes more than 6 seconds.

    Args:
      together: the processes that save at the same moment, by the clock of the first one.
    """

    def __init__(self, together: Together = ALONE) -> None:
        self._together = together
        self._last, self._seconds = time.perf_counter(), 0.0

    def save_if_due(self, save: Callable[[], None]) -> bool:
        """Calls `save` if it is time; whether it was."""
        begun = time.perf_counter()
        pause = SAVE_EVERY * max(1.0, self._seconds / (_MOST_OF_THE_TIME * 60))
        if not self._together.from_first(lambda: begun - self._last >= pause):
            return False
        save()
        self._last = time.perf_counter()
        self._seconds = self._last - begun
        return True
