"""Single files of text: checked before the work, whole or not there after it."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from spqr_jax.errors import CheckpointError
from spqr_jax.output.claim import explained
from spqr_jax.output.interruptions import interruptions_wait


def check_file(path: Path) -> None:
    """Says at once what would keep `write_file` from writing.

    Raises:
      CheckpointError: with the reason.
    """
    with explained(path):
        if path.is_dir():
            raise CheckpointError(f"cannot write {path}: it is a directory; give the name of a file")
        if _is_device(path):
            if not os.access(path, os.W_OK):
                raise CheckpointError(f"cannot write {path}: it is not writable")
            return
        place = Path(os.path.realpath(path))
        if not place.parent.is_dir():
            raise CheckpointError(f"cannot write {path}: there is no directory {path.parent}; create it first")
        if place.exists():
            os.close(os.open(place, os.O_WRONLY | os.O_APPEND))
        else:
            with interruptions_wait():
                os.close(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
                place.unlink()


def write_file(path: Path, text: str) -> None:
    """Writes text as UTF-8: all of it, or the file stays as it was. What is no file, such as a pipe, is written to.

    What UTF-8 does not have, such as bytes of another encoding in a file's name, is written as an escape.

    Raises:
      CheckpointError: it cannot be written, with the reason.
    """
    data = text.encode("utf-8", "backslashreplace")
    with explained(path), interruptions_wait():
        place = Path(os.path.realpath(path))
        partial = None if _is_device(path) else _beside(place)
        if partial is None:
            path.write_bytes(data)
            return
        try:
            with open(partial, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.chmod(place.stat().st_mode & 0o777 if place.exists() else 0o666 & ~_umask())
            os.replace(partial, place)
        finally:
            partial.unlink(missing_ok=True)


def _is_device(path: Path) -> bool:
    """A pipe or terminal, such as /dev/stdout: it is written to, never replaced."""
    return path.exists() and not path.is_file()


def _beside(place: Path) -> Path | None:
    """A new file in the same folder; None where none can be made, though the file itself may be writable."""
    with contextlib.suppress(OSError):
        descriptor, name = tempfile.mkstemp(prefix=f".{place.name[:100]}.partial-", dir=place.parent)
        os.close(descriptor)
        return Path(name)
    return None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
