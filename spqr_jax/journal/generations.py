"""Generations of a run's state: JSON files, each with a counter and the SHA-256 of its content."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from spqr_jax.output.flush import flush, flush_folder
from spqr_jax.output.run_folder import STATE_NAME

_NEW = "state.new"


@dataclasses.dataclass(frozen=True)
class Generation:
    """One state of a run.

    Attributes:
      counter: 1 for the first, then one more each time.
      identity: what the run was given, see `identity_of`.
      parts: digests of the parts that the state names.
      state: JSON.
    """

    counter: int
    identity: dict[str, str]
    parts: list[str]
    state: dict[str, Any]


def counters(folder: Path) -> list[int]:
    """Of the generations that a folder has files for, whole or not; the newest last."""
    try:
        entries = os.listdir(folder)
    except FileNotFoundError:
        return []
    return sorted(int(match[1]) for match in map(STATE_NAME.fullmatch, entries) if match)


def write_generation(folder: Path, generation: Generation) -> None:
    """Writes a generation. It has its name, and is on the disk, when this returns."""
    body = dataclasses.asdict(generation)
    text = json.dumps({**body, "sha256": _digest(body)}, sort_keys=True)
    with open(folder / _NEW, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        flush(file.fileno())
    os.replace(folder / _NEW, _path(folder, generation.counter))
    flush_folder(folder)


def read_generation(folder: Path, counter: int) -> Generation | None:
    """A generation; None where it is torn or damaged."""
    try:
        body = json.loads(_path(folder, counter).read_text(encoding="utf-8"))
        written = body.pop("sha256")
        if written != _digest(body) or body["counter"] != counter:
            return None
        return Generation(**body)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def remove_generation(folder: Path, counter: int) -> None:
    _path(folder, counter).unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    (folder / _NEW).unlink(missing_ok=True)


def _path(folder: Path, counter: int) -> Path:
    return folder / f"state-{counter:08d}.json"


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
