"""The table of backends: who multiplies by quantized weights, where, and in which formats."""

from __future__ import annotations

from typing import Any, Literal, Protocol, get_args

from pallas_kernels import spqr_matmul
from spqr_jax.array import SpQRArray
from spqr_jax.errors import SpQRError
from spqr_jax.products.cpu import CpuBackend, why_not_installed
from spqr_jax.products.pallas import PallasBackend
from spqr_jax.products.xla import XlaBackend

Implementation = Literal["cpu", "mosaic_gpu", "triton", "tpu", "xla"]


class Backend(Protocol):
    """One way to multiply by quantized weights.

    Attributes:
      name: its key in `BACKENDS`.
      stacks: whether a stack of matrices can be read by an index that is data. Layers then run in a loop.
    """

    name: str
    stacks: bool

    def why_not(self, array: SpQRArray | None, device: spqr_matmul.Target | None) -> str:
        """Why it cannot multiply by this weight's format on this device; empty if it can.

        No array asks about the device alone, no device about the format alone.
        """
        ...

    def prepare(self, array: SpQRArray, **options: Any) -> Any:
        """The weight in the backend's own layout, on the default device: a `PreparedMatrix`, or a dense array."""
        ...


BACKENDS: dict[str, Any] = {
    backend.name: backend
    for backend in (
        CpuBackend(),
        PallasBackend("mosaic_gpu", "fragments", stacks=True),
        PallasBackend("triton", "rows"),
        PallasBackend("tpu", "lanes"),
        XlaBackend(),
    )
}
"""Name -> `Backend`, best first for the devices on which several work."""


def backend_named(name: str) -> Any:
    """The backend of this name.

    Raises:
      SpQRError: there is none; names all.
    """
    if name not in BACKENDS:
        raise SpQRError(f"implementation must be one of {', '.join(BACKENDS)}, got {name!r}")
    return BACKENDS[name]


def default_implementation() -> Implementation:
    """Name of the best backend for the device that JAX runs on: ``xla`` if there are no kernels for it.

    ``mosaic_gpu`` needs an NVIDIA GPU of compute capability 8.0 or higher and a JAX that has it; ``triton`` is taken
    there while JAX has that. ``tpu`` needs a TPU, ``cpu`` the native CPU kernels.

    Raises:
      SpQRError: the environment names CPU kernels that are not here.
    """
    device = spqr_matmul.target()
    return next(name for name in get_args(Implementation) if not BACKENDS[name].why_not(None, device))


def why_no_kernels(platform: str | None = None) -> str:
    """Why products with quantized weights run without fast kernels here, and what to do; empty if they have some.

    Args:
      platform: ``cpu`` asks about the native CPU kernels, whatever the device; None asks about the default device.

    Raises:
      SpQRError: as `default_implementation`.
    """
    device = spqr_matmul.target()
    if (platform or device.platform) == "cpu":
        return why_not_installed()
    reasons = [BACKENDS[name].why_not(None, device) for name in ("mosaic_gpu", "triton", "tpu")]
    return "" if "" in reasons else "; ".join(dict.fromkeys(reasons))
