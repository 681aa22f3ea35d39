"""Room on a file system, and why something could not be written."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)
"""No room, no quota."""
_NAMED_IN_TEXTS = (*FULL, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES)
_MOST = 300  # characters of another library's message


def readable_size(num_bytes: float) -> str:
    """Bytes in words: 3.2 GB, 140.5 MB (powers of ten)."""
    if num_bytes < 1e9:
        return f"{num_bytes / 1e6:.1f} MB"
    return f"{num_bytes / 1e9:.1f} GB"


def free_bytes(path: Path) -> int | None:
    """Bytes that may be written below `path`, which need not exist; None where the system does not say."""
    try:
        usage = shutil.disk_usage(_existing(path))
    except OSError:
        return None
    return usage.free if usage.total else None  # a total of 0 is no answer, as of /proc


def describe_free(path: Path) -> str:
    """How much room there is, in words; empty where the system does not say."""
    free = free_bytes(path)
    if free is None:
        return ""
    place = _existing(path)
    while not os.path.ismount(place):
        place = place.parent
    return f"{readable_size(free)} are free on {place}"


def why_not(error: BaseException, path: Path) -> str:
    """Why `path` cannot be written, in words, from what the system or another library raised."""
    number = errno_of(error)
    if (obstacle := _not_a_directory(path)) is not None:
        reason = f"{obstacle} is not a directory"
    elif number in (errno.ENOENT, errno.EPERM) and path.parent.is_dir():
        reason = f"nothing can be created in {path.parent}"
    elif number is not None:
        reason = os.strerror(number)
    else:
        reason = (" ".join(str(error).split()) or type(error).__name__)[:_MOST]
    if number == errno.EFBIG:
        reason += " for this file system or for the limit set in the shell (ulimit -f)"
    if number in FULL and (room := describe_free(path)):
        reason += f"; {room}: free some space, or choose another place"
    return reason


def errno_of(error: BaseException) -> int | None:
    """The system's number of an error; of libraries that tell it in words only, by these words."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    text = str(error)
    return next((number for number in _NAMED_IN_TEXTS if os.strerror(number) in text), None)


def _existing(path: Path) -> Path:
    """The nearest part of an absolute path that exists."""
    return next((place for place in (path, *path.parents) if place.exists()), Path("/"))


def _not_a_directory(path: Path) -> Path | None:
    """What stands where a folder above `path` should be; None for nothing."""
    return next((place for place in path.parents if os.path.lexists(place) and not place.is_dir()), None)
