"""Directories that get their name when they are whole."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Self

from spqr_jax.errors import CheckpointError


class AtomicDirectory:
    """A directory that grows under a temporary name beside its target.

    Use as a context manager: leaving it without an error finishes the directory and
    gives it its name; leaving it with one, Ctrl-C included, removes every trace.

    Args:
      path: directory to make.
      overwrite: replace an existing one, once the new one is whole.

    Attributes:
      partial: where to write.

    Raises:
      CheckpointError: `path` exists and `overwrite` is not set.
    """

    def __init__(self, path: Path | str, overwrite: bool = False) -> None:
        self._path = Path(path).absolute()
        refuse_existing(self._path, overwrite)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self.partial = Path(tempfile.mkdtemp(prefix=f".{self._path.name}.partial-", dir=self._path.parent))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        try:
            if kind is None:
                self.finish()
                self._give_name()
        finally:
            shutil.rmtree(self.partial, ignore_errors=True)

    def finish(self) -> None:
        """Writes what remains, or refuses to; for those that build on this."""

    def _give_name(self) -> None:
        self.partial.chmod(0o755)  # mkdtemp's own is for this user alone
        if self._path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{self._path.name}.old-", dir=self._path.parent))
            os.replace(self._path, old / "old")
            os.replace(self.partial, self._path)
            shutil.rmtree(old)
        else:
            os.replace(self.partial, self._path)


def refuse_existing(path: Path | str, overwrite: bool) -> None:
    """Says at once what an `AtomicDirectory` would say, before work is done for it.

    Raises:
      CheckpointError: `path` exists and `overwrite` is not set.
    """
    if Path(path).exists() and not overwrite:
        raise CheckpointError(f"{path} exists already: choose another directory, or ask to overwrite it")
