"""What the README promises: it is short, and its commands and its Python run. `rivals_results.py --check`, which
tests/cli/test_scripts.py runs, compares its table with what was measured."""

from __future__ import annotations

import pytest
from support import ROOT
from support.pages import blocks_to_run, run_page

README = ROOT / "README.md"
LONGEST = 1100
"""Words, tables and code included: a reader decides in two minutes."""
FIRST_PYTHON = 80
"""A line before which the Python example begins."""


def test_it_takes_two_minutes():
    words = len(README.read_text(encoding="utf-8").split())
    assert words <= LONGEST, f"{words} words: move the details to docs/"


def test_python_is_seen_early():
    python = next(block for block in blocks_to_run(README) if block.language == "python")
    assert python.line < FIRST_PYTHON


def test_its_commands_and_its_python_run(tmp_path):
    run_page(README, tmp_path)


@pytest.mark.slow
def test_its_commands_and_its_python_run_with_the_real_model(tmp_path):
    run_page(README, tmp_path, real_demo=True)
