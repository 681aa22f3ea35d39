"""The devices that a command is asked to use."""

from __future__ import annotations

import re

import jax
import numpy as np
from jax.sharding import Mesh

from spqr_jax.errors import SpQRError
from spqr_jax.files.entries import shown

_MOST_DIGITS = 6


def parse_mesh(text: str) -> Mesh:
    """The first N devices, for ``model=N``.

    Raises:
      SpQRError: another text, or fewer devices.
    """
    match = re.fullmatch(rf"model=0*([1-9]\d{{0,{_MOST_DIGITS - 1}}})", text)
    if match is None:
        raise SpQRError(
            f"--mesh must be model=N for N devices that share the model, such as model=4, got {shown(text)}"
        )
    count, devices = int(match[1]), jax.devices()
    if count > len(devices):
        advice = f"; to try it on CPU cores, set JAX_NUM_CPU_DEVICES={count}" if devices[0].platform == "cpu" else ""
        raise SpQRError(f"--mesh {text} needs {count} devices, but JAX has {len(devices)} here{advice}")
    return Mesh(np.array(devices[:count]), ("model",))
