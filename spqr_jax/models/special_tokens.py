"""What a model directory names as its BOS, EOS, unknown and padding tokens, as transformers reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spqr_jax.files.entries import LARGEST, Entries
from spqr_jax.files.json_file import read_object

_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")


def tokenizer_settings(directory: Path) -> Entries:
    """The entries of tokenizer_config.json; none where there is no such file."""
    path = directory / "tokenizer_config.json"
    return read_object(path) if path.is_file() else Entries({}, str(path))


def named_tokens(directory: Path) -> dict[str, str]:
    """``bos_token``, ``eos_token``, ``unk_token`` and ``pad_token``, those that are named.

    transformers' order: special_tokens_map.json goes before tokenizer_config.json, unless
    the latter lists its tokens itself (``added_tokens_decoder``), as newer ones do.

    Raises:
      ModelError: a file is damaged, or names no text.
    """
    settings, path = tokenizer_settings(directory), directory / "special_tokens_map.json"
    sources = [settings]
    if path.is_file():
        sources.insert(1 if "added_tokens_decoder" in settings else 0, read_object(path))
    named: dict[str, str] = {}
    for role in _ROLES:
        texts = [text for source in sources if (text := _token_text(source, role)) is not None]
        if texts:
            named[role] = texts[0]
    return named


def named_id(directory: Path, role: str) -> int | None:
    """Id of the token that is named ``bos_token`` or ``eos_token``; None for none, or one that is no token.

    tokenizer_config.json is looked at before tokenizer.json, which can have many megabytes.

    Raises:
      ModelError: a file is damaged.
    """
    token = named_tokens(directory).get(role)
    if token is None:
        return None
    settings = tokenizer_settings(directory)
    listed = settings.nested("added_tokens_decoder")
    for index in listed:
        if index.isdecimal() and listed.nested(index).raw("content") == token:
            return min(int(index), LARGEST)
    path = directory / "tokenizer.json"
    return _id_in_tokenizer(read_object(path), token) if path.is_file() else None


def _token_text(source: Entries, role: str) -> str | None:
    """A token: a text, or an object with its text and how it is found."""
    if isinstance(source.raw(role), dict):
        return source.nested(role).text("content")
    return source.maybe_text(role)


def _id_in_tokenizer(values: Entries, token: str) -> int | None:
    """Id of a token: one that was added, or one of the model's vocabulary, a table or a list with scores."""
    added: list[Any] = values.raw("added_tokens") or []
    for entry in added if isinstance(added, list) else []:
        if isinstance(entry, dict) and entry.get("content") == token:
            return Entries(entry, values.label, prefix="added_tokens: ").integer("id")
    model = values.nested("model")
    vocabulary = model.raw("vocab")
    if isinstance(vocabulary, list):
        texts = (entry[0] if isinstance(entry, list) and entry else None for entry in vocabulary)
        return next((index for index, text in enumerate(texts) if text == token), None)
    return model.nested("vocab").maybe_integer(token)
