"""Texts that every Python carries: prose, code, and conversations. No network is needed.

They differ a little from one Python version to the next.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spqr_jax.data.corpora import Split
from spqr_jax.errors import DataError

AT_HAND = {
    "pydoc": "Python's documentation",
    "pysource": "the source of Python's library",
    "pychat": "questions and answers about it, in the model's chat template",
}
"""Names of the texts, and what they are."""

_SOURCE_CHARACTERS = 800_000  # of the code of a split, about
_ASKED_CHARACTERS = 2_000_000  # of the code that the conversations of a split are about
_FILE_CHARACTERS = (2_000, 60_000)  # of a source file, at least and at most
_LEFT_OUT = {  # folders: tests, programs of their own, tables
    "site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "ensurepip",
    "pydoc_data", "encodings", "__pycache__",
}  # fmt: skip
_ANSWER_CHARACTERS = 80  # of a docstring that is an answer, at least
_MOST_TURNS = 4  # questions of a conversation


def pydoc_text(split: Split) -> str:
    """English prose: ``pydoc_data.topics``.

    Topics in alphabetical order, their prose paragraphs once each (grammar, code
    and tables are left out). The first half of the text is for calibration, the
    second for evaluation; no paragraph is in both.
    """
    from pydoc_data.topics import topics  # about 0.5 MB: read only when asked for

    seen: set[str] = set()
    paragraphs = []
    for name in sorted(topics):
        for paragraph in re.split(r"\n\s*\n", topics[name]):
            prose = " ".join(paragraph.split())
            if prose not in seen and len(prose) >= 80 and re.search(r"[a-z]{3}.*[.:]$", prose) and "::=" not in prose:
                seen.add(prose)
                paragraphs.append(prose)
    total, half, cut = sum(map(len, paragraphs)), 0, 0
    while half < total / 2:
        half += len(paragraphs[cut])
        cut += 1
    return "\n\n".join(paragraphs[:cut] if split == "calibration" else paragraphs[cut:])


def pysource_text(split: Split) -> str:
    """Python code: files of the standard library, tests left out.

    The files come in an order that has nothing to do with their names, and every second one is for evaluation.

    Raises:
      DataError: this Python has no source files.
    """
    return "\n\n".join(text for _, text in _sources(split, _SOURCE_CHARACTERS))


def pychat_conversations(split: Split) -> list[list[dict[str, Any]]]:
    """Conversations about functions, classes and methods of the standard library, split as `pysource_text`.

    A user asks what something does; the answer is its docstring. Up to four questions about a module are one
    conversation.

    Returns:
      The messages of each conversation, with `role` and `content`.

    Raises:
      DataError: this Python has no source files.
    """
    conversations = []
    for module, text in _sources(split, _ASKED_CHARACTERS):
        turns = list(_questions(module, text))
        for first in range(0, len(turns), _MOST_TURNS):
            conversations.append([message for turn in turns[first : first + _MOST_TURNS] for message in turn])
    return conversations


def _sources(split: Split, most: int) -> Iterator[tuple[str, str]]:
    """Name and text of the modules of a split, of about so many characters."""
    root = Path(sysconfig.get_paths()["stdlib"])
    modules = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if not _LEFT_OUT & {*parts} and not parts[0].startswith(("config-", "_sysconfigdata")):
            modules[".".join(parts)] = path
    ordered = sorted(modules, key=lambda name: hashlib.sha256(name.encode()).digest())
    characters = 0
    for name in ordered[split == "evaluation" :: 2]:
        try:
            text = modules[name].read_text(encoding="utf-8")
        except (OSError, UnicodeError):  # a file of another encoding, or one that is being replaced
            continue
        if _FILE_CHARACTERS[0] <= len(text) <= _FILE_CHARACTERS[1] and characters < most:
            characters += len(text)
            yield name.removesuffix(".__init__"), text
    if not characters:
        raise DataError(
            f"this Python has no source files of its library in {root}: give a file of text, or 'pydoc' for prose"
        )


def _questions(module: str, text: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """A question and its answer for each public name of a module with a docstring that is long enough."""
    for node in ast.parse(text).body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        kind = "class" if isinstance(node, ast.ClassDef) else "function"
        asked = [(node, f"the {kind} `{node.name}`")]
        for part in node.body if kind == "class" else []:
            if isinstance(part, ast.FunctionDef) and not part.name.startswith("_"):
                asked.append((part, f"the method `{part.name}` of the class `{node.name}`"))
        for documented, name in asked:
            answer = inspect.cleandoc(ast.get_docstring(documented) or "")
            if len(answer) >= _ANSWER_CHARACTERS:
                question = f"What does {name} in Python's module `{module}` do?"
                yield {"role": "user", "content": question}, {"role": "assistant", "content": answer}
