"""The folder `.NAME.run` beside NAME: a run that can go on after it was stopped.

.NAME.run/state-00000007.json   what the run has done (`spqr_jax.journal`)
.NAME.run/parts/                arrays that a state names
.NAME.run/checkpoint/           the result, which grows
.NAME.run/finished.json         the result is about to get its name, or has got it
"""

from __future__ import annotations

import os
import re
import socket
import tempfile
from pathlib import Path
from typing import Literal

from spqr_jax.errors import CheckpointError
from spqr_jax.output import leftovers
from spqr_jax.output.flush import flush_folder

Run = Literal["new", "resume", "restart"]
"""What to do with an unfinished run: refuse, go on with it, remove it. Where there is none, a run begins."""
CHECKPOINT = "checkpoint"
STATE_NAME = re.compile(r"state-(\d{8})\.json")


def run_folder(target: Path) -> Path:
    return target.parent / f".{target.name}.run"


def has_state(folder: Path) -> bool:
    """Whether a run has committed a state, so that there is something to go on with."""
    try:
        return any(STATE_NAME.fullmatch(entry) for entry in os.listdir(folder))
    except OSError:
        return False


def unfinished_run(folder: Path) -> str:
    """What to do about the folder of a run that has not ended."""
    return (
        f"an unfinished run{_elsewhere(folder)} is in {folder}: --resume goes on with it, --restart removes it and "
        "begins again (in Python, resume=True, or remove the folder)"
    )


def kept_run(folder: Path, target: Path) -> str:
    """What to say of a folder that stays after a run was stopped."""
    return (
        f"what was finished of {target} is kept in {folder}: run the same command again with --resume to go on, or "
        "with --restart to begin again"
    )


def take_run(target: Path, how: Run) -> list[str]:
    """Makes the folder of a run, or takes over the one that is there.

    Args:
      target: the name that the result will have, whose lock this process holds.
      how: what to do with the folder of an unfinished run.

    Returns:
      What was done, in words.

    Raises:
      CheckpointError: an unfinished run may not be removed or gone on with; or the folder is not a run's.
    """
    folder, notes = run_folder(target), []
    if os.path.lexists(folder):
        _refuse_strange(folder)
        goes_on = how == "resume" and has_state(folder)
        if how == "new" and has_state(folder):
            raise CheckpointError(unfinished_run(folder))
        if how == "new" and _elsewhere(folder):
            raise CheckpointError(
                f"a run{_elsewhere(folder)} has begun in {folder} and finished nothing yet: if it has ended, --restart "
                "removes the folder and begins again"
            )
        if goes_on and _elsewhere(folder):
            notes.append(f"the run in {folder} was begun{_elsewhere(folder)}: make sure that it has ended there")
        if goes_on:
            leftovers.write_mark(folder)
        else:
            notes.append(
                f"removed {folder}, an unfinished run" if has_state(folder) else leftovers.removed_note(folder)
            )
            leftovers.write_mark(folder)  # without a name that a result was about to get
            discard_run(folder)
    if not os.path.lexists(folder):
        os.rename(leftovers.make_hidden(target, leftovers.PARTIAL), folder)  # it has its mark from the beginning
    (folder / CHECKPOINT).mkdir(exist_ok=True)
    flush_folder(folder)
    flush_folder(target.parent)
    return notes


def end_finished(target: Path) -> tuple[Path | None, list[str]]:
    """Removes what is left of a run that was killed after its result had got its name.

    Returns:
      Where the result lies, or None if there was no such run; and what was done, in words.
    """
    for folder in (run_folder(target), *leftovers.hidden(target, leftovers.PARTIAL)):
        mark = leftovers.read_mark(folder) or {}
        if not isinstance(mark.get("name"), str) or os.path.lexists(folder / CHECKPOINT):
            continue
        result, old = target.parent / mark["name"], target.parent / str(mark.get("old"))
        is_there = os.path.lexists(result)
        if is_there and old in leftovers.hidden(target, leftovers.OLD) and leftovers.is_ours(old):
            leftovers.discard_old(target, old)
        discard_run(folder) if folder == run_folder(target) else leftovers.remove(folder)
        gone = "when it was killed" if is_there else "but it is not there any more"
        return (result if is_there else None), [f"removed {folder}: its run had finished {result} {gone}"]
    return None, []


def refuse_alive(target: Path) -> None:
    """Asks for the process that made the folder: for file systems without locks.

    Raises:
      CheckpointError: there is such a process.
    """
    folder = run_folder(target)
    process = (leftovers.read_mark(folder) or {}).get("process")
    if _elsewhere(folder) or not isinstance(process, int) or process == os.getpid():
        return
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return
    except OSError:  # it is another user's
        pass
    raise CheckpointError(
        f"process {process} may still be writing to {target}, and this file system has no locks: wait for it, or "
        f"remove {folder} if that process is another program"
    )


def _refuse_strange(folder: Path) -> None:
    if folder.is_symlink() or not folder.is_dir():
        raise CheckpointError(f"{folder} is not a directory: it is needed for this run; remove it")
    if leftovers.read_mark(folder) is None and not has_state(folder) and any(folder.iterdir()):
        raise CheckpointError(f"{folder} is not the folder of a run: remove it, or choose another name for the result")


def _elsewhere(folder: Path) -> str:
    """Where a run was begun, in words, if that was another host."""
    mark = leftovers.read_mark(folder)
    if mark is None or mark.get("host") == socket.gethostname():
        return ""
    return f" on {mark.get('host')} (process {mark.get('process')})"


def note_name(folder: Path, name: str, old: str | None) -> None:
    """Notes, on the disk, which name the result is about to get, and what holds the directory that it replaces."""
    leftovers.write_mark(folder, name=name, old=old)


def discard_run(folder: Path) -> None:
    """Removes a run's folder; from the first step on nobody takes it for a run to go on with."""
    if not folder.is_dir():
        return
    name = folder.name.removeprefix(".").removesuffix(".run")
    doomed = Path(tempfile.mkdtemp(prefix=f".{name}.{leftovers.PARTIAL}-", dir=folder.parent))
    os.rename(folder, doomed)  # a directory may take the place of an empty one
    flush_folder(folder.parent)
    leftovers.remove(doomed)
