"""Directories that get their name when they are whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from spqr_jax.output import Claim


class AtomicDirectory:
    """A directory that grows under a temporary name beside its target.

    Use as a context manager: leaving it without an error finishes the directory and
    gives it its name; leaving it with one, Ctrl-C included, removes every trace.

    Args:
      path: directory to make, or a `Claim` on it.
      overwrite: replace an existing one, once the new one is whole; a claim has its own.

    Attributes:
      partial: where to write.
      path: as given; afterwards, where the directory lies, which is elsewhere if
        something appeared under that name meanwhile.

    Raises:
      CheckpointError: it cannot be written, with the reason: `path` exists and
        `overwrite` is not set, another run writes to it, the disk is full.
    """

    def __init__(self, path: Path | str | Claim, overwrite: bool = False) -> None:
        self._claim = path if isinstance(path, Claim) else Claim(path, overwrite)
        self.partial = self._claim.partial

    @property
    def path(self) -> Path:
        return self._claim.path

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        try:
            if kind is None:
                with self._claim.writing():
                    self.finish()
                self._claim.give_name()
            elif self._claim.is_failure(error):
                raise self._claim.failure(error) from None
        finally:
            self._claim.release()

    def finish(self) -> None:
        """Writes what remains, or refuses to; for those that build on this."""
