"""Hidden directories beside a name: those that a run writes to, and what runs that were killed left.

    .NAME.partial-12345678   a result that grows, or an old one that is being removed
    .NAME.old-12345678/old   the previous NAME, for the moment in which the new one takes its place

Each holds a file that says that it is ours; others are never touched.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

from spqr_jax.output.flush import flush, flush_folder
from spqr_jax.output.space import readable_size

PARTIAL, OLD = "partial", "old"
_MARK, _NEW_MARK = ".spqr-unfinished", ".spqr-unfinished.new"
_RANDOM = "[a-z0-9_]{8}"  # what tempfile.mkdtemp adds


def make_hidden(target: Path, kind: str) -> Path:
    """A new hidden directory of ours beside `target`."""
    path = Path(tempfile.mkdtemp(prefix=f".{target.name}.{kind}-", dir=target.parent))
    write_mark(path)
    return path


def write_mark(path: Path, **more: str | None) -> None:
    """Says, on the disk, that a directory is ours, and which process it belongs to."""
    mark = {"written by": "spqr-jax", "process": os.getpid(), "host": socket.gethostname(), **more}
    with open(path / _NEW_MARK, "w", encoding="utf-8") as file:
        json.dump(mark, file)
        file.flush()
        flush(file.fileno())
    os.replace(path / _NEW_MARK, path / _MARK)
    flush_folder(path)


def read_mark(path: Path) -> dict[str, Any] | None:
    """What the mark of a directory says; None if it has no mark of ours."""
    try:
        mark = json.loads((path / _MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return mark if isinstance(mark, dict) else None


def remove_mark(path: Path) -> None:
    """Makes a hidden directory one that is to stay."""
    (path / _MARK).unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Removes a directory, with what threads of other libraries still write into it."""
    for attempt in range(5):
        with contextlib.suppress(OSError):
            for entry in path.iterdir():  # the mark goes last: a directory that keeps it is known to be ours
                if entry.name != _MARK:
                    shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
            flush_folder(path)
        shutil.rmtree(path, ignore_errors=True)
        if not path.exists():
            return
        time.sleep(0.02 * attempt)


def discard_old(target: Path, old: Path) -> None:
    """Removes what `target` has replaced; from the first step on nobody takes it for something to restore."""
    doomed = old.with_name(old.name.replace(f".{target.name}.{OLD}-", f".{target.name}.{PARTIAL}-"))
    os.rename(old, doomed)
    remove(doomed)


def clean_up(target: Path) -> list[str]:
    """Removes or restores what runs that were killed left beside a name that nobody else holds.

    Returns:
      What was done or is left to do, in words.
    """
    notes = []
    for old in hidden(target, OLD):
        if is_ours(old) and _is_empty(old):
            remove(old)
        elif not is_ours(old) or not os.path.lexists(old / "old"):
            notes.append(_left_alone(old))
        elif os.path.lexists(target):
            notes.append(
                f"{old / 'old'} ({_size(old)}) is another version of {target}, left by a run that was killed: "
                "look at both, and remove the one you do not need"
            )
        else:
            os.rename(old / "old", target)
            remove(old)
            notes.append(f"{target} was restored: a run was killed while it replaced this directory")
    for partial in hidden(target, PARTIAL):
        if is_ours(partial):
            notes.append(removed_note(partial))
            remove(partial)
        else:
            notes.append(_left_alone(partial))
    return notes


def are_beside(target: Path) -> bool:
    """Whether a run to the same name goes on, has been stopped or has been killed."""
    files = (target.parent / f".{target.name}.run", target.parent / f".{target.name}.lock")
    return any(map(os.path.lexists, files)) or bool(hidden(target, OLD) or hidden(target, PARTIAL))


def unfinished_note(path: Path) -> str:
    """What to add where nothing is at `path`, but a run that began to write it left something; empty for nothing."""
    target = Path(os.path.abspath(path))
    run = target.parent / f".{target.name}.run"
    if run.is_dir():
        return f"; an unfinished run is in {run}: if no process is writing there, run its command again with --resume"
    for kind, what in ((PARTIAL, "an unfinished result"), (OLD, "the previous content")):
        for directory in hidden(target, kind):
            return (
                f"; {what} is in {directory}: if no run is writing there now, run the command again with the same --out"
            )
    return ""


def removed_note(path: Path) -> str:
    return f"removed {path} ({_size(path)}), left by a run that was killed"


def _left_alone(path: Path) -> str:
    return (
        f"{path} ({_size(path)}) looks like a leftover of a killed run on this or another machine: remove it if no run "
        "uses it"
    )


def hidden(target: Path, kind: str) -> list[Path]:
    """Directories of a kind beside a name, whoever made them."""
    name = re.compile(rf"\.{re.escape(target.name)}\.{kind}-{_RANDOM}")
    try:
        entries = os.listdir(target.parent)
    except OSError:
        return []
    paths = (target.parent / entry for entry in sorted(entries) if name.fullmatch(entry))
    return [path for path in paths if path.is_dir() and not path.is_symlink()]


def is_ours(path: Path) -> bool:
    """Whether a run on this machine made it. A run on another may still be alive, though we hold the lock."""
    mark = read_mark(path)
    if mark is not None:
        return mark.get("host") == socket.gethostname()
    return _is_empty(path)  # killed before it could make its mark: nothing is lost


def _is_empty(path: Path) -> bool:
    """Whether there is nothing but a mark."""
    try:
        return set(os.listdir(path)) <= {_MARK, _NEW_MARK}
    except OSError:
        return False


def _size(path: Path) -> str:
    total = 0
    for folder, _, files in os.walk(path):
        for file in files:
            try:
                total += os.lstat(os.path.join(folder, file)).st_size
            except OSError:
                continue
    return readable_size(total)
