"""The reference describes every public name once, and nothing that is gone."""

from __future__ import annotations

import importlib
import re
from collections import Counter

import typer
from support import ROOT

import spqr_jax
from spqr_jax.cli.app import app

REFERENCE = ROOT / "docs" / "reference"
DOCUMENTED = re.compile(r"^\.\. auto\w+:: ([\w.]+)(?:\(\))?$", re.MULTILINE)
COMPLETE = ("spqr_jax", "spqr_jax.integrations.nnx", "spqr_jax.integrations.linen")


def documented() -> list[str]:
    return [name for page in sorted(REFERENCE.glob("*.md")) for name in DOCUMENTED.findall(page.read_text())]


def test_every_public_name_is_documented_once():
    counts = Counter(documented())
    for module in COMPLETE:
        public = [f"{module}.{name}" for name in importlib.import_module(module).__all__]
        assert {name: counts[name] for name in public} == dict.fromkeys(public, 1)


def test_every_documented_name_is_there():
    for path in documented():
        module, _, name = path.rpartition(".")
        assert hasattr(importlib.import_module(module), name), path
        if module == "spqr_jax":
            assert name in spqr_jax.__all__


def test_public_names_have_docstrings():
    for path in documented():
        module, _, name = path.rpartition(".")
        assert getattr(importlib.import_module(module), name).__doc__, path


def test_every_command_has_a_section():
    text = (REFERENCE / "command-line.md").read_text()
    commands = set(typer.main.get_command(app).commands)
    assert set(re.findall(r"^```\{command\} (\S+)$", text, re.MULTILINE)) == commands
    assert set(re.findall(r"^## spqr (\S+)$", text, re.MULTILINE)) == commands
