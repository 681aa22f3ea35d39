"""The directive `command`: usage, help, arguments and options of one `spqr` command, from the program itself."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import typer
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from spqr_jax.cli.app import app as spqr


class Command(SphinxDirective):
    """```{command} quantize```: what ``spqr quantize --help`` says."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        commands = typer.main.get_command(spqr).commands  # type: ignore[attr-defined]
        if name not in commands:
            raise self.error(f"there is no command {name!r}: spqr has {', '.join(commands)}")
        command = commands[name]
        context = typer.Context(command, info_name=f"spqr {name}")
        usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
        result: list[nodes.Node] = [nodes.literal_block(usage, usage, language="text")]
        result += [nodes.paragraph("", "", *_with_code(part)) for part in _plain(command.help).split("\n\n")]
        if examples := getattr(command, "examples", None) or command.epilog:
            result.append(nodes.literal_block(text := inspect.cleandoc(examples), text, language="bash"))
        for title, parameters in _panels(command.params).items():
            items = [_item(*parameter.get_help_record(context)) for parameter in parameters]
            result += [nodes.rubric(text=title), nodes.definition_list("", *items, classes=["options"])]
        return result


def _plain(text: str | None) -> str:
    """Help as people read it: without the backslashes that keep rich from taking brackets for markup."""
    return (text or "").replace("\\[", "[").strip()


def _with_code(text: str) -> list[nodes.Node]:
    """Text whose parts between backticks are code."""
    parts = text.split("`")
    return [nodes.literal(text=part) if place % 2 else nodes.Text(part) for place, part in enumerate(parts)]


def _panels(parameters: Iterable[Any]) -> dict[str, list[Any]]:
    """Arguments and options by the title under which the help shows them."""
    panels: dict[str, list[Any]] = {}
    for parameter in parameters:
        if not getattr(parameter, "hidden", False):
            usual = "Arguments" if parameter.param_type_name == "argument" else "Options"
            panels.setdefault(getattr(parameter, "rich_help_panel", None) or usual, []).append(parameter)
    return panels


def _item(names: str, text: str) -> nodes.definition_list_item:
    """One option: ``--bits <str>`` and what it does."""
    term = nodes.term("", "", nodes.literal(text=names))
    return nodes.definition_list_item(
        "", term, nodes.definition("", nodes.paragraph("", "", *_with_code(_plain(text))))
    )


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("command", Command)
    return {"parallel_read_safe": True}
