"""Which files begin: with the slowest first, the workers end at about the same time."""

from __future__ import annotations

import pytest

# Those of more than half a minute, by the table that a run ends with.
SLOWEST = (
    "pallas/test_pallas_kernels.py",
    "solver/test_solver.py",
    "cli/test_cli.py",
    "models/test_families.py",
    "cli/test_report.py",
    "integrations/test_harness.py",
    "quantize/test_budget.py",
    "native/test_cpu_kernels.py",
    "solver/test_baselines.py",
    "quantize/test_quantize.py",
)


def slowest_first(items: list[pytest.Item]) -> None:
    """Sorts in place; files that are not named stay in their order, after those that are."""

    def rank(item: pytest.Item) -> int:
        name = "/".join(item.path.parts[-2:])
        return SLOWEST.index(name) if name in SLOWEST else len(SLOWEST)

    items.sort(key=rank)
