"""Scores that a model gave, kept in a file as they come: a run that was stopped can go on from them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from spqr_jax.evaluate.continuations import ContinuationScore


def key_of(context: Sequence[int], continuation: Sequence[int]) -> str:
    """Names a context and its continuation, token ids each."""
    tokens = np.array([len(context), *context, *continuation], "<i4")
    return hashlib.blake2b(tokens.tobytes(), digest_size=12).hexdigest()


class Answers:
    """Scores by `key_of`.

    Args:
      path: a file of JSON lines, one for each score; None to keep nothing.
      resume: begin with the scores that are in the file. Otherwise they are dropped.
    """

    def __init__(self, path: Path | None = None, *, resume: bool = False) -> None:
        self.path = path
        self._known: dict[str, ContinuationScore] = {}
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = self._read(path) if resume and path.is_file() else 0
        with path.open("ab") as file:
            file.truncate(whole)

    def _read(self, path: Path) -> int:
        """Reads all whole lines; their length in bytes. The last line may be torn."""
        whole = 0
        with path.open("rb") as file:
            for line in file:
                try:
                    key, log_probability, greedy = json.loads(line)
                except ValueError:
                    break
                if not line.endswith(b"\n"):
                    break
                self._known[key] = ContinuationScore(float(log_probability), bool(greedy))
                whole += len(line)
        return whole

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: str) -> ContinuationScore | None:
        """A score, if it is known."""
        return self._known.get(key)

    def add(self, scores: Mapping[str, ContinuationScore]) -> None:
        """Keeps scores; they are on the disk when this returns."""
        self._known.update(scores)
        if self.path is None:
            return
        lines = [json.dumps([key, score.log_probability, score.greedy]) + "\n" for key, score in scores.items()]
        with self.path.open("a") as file:
            file.write("".join(lines))
            file.flush()
            os.fsync(file.fileno())
