"""Processes of the `spqr` command that begin with all imports done: forks of a process that has not started JAX.

python -m support.crash.forks   reads a request a line, in JSON; writes the fork's process id, then how it ended
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import select
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

from support import ROOT


@dataclasses.dataclass(frozen=True)
class Request:
    """One run of the command.

    Attributes:
      place: folder to run in, also the one that is watched.
      arguments: of ``spqr``.
      log: file for the record of changes; None to record nothing. It needs the library of `recorder.compile_shim`.
      kill_call: the process dies before this change of names or flush; 0 for none.
      save_every: seconds between two saves of work that takes long.
    """

    place: str
    arguments: list[str]
    log: str | None = None
    kill_call: int = 0
    save_every: float = 60.0


class Forks:
    """Starts one run at a time.

    Args:
      library: to preload; None for none.

    Attributes:
      processor_seconds: of all runs that ended.
    """

    def __init__(self, library: Path | None) -> None:
        environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "HF_HUB_OFFLINE": "1"}
        if library is not None:
            environment["LD_PRELOAD"] = str(library)
        self.processor_seconds = 0.0
        self._server = subprocess.Popen(
            [sys.executable, "-m", "support.crash.forks"], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def start(self, request: Request) -> int:
        """Begins a run: its process id."""
        self._server.stdin.write(json.dumps(dataclasses.asdict(request)) + "\n")
        self._server.stdin.flush()
        return int(self._line())

    def wait(self, seconds: float | None = None) -> int | None:
        """How the run ended: its status, negative for a signal; None if it has not after so many seconds."""
        if not select.select([self._server.stdout], [], [], seconds)[0]:
            return None
        status, processor_seconds = self._line().split()
        self.processor_seconds += float(processor_seconds)
        return os.waitstatus_to_exitcode(int(status))

    def close(self) -> None:
        self._server.stdin.close()
        self._server.wait()

    def _line(self) -> str:
        line = self._server.stdout.readline()
        if not line:
            raise RuntimeError("the process that forks has ended")
        return line


def errors_of(place: Path) -> Path:
    """Where the run in a folder writes its messages."""
    return place.with_name(f"{place.name}.errors")


def serve() -> None:
    """Forks for each request, until there are no more."""
    import optax
    import transformers.models.auto  # noqa: F401

    import spqr_jax.cli.app
    from spqr_jax._compat import orbax_v1

    orbax_v1()
    assert optax is not None
    warnings.filterwarnings("ignore", message=".*os.fork.*")
    replies = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        child = os.fork()
        if not child:
            replies.close()
            _run(Request(**json.loads(line)), spqr_jax.cli.app.main)
        print(child, file=replies, flush=True)
        _, status, used = os.wait4(child, 0)
        print(status, used.ru_utime + used.ru_stime, file=replies, flush=True)


def _run(request: Request, main: Any) -> None:
    """In the fork: the command, as if it had been started now."""
    from spqr_jax.job import pace

    errors = os.open(errors_of(Path(request.place)), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    nothing = os.open(os.devnull, os.O_RDWR)
    for target, source in ((0, nothing), (1, nothing), (2, errors)):
        os.dup2(source, target)
    os.chdir(request.place)
    if request.log is not None:
        ctypes.CDLL(None).crash_begin(
            os.fsencode(os.path.realpath(request.place)), os.fsencode(request.log), ctypes.c_long(request.kill_call)
        )
    pace.SAVE_EVERY = request.save_every
    sys.argv = ["spqr", *request.arguments]
    main()
    sys.exit()


if __name__ == "__main__":
    serve()
