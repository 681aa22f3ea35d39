"""One product: the kernels, dense bfloat16 by XLA, and PyTorch's rivals, in turns."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import accelerator
import jax
from accelerator import Shape
from device_loop import LEAST, MOST, Timing, compare
from report import Report

from pallas_kernels import spqr_matmul

SHAPES = [Shape(4096, 4096), Shape(11008, 4096), Shape(4096, 11008), Shape(8192, 8192)]
ROWS = (1, 16, 64, 8)


def kernel_name() -> str:
    """The kernel of this device; "xla" where none runs."""
    target = spqr_matmul.target()
    names = {"gpu": ("mosaic_gpu", "triton"), "tpu": ("tpu",)}.get(target.platform, ())
    return next((name for name in names if not spqr_matmul.why_no_kernel(name, target)), "xla")


def measure(report: Report, small: bool) -> None:
    """Every shape with every number of rows; a shape's programs are compiled together."""
    bandwidth = accelerator.bandwidth(8 if small else 2048, rounds=1 if small else 3)["read"]
    report.line(read_gb_per_s=bandwidth / 1e9)
    torch = TorchRivals(os.environ.get("TORCH_PYTHON"))
    try:
        for shape in [Shape(64, 128)] if small else SHAPES:
            _measure_shape(report, shape, (2,) if small else ROWS, torch, bandwidth, small)
    finally:
        torch.close()


def _measure_shape(
    report: Report, shape: Shape, rows: tuple[int, ...], torch: TorchRivals, bandwidth: float, small: bool
) -> None:
    most = LEAST if small else MOST
    kernel = accelerator.packed_rival(kernel_name(), shape, most=most)
    dense = accelerator.dense_rival(shape, most)
    x = {count: accelerator.activations(count, shape.inner) for count in rows}
    problems = [(rival, x[count]) for count in rows for rival in (kernel, dense)]
    timings = compare(problems, products=8 if small else 256, rounds=1 if small else 7)
    bases = dict(zip(rows, timings[1::2], strict=True))  # dense products
    for (rival, xs), timing in zip(problems, timings, strict=True):
        values = figures(timing, bases[xs.shape[0]], rival.weight_bytes, bandwidth)
        report.line(shape=str(shape), rows=xs.shape[0], rival=rival.name, **values)
    for count in rows:
        for name, answer in torch.ask(f"{shape} {count}").items():
            values = figures(_torch_timing(answer), bases[count], None, bandwidth)
            report.line(shape=str(shape), rows=count, rival=name, **values)


def figures(timing: Timing | str, base: Timing | str, weight_bytes: int | None, bandwidth: float) -> dict[str, Any]:
    """A line of the report. The floor is reading the matrix; scaled times are of a card that reads 3.1 TB/s."""
    if isinstance(timing, str):
        return {"failed": timing}
    values: dict[str, Any] = {
        "us": 1e6 * timing.elapsed,
        "us_at_3.1_TB_per_s": 1e6 * timing.elapsed * bandwidth / accelerator.REFERENCE_BANDWIDTH,
    }
    if weight_bytes is not None:
        values["floor_us"] = 1e6 * weight_bytes / bandwidth
    if isinstance(base, Timing) and timing.elapsed > 0:
        values["times_dense"] = base.elapsed / timing.elapsed
    if timing.busy is not None:
        values |= {"busy_us": 1e6 * timing.busy, "launches": timing.launches}
        values["kernels"] = {name: 1e6 * seconds for name, seconds in list(timing.kernels.items())[:6]}
    return values


def _torch_timing(value: float | str) -> Timing | str:
    return value if isinstance(value, str) else Timing(value)


class TorchRivals:
    """A process that measures PyTorch's products when asked to; `python` has PyTorch, None for no process."""

    def __init__(self, python: str | None) -> None:
        script = Path(accelerator.__file__).with_name("torch_rivals.py")
        self._process: subprocess.Popen[str] | None = None
        if python and jax.default_backend() == "gpu":
            command = [python, str(script)]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, problem: str) -> dict[str, float | str]:
        """{rival: seconds or the reason} for ``OUTxIN ROWS``; empty once the process has ended."""
        if self._process is None or self._process.poll() is not None:
            return {}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(problem + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            return {}
        answers: dict[str, float | str] = json.loads(line) if line else {}
        return answers

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
