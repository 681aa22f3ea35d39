"""The most memory that this process has held: resident size, and what JAX's devices say."""

from __future__ import annotations

import contextlib
from pathlib import Path

import jax

_STATUS = Path("/proc/self/status")


def begin_peak() -> None:
    """Lets the peak begin anew, where the system can (Linux); else it stays that of the whole process."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def host_peak() -> float | None:
    """Largest resident size in bytes since `begin_peak`; None where the system does not say."""
    try:
        for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return 1024.0 * int(line.split()[1])
    except (OSError, ValueError, IndexError):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    import sys

    unit = 1.0 if sys.platform == "darwin" else 1024.0
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def device_peak() -> float | None:
    """Most bytes in use on one of this process's devices; None where JAX does not count them, as on a CPU."""
    counts = [stats["peak_bytes_in_use"] for device in jax.local_devices() if (stats := _stats(device))]
    return float(max(counts)) if counts else None


def _stats(device: jax.Device) -> dict[str, int] | None:
    stats = device.memory_stats() or {}
    return stats if "peak_bytes_in_use" in stats else None
