"""Help pages that say what the source says: typer takes brackets in help for rich's markup, ours are plain text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer
from rich.markup import escape
from typer.core import TyperCommand


class PlainCommand(TyperCommand):
    """A command whose help, and its options', holds no markup."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.help = _plain(self.help)
        for parameter in self.params:
            parameter.help = _plain(parameter.help)  # type: ignore[attr-defined]


class PlainTyper(typer.Typer):
    """An application of such commands."""

    def command(self, name: str | None = None, **options: Any) -> Callable[..., Any]:
        return super().command(name, **{"cls": PlainCommand, **options})


def _plain(text: str | None) -> str | None:
    return None if text is None else escape(text)
