"""The text that a model is calibrated on if nobody says which: some of every kind that people use models for."""

from __future__ import annotations

from typing import NamedTuple

MIXED = "mixed"
"""The name of the mixture."""


class Part(NamedTuple):
    """A text of a mixture, its weight, and what to take where it cannot be had."""

    name: str
    weight: float
    otherwise: str | None = None


FROM_HUB = (
    Part("wikitext2", 2, "pydoc"),
    Part("codeparrot", 2, "pysource"),
    Part("ultrachat", 1, "pychat"),
    Part("wikipedia-de", 0.25),
    Part("wikipedia-es", 0.25),
    Part("wikipedia-fr", 0.25),
    Part("wikipedia-zh", 0.25),
)
"""Prose, code, conversations and other languages from the Hugging Face hub."""

FROM_PYTHON = (Part("pydoc", 2), Part("pysource", 2), Part("pychat", 1))
"""Prose, code and conversations that come with Python: for a machine without a network."""

_CONVERSATIONS = {"ultrachat", "pychat"}


def parts_for(parts: tuple[Part, ...], *, has_chat_template: bool, windows: int) -> tuple[Part, ...]:
    """The parts that a model can read, the first ones if there are fewer windows than parts."""
    readable = tuple(part for part in parts if has_chat_template or part.name not in _CONVERSATIONS)
    return readable[:windows]
