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

from spqr_jax.output.space import readable_size

PARTIAL, OLD = "partial", "old"
_MARK = ".spqr-unfinished"
_RANDOM = "[a-z0-9_]{8}"  # what tempfile.mkdtemp adds


def make_hidden(target: Path, kind: str) -> Path:
    """A new hidden directory of ours beside `target`."""
    path = Path(tempfile.mkdtemp(prefix=f".{target.name}.{kind}-", dir=target.parent))
    mark = {"written by": "spqr-jax", "process": os.getpid(), "host": socket.gethostname()}
    (path / _MARK).write_text(json.dumps(mark), encoding="utf-8")
    return path


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
    for old in _hidden(target, OLD):
        if not _is_ours(old) or not os.path.lexists(old / "old"):
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
    for partial in _hidden(target, PARTIAL):
        if _is_ours(partial):
            notes.append(f"removed {partial} ({_size(partial)}), left by a run that was killed")
            remove(partial)
        else:
            notes.append(_left_alone(partial))
    return notes


def unfinished_note(path: Path) -> str:
    """What to add where nothing is at `path`, but a run that began to write it left something; empty for nothing."""
    target = Path(os.path.abspath(path))
    for kind, what in ((PARTIAL, "an unfinished result"), (OLD, "the previous content")):
        for hidden in _hidden(target, kind):
            return f"; {what} is in {hidden}: if no run is writing there now, run the command again with the same --out"
    return ""


def _left_alone(path: Path) -> str:
    return (
        f"{path} ({_size(path)}) looks like a leftover of a killed run on this or another machine: remove it if no run "
        "uses it"
    )


def _hidden(target: Path, kind: str) -> list[Path]:
    name = re.compile(rf"\.{re.escape(target.name)}\.{kind}-{_RANDOM}")
    try:
        entries = os.listdir(target.parent)
    except OSError:
        return []
    paths = (target.parent / entry for entry in sorted(entries) if name.fullmatch(entry))
    return [path for path in paths if path.is_dir() and not path.is_symlink()]


def _is_ours(path: Path) -> bool:
    """Whether a run on this machine made it. A run on another may still be alive, though we hold the lock."""
    try:
        mark = json.loads((path / _MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(mark, dict) and mark.get("host") == socket.gethostname()


def _size(path: Path) -> str:
    total = 0
    for folder, _, files in os.walk(path):
        for file in files:
            try:
                total += os.lstat(os.path.join(folder, file)).st_size
            except OSError:
                continue
    return readable_size(total)
