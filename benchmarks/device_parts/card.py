"""The device, and the bandwidth of its memory."""

from __future__ import annotations

import subprocess

import jax
from accelerator import bandwidth
from report import Report

from pallas_kernels import spqr_matmul

_QUERY = "name,driver_version,clocks.sm,clocks.mem,power.limit,temperature.gpu,memory.total"


def measure(report: Report, small: bool) -> None:
    """Names the device and measures reading and copying."""
    target = spqr_matmul.target()
    report.line(device=target.kind, capability=list(target.capability), cores=target.cores, jax=jax.__version__)
    if target.platform == "gpu":
        command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader"]
        try:
            report.line(nvidia_smi=subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip())
        except OSError as error:
            report.line(nvidia_smi=str(error))
    speeds = bandwidth(8 if small else 2048, rounds=1 if small else 5)
    report.line(**{f"{name}_gb_per_s": speed / 1e9 for name, speed in speeds.items()})
