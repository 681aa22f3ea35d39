"""Help pages: commands and options in panels, and examples at the end.

typer reads brackets in help as rich's markup; our texts are plain and may hold brackets.
typer also wraps and joins the lines of an epilog; examples must stay as they are, to be copied.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import typer  # the command line from type annotations; it brings rich, which draws the rest
from rich.markup import escape
from rich.text import Text
from typer.core import TyperCommand, TyperGroup

from spqr_jax.cli.display import console

MAKE, MEASURE, USE, EXCHANGE = "Make", "Measure", "Use", "Exchange"
"""The panels of commands in ``spqr --help``."""

OUTPUT = "Output"
TEXT = "Text"
CALIBRATION = "Calibration text"
COMPUTATION = "Computation"
"""Panels of options that several commands have."""

NOTHING = " "
"""As the placeholder of a flag, for which newer typers show ``<bool>``."""


def option(panel: str | None, metavar: str, text: str, *names: str, **settings: Any) -> Any:
    """An option with a value.

    Args:
      panel: title of its panel in the command's help; None for typer's own.
      metavar: the value's placeholder, such as ``N``.
      text: its help.
      names: the option itself, such as ``--format``; none: the parameter's name.
      settings: more settings of ``typer.Option``.
    """
    return typer.Option(*names, help=text, metavar=metavar, rich_help_panel=panel, **settings)


def flag(panel: str | None, name: str, text: str, **settings: Any) -> Any:
    """An option without a value, such as ``--overwrite``; see `option`."""
    return option(panel, NOTHING, text, name, show_default=False, **settings)


def argument(metavar: str, text: str) -> Any:
    """A required argument; see `option`."""
    return typer.Argument(help=text, metavar=metavar, show_default=False)


class _PlainHelp:
    """What our commands and their group share."""

    heading = "Examples"
    help: str | None
    params: list[Any]

    def __init__(self, *args: Any, epilog: str | None = None, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.examples = epilog or ""
        self.help = _plain(self.help)
        for parameter in self.params:
            parameter.help = _plain(_with_default(parameter))

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Without the braces that newer typers put around required arguments."""
        return [piece.replace("{", "").replace("}", "") for piece in super().collect_usage_pieces(ctx)]  # type: ignore[misc]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """The page as typer draws it, then the examples, neither wrapped nor in a box."""
        super().format_help(ctx, formatter)  # type: ignore[misc]
        if self.examples:
            lines = [f"   {line}".rstrip() for line in inspect.cleandoc(self.examples).splitlines()]
            console.print(Text(f" {self.heading}", "bold"))
            console.print(Text("\n".join(lines)), soft_wrap=True)


class PlainCommand(_PlainHelp, TyperCommand):
    """A command whose help holds no markup. Its ``--help`` works but is not listed: whoever reads it has used it."""

    def get_help_option(self, ctx: Any) -> Any:
        help_option = super().get_help_option(ctx)
        if help_option is not None:
            help_option.hidden = True
        return help_option


class PlainGroup(_PlainHelp, TyperGroup):
    """All commands."""

    heading = "Start here"

    def get_help_option(self, ctx: Any) -> Any:
        help_option = super().get_help_option(ctx)
        if help_option is not None:
            help_option.help = "Show this message. Each command has its own: spqr quantize --help"
            help_option.metavar = NOTHING
        return help_option


class PlainTyper(typer.Typer):
    """An application of such commands."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(cls=PlainGroup, rich_markup_mode="rich", **settings)

    def command(self, name: str | None = None, **settings: Any) -> Callable[..., Any]:
        return super().command(name, **{"cls": PlainCommand, **settings})


def _with_default(parameter: Any) -> str | None:
    """Help that ends with the default where that is given in words, which typer would put in parentheses."""
    words = getattr(parameter, "show_default", False)
    if isinstance(words, str) or parameter.default is None:  # older typers write: default: None
        parameter.show_default = False
    if not isinstance(words, str):
        return parameter.help
    return f"{parameter.help} [default: {words}]"


def _plain(text: str | None) -> str | None:
    """Text without markup, each paragraph on one line: typer keeps some of the source's line breaks."""
    if text is None:
        return None
    return escape("\n\n".join(" ".join(paragraph.split()) for paragraph in inspect.cleandoc(text).split("\n\n")))
