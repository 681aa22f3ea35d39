"""What is written reaches the disk: a power cut later finds it."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

_LOSES_DATA = (errno.EIO, errno.ENOSPC, errno.EDQUOT)


def flush_tree(directory: Path) -> None:
    """Everything below a directory, and the directory itself. The name of the directory is its parent's."""
    for folder, _, files in os.walk(directory):
        for file in files:
            flush_file(os.path.join(folder, file))
        flush_folder(Path(folder))


def flush_folder(path: Path) -> None:
    """The names in a directory, without the content of its files."""
    with contextlib.suppress(PermissionError):  # one that may be written to but not listed
        flush_file(str(path))


def flush_file(path: str) -> None:
    """The content of a file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        flush(descriptor)
    finally:
        os.close(descriptor)


def flush(descriptor: int) -> None:
    """The content of an open file.

    Raises:
      OSError: data is lost.
    """
    try:
        os.fsync(descriptor)
    except OSError as error:  # not every file system can; what it says of data that is lost counts
        if error.errno in _LOSES_DATA:
            raise
