"""A pytest plugin: where the time of a run went, file by file, and how much of it XLA compiled.

``compiled`` counts programs that XLA compiled or that were read from the folder of compiled programs
(``read``); seconds are those of lowering and compiling in the test's process. Command lines that a test
runs compile in processes of their own, which the table cannot see into.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import jax
import pytest

_SHOWN = 15
_SECONDS = {
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
}
_COMPILE = "/jax/core/compile/backend_compile_duration"
_HIT = "/jax/compilation_cache/cache_hits"


@dataclass
class _Sums:
    seconds: float = 0.0
    compiling: float = 0.0
    programs: int = 0
    read: int = 0
    tests: int = 0


_here = _Sums()  # of this process so far


def _on_duration(event: str, seconds: float, **_: object) -> None:
    if event in _SECONDS:
        _here.compiling += seconds
    _here.programs += event == _COMPILE


def _on_event(event: str, **_: object) -> None:
    _here.read += event == _HIT


jax.monitoring.register_event_duration_secs_listener(_on_duration)
jax.monitoring.register_event_listener(_on_event)

_before: dict[str, tuple[float, int, int]] = {}
_files: dict[str, _Sums] = defaultdict(_Sums)


def _now() -> tuple[float, int, int]:
    return _here.compiling, _here.programs, _here.read


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_logstart(nodeid: str) -> None:
    _before[nodeid] = _now()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    """Reports travel from workers to the process that prints, with what is put on them."""
    outcome = yield
    report = outcome.get_result()
    before, now = _before.get(item.nodeid, _now()), _now()
    _before[item.nodeid] = now
    report.spent_compiling = [b - a for a, b in zip(before, now, strict=True)]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    sums = _files[report.nodeid.split("::")[0]]
    compiling, programs, read = getattr(report, "spent_compiling", (0.0, 0, 0))
    sums.seconds += report.duration
    sums.compiling += compiling
    sums.programs += programs
    sums.read += read
    sums.tests += report.when == "call"


def pytest_terminal_summary(terminalreporter) -> None:
    slowest = sorted(_files.items(), key=lambda entry: -entry[1].seconds)
    if not slowest:
        return
    total = _Sums(*(sum(getattr(s, name) for _, s in slowest) for name in _Sums.__dataclass_fields__))
    terminalreporter.section("slowest files")
    terminalreporter.write_line(f"{'seconds':>8} {'compiling':>10} {'programs':>9} {'read':>6} {'tests':>6}  file")
    for name, s in [*slowest[:_SHOWN], ("all files", total)]:
        terminalreporter.write_line(
            f"{s.seconds:8.1f} {s.compiling:10.1f} {s.programs:9d} {s.read:6d} {s.tests:6d}  {name}"
        )
