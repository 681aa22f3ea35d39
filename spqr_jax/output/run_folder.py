"""The folder `.NAME.run` beside NAME: a run that can go on after it was stopped.

.NAME.run/state-00000007.json   what the run has done (`spqr_jax.journal`)
.NAME.run/parts/                arrays that a state names
.NAME.run/checkpoint/           the result, which grows
.NAME.run/finished.json         the result is about to get its name, or has got it
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path

from spqr_jax.output import leftovers
from spqr_jax.output.flush import flush, flush_folder

CHECKPOINT = "checkpoint"
STATE_NAME = re.compile(r"state-(\d{8})\.json")
_FINISHED, _NEW = "finished.json", "finished.new"


def run_folder(target: Path) -> Path:
    return target.with_name(f".{target.name}.run")


def has_state(folder: Path) -> bool:
    """Whether a run has committed a state, so that there is something to go on with."""
    try:
        return any(STATE_NAME.fullmatch(entry) for entry in os.listdir(folder))
    except OSError:
        return False


def unfinished_run(folder: Path) -> str:
    """What to do about the folder of a run that has not ended."""
    return (
        f"an unfinished run is in {folder}: --resume goes on with it, --restart removes it and begins again (in "
        "Python, resume=True, or remove the folder)"
    )


def write_finished(folder: Path, name: str, old: str | None) -> None:
    """Notes, on the disk, under which name the result is to appear, and what holds the directory it replaces."""
    with open(folder / _NEW, "w", encoding="utf-8") as file:
        json.dump({"name": name, "old": old}, file)
        file.flush()
        flush(file.fileno())
    os.replace(folder / _NEW, folder / _FINISHED)
    flush_folder(folder)


def forget_finished(folder: Path) -> None:
    (folder / _FINISHED).unlink(missing_ok=True)


def finished(folder: Path) -> tuple[str, str | None] | None:
    """The name that the result got, and what holds the directory it replaced; None if it has not got its name."""
    if os.path.lexists(folder / CHECKPOINT):
        return None
    try:
        note = json.loads((folder / _FINISHED).read_text(encoding="utf-8"))
        return str(note["name"]), note["old"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def discard_run(folder: Path) -> None:
    """Removes a run's folder; from the first step on nobody takes it for a run to go on with."""
    if not folder.is_dir():
        return
    name = folder.name.removeprefix(".").removesuffix(".run")
    doomed = Path(tempfile.mkdtemp(prefix=f".{name}.{leftovers.PARTIAL}-", dir=folder.parent))
    os.rename(folder, doomed)  # a directory may take the place of an empty one
    flush_folder(folder.parent)
    leftovers.remove(doomed)
