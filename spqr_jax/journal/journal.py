"""A run's journal: what it has done so far, safe from kills and power cuts."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from spqr_jax.errors import CheckpointError
from spqr_jax.journal.generations import (
    Generation,
    counters,
    read_generation,
    remove_generation,
    remove_unfinished,
    write_generation,
)
from spqr_jax.journal.identity import differences
from spqr_jax.journal.parts import keep_only, parts_in, read_part, verify_part, write_part
from spqr_jax.output.claim import explained
from spqr_jax.output.flush import flush_folder
from spqr_jax.output.run_folder import discard_run, unfinished_run

_KEPT = 2  # generations


class Journal:
    """The state of a run in a folder: small JSON, and arrays in parts that the JSON names by their SHA-256.

    `put` writes arrays, and `commit` makes a state that names them the newest. After a kill or a power cut at any
    moment the newest state is the last one committed, or the one whose commit was cut; all parts it names are whole.
    The one before is kept, too, and takes over if the newest is damaged.

    Args:
      folder: of the run, made if it is not there.
      identity: what the run was given, see `identity_of`.
      resume: go on with what the folder holds.

    Attributes:
      state: JSON that was committed last; None at the beginning of a run.

    Raises:
      CheckpointError: the folder holds a run and `resume` is not set, or the run is of another model, text or
        configuration, or no state in it is whole.
    """

    def __init__(self, folder: Path, identity: dict[str, str], resume: bool) -> None:
        self._folder, self._parts, self._identity = folder, folder / "parts", dict(identity)
        self._generations: list[Generation] = []
        self._is_open = True
        existing = counters(folder)
        if existing and not resume:
            raise CheckpointError(unfinished_run(folder))
        with explained(folder):
            if not folder.is_dir():
                folder.mkdir(parents=True)
                flush_folder(folder.parent)
            self._open(existing)

    @property
    def state(self) -> dict[str, Any] | None:
        return None if not self._generations else self._generations[-1].state

    def put(self, arrays: Mapping[str, np.ndarray]) -> str:
        """Writes arrays to the disk. They stay if the next commit names them.

        Args:
          arrays: name -> array of any shape, of a type that safetensors has.

        Returns:
          Their SHA-256 in hexadecimal, to be named in a state and to be read with.

        Raises:
          CheckpointError: they cannot be written.
        """
        self._refuse_closed()
        with explained(self._folder):
            return write_part(self._parts, {name: np.asarray(array) for name, array in arrays.items()})

    def get(self, digest: str) -> dict[str, np.ndarray]:
        """Arrays that were put, verified.

        Raises:
          CheckpointError: they are missing or damaged.
        """
        return read_part(self._parts, digest)

    def commit(self, state: dict[str, Any]) -> None:
        """Makes a state the newest. It is on the disk when this returns.

        Parts that neither this state nor the one before names are removed.

        Args:
          state: JSON. A text that is the digest of a part, wherever it stands, names that part.

        Raises:
          CheckpointError: it cannot be written, or another process has written to the folder.
        """
        self._refuse_closed()
        newest = self._generations[-1].counter if self._generations else 0
        if counters(self._folder)[-1:] not in ([], [newest]):
            raise CheckpointError(
                f"another process goes on with the run in {self._folder}: this one stops; let only one run at a time"
            )
        text = json.dumps(state)
        parts = sorted(set(_texts(json.loads(text))) & parts_in(self._parts))
        generation = Generation(newest + 1, self._identity, parts, json.loads(text))
        with explained(self._folder):
            write_generation(self._folder, generation)
            self._generations = [*self._generations, generation][-_KEPT:]
            self._collect_garbage()

    def close(self, done: bool) -> None:
        """Ends the use of the journal.

        Args:
          done: the result has its name: remove the folder with all that is in it. Otherwise it stays.
        """
        self._is_open = False
        if done:
            discard_run(self._folder)

    def _open(self, existing: list[int]) -> None:
        """Finds the newest state that is whole, with all its parts, and removes everything else."""
        problems = []
        for counter in existing:
            generation = read_generation(self._folder, counter)
            if generation is None:
                problems.append(f"state {counter} is damaged")
                continue
            self._refuse_another_run(generation)
            if problem := self._damage(generation):
                problems.append(problem)
            else:
                self._generations.append(generation)
        if existing and not self._generations:
            raise CheckpointError(
                f"the unfinished run in {self._folder} cannot go on: {problems[-1]}; begin again with --restart (in "
                "Python, remove the folder)"
            )
        if existing and self._generations[-1].counter != existing[-1]:
            warnings.warn(
                f"the newest state of the run in {self._folder} is damaged: going on from the one before", stacklevel=3
            )
        self._generations = self._generations[-_KEPT:]
        remove_unfinished(self._folder)
        self._collect_garbage()

    def _damage(self, generation: Generation) -> str:
        """What is wrong with the parts of a generation; empty for nothing."""
        try:
            for digest in generation.parts:
                verify_part(self._parts, digest)
        except CheckpointError as error:
            return str(error)
        return ""

    def _refuse_another_run(self, generation: Generation) -> None:
        if unlike := differences(generation.identity, self._identity):
            raise CheckpointError(
                f"the unfinished run in {self._folder} differs in {' and in '.join(unlike)}: give the same again to "
                "go on, or begin again with --restart (in Python, remove the folder)"
            )

    def _collect_garbage(self) -> None:
        """Only the newest generations stay, and the parts that they name."""
        kept = {generation.counter for generation in self._generations}
        for counter in counters(self._folder):
            if counter not in kept:
                remove_generation(self._folder, counter)
        keep_only(self._parts, {digest for generation in self._generations for digest in generation.parts})

    def _refuse_closed(self) -> None:
        if not self._is_open:
            raise CheckpointError(f"the journal in {self._folder} is closed")


def _texts(value: Any) -> Iterator[str]:
    """All texts in a JSON value, keys of objects included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, entry in value.items():
            yield key
            yield from _texts(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from _texts(entry)
