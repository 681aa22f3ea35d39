"""Help pages: commands and options in panels, help for every option, examples that parse, one version."""

from __future__ import annotations

import functools
import re
import shlex

import pytest
import typer
from support.command import spqr

from spqr_jax import __version__
from spqr_jax.cli.app import app

PANELS = {
    "Make": ["quantize"],
    "Measure": ["perplexity", "compare", "eval", "bench", "analyze"],
    "Use": ["generate", "inspect", "report"],
    "Exchange": ["export", "import"],
}
GROUP = typer.main.get_command(app)
COMMANDS = GROUP.commands


@functools.cache
def help_page(*command, columns=80):
    """The page as a terminal of that width shows it."""
    result = spqr(*command, "--help", cwd=".", columns=columns)
    assert result.returncode == 0, result.stderr
    return result.stdout


def panels_of(page):
    """Panel titles and the names in each panel's first column, in the page's order."""
    panels, names = {}, []
    for line in page.splitlines():
        if title := re.match(r"╭─ (.+?) ─+╮", line):
            names = panels.setdefault(title[1], [])
        elif name := re.match(r"│ (?:\*  | {3})? ?(-*\w[\w-]*)", line):
            names.append(name[1])
    return panels


def examples_of(page, heading="Examples"):
    """The command lines below the heading, as words."""
    _, _, text = page.partition(f"\n {heading}\n")
    return [shlex.split(line, comments=True) for line in text.splitlines() if line.strip().startswith("spqr ")]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where examples may name files


def parse(words):
    """Parses a command line as the program would, and runs nothing."""
    assert words[0] == "spqr"
    with GROUP.make_context("spqr", words[1:]) as context:
        name, command, rest = GROUP.resolve_command(context, words[1:])
        with command.make_context(name, rest, parent=context) as parsed:
            return parsed.command, parsed.params


# ---- panels -------------------------------------------------------------------------------------


def test_every_command_is_in_one_named_panel_and_in_this_order():
    shown = panels_of(help_page())
    assert list(shown) == ["Options", *PANELS]
    assert {title: names for title, names in shown.items() if title != "Options"} == PANELS
    assert sorted(name for names in PANELS.values() for name in names) == sorted(COMMANDS)


def test_the_first_page_says_what_spqr_does_and_how_to_start():
    page = help_page()
    assert "Compress large language models to 3–4 bits per weight and run them" in " ".join(page.split())
    assert [words[1] for words in examples_of(page, "Start here")] == ["quantize", "generate", "perplexity"]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_stands_in_a_named_panel_with_help_and_a_placeholder(name):
    shown = panels_of(help_page(name))
    assert "Options" not in shown  # typer's own panel, for what has no other
    listed = [option for names in shown.values() for option in names if option.startswith("--")]
    parameters = [parameter for parameter in COMMANDS[name].params if parameter.param_type_name == "option"]
    assert sorted(listed) == sorted(parameter.opts[0] for parameter in parameters)
    for parameter in COMMANDS[name].params:
        assert parameter.help, parameter.name
        assert parameter.metavar, parameter.name


def test_quantize_shows_common_options_before_those_for_experts():
    titles = list(panels_of(help_page("quantize")))
    order = ["Output", "Size and quality", "Calibration text", "Tuning afterwards", "Solver (for experts)"]
    assert [title for title in titles if title in order] == order


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_pages_fit_the_terminal(name, columns):
    page = help_page(*[name] * bool(name), columns=columns)
    assert max(map(len, page.splitlines())) <= columns
    assert "None" not in page
    assert "\\[" not in page
    assert "\033" not in page


# ---- examples -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_ends_with_two_examples_that_parse(name):
    examples = examples_of(help_page(name))
    assert len(examples) >= 2
    for words in examples:
        command, _ = parse(words)
        assert command is COMMANDS[name]


def test_the_start_parses():
    for words in examples_of(help_page(), "Start here"):
        parse(words)


def test_an_example_with_a_wrong_option_would_be_noticed():
    with pytest.raises(Exception, match="--calibration"):
        parse(shlex.split("spqr quantize demo --out small --calibration wikitext2"))
    with pytest.raises(Exception, match=r"MODEL|model"):
        parse(shlex.split("spqr quantize --out small"))


# ---- version ------------------------------------------------------------------------------------


def test_the_version_is_one_line(tmp_path):
    result = spqr("--version", cwd=tmp_path)
    assert result.returncode == 0
    line = rf"spqr-jax {re.escape(__version__)} \(JAX \S+, Python 3\.\d+\.\S+, device .+\)\n"
    assert re.fullmatch(line, result.stdout)


def test_the_version_without_a_device(monkeypatch, tmp_path):
    def fail():
        raise RuntimeError("the device is in use\nmore")

    monkeypatch.setattr("jax.devices", fail)
    assert "no device: the device is in use)" in spqr("--version", cwd=tmp_path).stdout
