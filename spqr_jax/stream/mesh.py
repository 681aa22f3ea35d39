"""Which devices and processes work together: what `--mesh` and `--hosts` say, and what several processes need."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from spqr_jax._compat import Watch, barrier, start_distributed
from spqr_jax.errors import SpQRError

AXES = ("data", "rows")
"""Axes of a mesh for quantizing. Chunks of text and rows of weights are each spread over all devices of all axes."""
_GRACE = 20.0  # seconds that a process has to end by itself once another has failed
_START = 300  # seconds in which all processes must have started


def parse_mesh(text: str) -> Mesh:
    """The mesh that a user asked for.

    Args:
      text: ``auto``: all devices of all processes; or axes and their sizes, such as ``data=4,rows=2``.

    Raises:
      SpQRError: it is no mesh, or there are not so many devices.
    """
    devices = jax.devices()
    if text == "auto":
        return Mesh(np.array(devices), AXES[:1])
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name not in AXES or name in sizes or not size.isdigit() or int(size) < 1:
            raise SpQRError(f"--mesh {text}: give auto, or sizes of the axes {' and '.join(AXES)}, as in data=4,rows=2")
        sizes[name] = int(size)
    count = math.prod(sizes.values())
    if count > len(devices):
        raise SpQRError(f"--mesh {text} needs {count} devices, but JAX has {len(devices)}")
    if count % jax.process_count():
        raise SpQRError(f"--mesh {text}: {count} devices cannot be shared evenly by {jax.process_count()} processes")
    share = count // jax.process_count()  # each process takes part, with its first devices
    mine = [[device for device in devices if device.process_index == process] for process in range(jax.process_count())]
    if any(len(those) < share for those in mine):
        raise SpQRError(f"--mesh {text} needs {share} devices of each process, but one has {min(map(len, mine))}")
    chosen = [device for those in mine for device in those[:share]]
    return Mesh(np.array(chosen).reshape(*sizes.values()), tuple(sizes))


def start_hosts(text: str) -> None:
    """Joins this process to others that run the same command. Nothing of JAX may have run before.

    Args:
      text: ``auto``, where JAX finds the others by itself (SLURM, Cloud TPU, MPI); or ``ADDRESS:PORT,COUNT,INDEX``:
        where process 0 listens, how many processes there are, and which of them this is.

    Raises:
      SpQRError: it is neither, or the others did not come.
    """
    settings: dict[str, object] = {}
    if text != "auto":
        parts = text.rsplit(",", 2)
        if len(parts) != 3 or ":" not in parts[0] or not parts[1].isdigit() or not parts[2].isdigit():
            raise SpQRError(f"--hosts {text}: give auto, or ADDRESS:PORT,COUNT,INDEX, as in 10.0.0.1:8476,2,0")
        count, index = int(parts[1]), int(parts[2])
        if not 0 <= index < count:
            raise SpQRError(f"--hosts {text}: the processes are counted from 0 to {count - 1}, and this is {index}")
        settings = {"coordinator_address": parts[0], "num_processes": count, "process_id": index}
    try:
        start_distributed(_START, **settings)
    except (RuntimeError, ValueError) as error:
        raise SpQRError(f"--hosts {text}: the processes did not come together: {error}") from None


def is_first() -> bool:
    """Whether this process writes files and messages: there are no others, or it is process 0."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Returns once every process has come to this point; `name` tells the points of a run apart."""
    barrier(name, _START)


@contextlib.contextmanager
def hosts_together() -> Iterator[None]:
    """While it runs, an error of one process ends all of them, each with a message; none waits for another in vain.

    A process that fails tells the others. One that cannot heed it, as it waits inside a computation for what the
    failed process should have sent, is ended after 20 seconds.
    """
    if jax.process_count() == 1:
        yield
        return
    watch = Watch(_GRACE)
    try:
        yield
    except BaseException as error:
        watch.tell(f"process {jax.process_index()} failed: {type(error).__name__}: {error}")
        raise
    finally:
        watch.close()
