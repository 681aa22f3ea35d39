"""Documents out of files that people keep texts in: plain text, JSON lines, JSON, CSV, Parquet.

What a record holds follows the data sets of the Hugging Face hub: a `text`, or a
conversation under `messages` (`role` and `content`, as in OpenAI's API) or
`conversations` (`from` and `value`, as ShareGPT writes them).
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from spqr_jax.errors import DataError
from spqr_jax.files.entries import LARGEST, shown
from spqr_jax.files.json_file import read_bytes
from spqr_jax.files.tables import Row, csv_rows, json_rows, looks_like_json, no_text, parquet_rows
from spqr_jax.files.text import checked_characters, decode_text

Messages = list[dict[str, Any]]

CONVERSATION_NAMES = ("messages", "conversations", "conversation")
TEXT_NAMES = ("text", *CONVERSATION_NAMES)
"""The columns or keys that are read, the first that holds something."""

_SYSTEM = "system"  # beside a conversation: its system message

_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}
"""Roles by the names that ShareGPT's format has for them."""


@dataclasses.dataclass(frozen=True)
class Document:
    """A record of a file.

    Attributes:
      content: a text, or the messages of a conversation (`role`, `content` and what else they hold).
      place: the file and the line or row.
    """

    content: str | Messages
    place: str


def read_documents(path: Path, names: Sequence[str] = TEXT_NAMES) -> str | list[Document]:
    """The documents of a file, blank ones included; of plain text, the text itself.

    The kind is told by the content (Parquet; JSON records, whatever the file is called)
    and by the end of the name, in any case: .json, .jsonl, .ndjson, .csv, .tsv, .parquet,
    each also with .gz.

    Args:
      path: the file.
      names: of the columns or keys to read, the first that holds something.

    Raises:
      DataError: a file that cannot be read, or a record that is not understood.
    """
    label = str(path)
    data = read_limited(path)
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    suffix = suffixes[-1] if suffixes else ""
    rows: Iterator[Row]
    if data[:4] == data[-4:] == b"PAR1":
        rows = parquet_rows(data, label, names, [_SYSTEM])
    elif suffix in (".parquet", ".pq"):
        decode_text(data, label)  # what else it is, if that can be told
        raise DataError(f"{label} is not a Parquet file (which begins and ends with 'PAR1'): fetch it again")
    else:
        text = decode_text(data, label)
        if suffix in (".csv", ".tsv"):
            delimiters = ",;\t" if suffix == ".csv" else "\t,;"
            rows = csv_rows(text, label, delimiters, names, [_SYSTEM]) if text.strip() else iter(())
        elif suffix in (".json", ".jsonl", ".ndjson") or looks_like_json(text):
            rows = json_rows(text, label)
        else:
            return text
    return [Document(_content(value, place, label, names), place) for place, value in rows]


def read_limited(path: Path) -> bytes:
    """A whole file of at most 2 GiB.

    Raises:
      DataError: it is not there, cannot be read, or is larger.
    """
    if os.path.isdir(path):
        raise DataError(f"{path} is a directory: give one of its files")
    try:
        size = os.stat(path).st_size
    except (OSError, ValueError):
        size = 0  # reading it says what is wrong
    if size > LARGEST:
        raise DataError(
            f"{path} has {size / 1e9:.1f} GB, but at most 2.1 GB can be read: use a part, `head -n 100000 FILE > PART`"
        )
    return read_bytes(path, DataError)


def _content(value: Any, place: str, label: str, names: Sequence[str]) -> str | Messages:
    """What a record says; an empty text where it says nothing."""
    if isinstance(value, str) and TEXT_NAMES[0] in names:
        return checked_characters(value, place)
    if not isinstance(value, dict):
        raise DataError(
            f"{place} is {shown(value)}, expected a string or an object with {' or '.join(names)}: correct or remove it"
        )
    name = next((name for name in names if value.get(name) is not None), None)
    if name is None:
        if set(names) & set(value):
            return ""
        raise no_text(place, "key", list(value), label, names)
    content = value[name]
    if isinstance(content, str) and name in CONVERSATION_NAMES and content.strip():
        try:
            content = json.loads(content)  # as a cell of a table holds it
        except (ValueError, RecursionError):
            raise DataError(f"{place}: {name} is {shown(content)}, expected a list of messages as JSON") from None
    if isinstance(content, str):
        return checked_characters(content, place)
    if not isinstance(content, list):
        raise DataError(f"{place}: {name} is {shown(content)}, expected a string or a list of messages")
    messages = [_message(message, f"{place}: {name}[{index}]") for index, message in enumerate(content)]
    system = value.get(_SYSTEM)
    if isinstance(system, str) and system.strip() and messages and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return messages or ""


def _message(message: Any, place: str) -> dict[str, Any]:
    """A message with `role` and `content`, a text; what else it holds is for the chat template."""
    if not isinstance(message, dict):
        raise DataError(f"{place} is {shown(message)}, expected an object with role and content")
    message = {name: value for name, value in message.items() if value is not None}
    if "from" in message and "role" not in message:
        speaker = message.pop("from")
        if not isinstance(speaker, str) or speaker.lower() not in _SPEAKERS:
            raise DataError(f"{place}: from is {shown(speaker)}, expected one of {', '.join(_SPEAKERS)}")
        message |= {"role": _SPEAKERS[speaker.lower()], "content": message.pop("value", None)}
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise DataError(f"{place}: role is {shown(role)}, expected a string such as 'user'")
    if content is None and message.get("tool_calls"):
        content = ""
    if isinstance(content, list):
        content = "".join(_part(part, f"{place}: content[{index}]") for index, part in enumerate(content))
    if not isinstance(content, str):
        raise DataError(f"{place}: content is {shown(content)}, expected a string")
    return {**message, "role": role, "content": content}


def _part(part: Any, place: str) -> str:
    """The text of a part of a message, as OpenAI's API has it."""
    if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        text: str = part["text"]
        return text
    raise DataError(f"{place} is {shown(part)}, expected {{'type': 'text', 'text': ...}}: only text is supported")
