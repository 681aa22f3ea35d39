"""A run of a few blocks over the public parts (claim, journal), with arithmetic in place of a model.

python -m support.crash.small_run PATH [--overwrite]
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np

from spqr_jax.atomic import AtomicDirectory
from spqr_jax.journal import Journal
from spqr_jax.output import AlreadyFinished, Claim
from spqr_jax.output.flush import flush_file, flush_folder

BLOCKS = 4
IDENTITY = {"model": "m", "text": "t", "configuration": "{}", "tuning": "none", "format": "1"}


def run(path: Path, overwrite: bool = False, how: str = "resume") -> int:
    """Goes on, or begins. How many blocks were solved in this process; -1 if all was finished before."""
    try:
        with Claim(path, overwrite, run=how) as claim, AtomicDirectory(claim) as directory:
            journal = Journal(claim.run, IDENTITY, resume=how == "resume")
            state = journal.state or {"blocks": {}, "stream": None}
            _adopt(directory.partial, state["blocks"])
            stream = np.arange(6.0) if state["stream"] is None else journal.get(state["stream"])["stream"]
            solved = 0
            for index in range(len(state["blocks"]), BLOCKS):
                stream = stream * 1.25 + index
                digest = _put(directory.partial, index, stream)
                solved += 1
                state = {"blocks": {**state["blocks"], str(index): digest}, "stream": journal.put({"stream": stream})}
                journal.commit(state)
        journal.close(done=True)
        return solved
    except AlreadyFinished:
        return -1


def expected() -> dict[str, bytes]:
    """Name -> content of the files of a result."""
    stream, files = np.arange(6.0), {}
    for index in range(BLOCKS):
        stream = stream * 1.25 + index
        files[f"block-{index}"] = stream.tobytes() * 20
    return files


def _put(folder: Path, index: int, stream: np.ndarray) -> str:
    data = stream.tobytes() * 20
    new = folder / f"block-{index}.new"
    new.write_bytes(data)
    new.rename(folder / f"block-{index}")
    flush_file(str(folder / f"block-{index}"))
    flush_folder(folder)
    return hashlib.sha256(data).hexdigest()


def _adopt(folder: Path, blocks: dict[str, str]) -> None:
    for path in list(folder.iterdir()):
        index = path.name.removeprefix("block-")
        if index not in blocks:
            path.unlink()
    for index, digest in blocks.items():
        if hashlib.sha256((folder / f"block-{index}").read_bytes()).hexdigest() != digest:
            raise AssertionError(f"block {index} is not what was committed")


if __name__ == "__main__":
    run(Path(sys.argv[1]), "--overwrite" in sys.argv)
