"""A lock beside a name, so that two processes do not write to it at once.

The kernel releases it when a process ends, however it ends. Within a process several may
hold it (threads, nested uses): these see each other.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
from pathlib import Path

from spqr_jax.errors import CheckpointError

_NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)

_guard = threading.RLock()
_open_locks: dict[Path, list[int]] = {}
"""Lock file -> its descriptor and how many in this process hold it."""


class NameLock:
    """Held from here to `release`.

    Args:
      target: the name.

    Attributes:
      is_first: nobody in this process held it before.
      works: the file system has locks; without, nothing is known of other processes.

    Raises:
      CheckpointError: another process holds it.
      OSError: the lock's file cannot be made.
    """

    def __init__(self, target: Path) -> None:
        self._file = target.with_name(f".{target.name}.lock")
        self.works = True
        with _guard:
            self.is_first = self._file not in _open_locks
            if not self.is_first:
                _open_locks[self._file][1] += 1
                return
            descriptor = self._open(target)
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
            _open_locks[self._file] = [descriptor, 1]

    def release(self) -> None:
        """Gives it back; the last one in this process removes its file."""
        with _guard:
            entry = _open_locks[self._file]
            entry[1] -= 1
            if entry[1]:
                return
            del _open_locks[self._file]
            with contextlib.suppress(OSError):
                self._file.unlink()  # before it is released: whoever waits sees that its file is gone
            os.close(entry[0])

    def _open(self, target: Path) -> int:
        while True:
            descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                self.works = _lock(descriptor)
            except BlockingIOError:
                owner = os.pread(descriptor, 200, 0).decode("utf-8", "replace").strip()
                os.close(descriptor)
                raise CheckpointError(
                    f"another run ({owner or 'of an unknown process'}) is writing to {target}: wait for it, or choose "
                    "another directory"
                ) from None
            if _is_at(descriptor, self._file):
                return descriptor
            os.close(descriptor)  # its holder removed it meanwhile


def _lock(descriptor: int) -> bool:
    """Locks a file; False where that is not possible.

    Raises:
      BlockingIOError: another process has.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno in _NO_LOCKS_HERE:
            return False
        raise
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
