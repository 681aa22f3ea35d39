"""Which devices work together: what `--mesh` says."""

from __future__ import annotations

import math

import jax
import numpy as np
from jax.sharding import Mesh

from spqr_jax.errors import SpQRError

AXES = ("data", "rows")
"""Axes of a mesh for quantizing. Chunks of text and rows of weights are each spread over all devices of all axes."""


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
