"""What the user calls data, as token ids: names of corpora, files of text, of records, of ids."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spqr_jax.data.at_hand import AT_HAND, pychat_conversations, pydoc_text, pysource_text
from spqr_jax.data.corpora import CORPORA, Split, read_corpus
from spqr_jax.errors import DataError, SpQRError
from spqr_jax.files.entries import LARGEST
from spqr_jax.files.records import TEXT_NAMES, Document, read_documents
from spqr_jax.files.text import checked_characters

Encode = Callable[[str], np.ndarray]
Render = Callable[[list[dict[str, Any]]], str]

DATA_HELP = (
    f"{', '.join(CORPORA)} (from the hub), "
    + ", ".join(f"{name} ({what})" for name, what in AT_HAND.items())
    + " (always available), a text file, a .jsonl, "
    ".json, .csv, .tsv or .parquet file with a column text or messages (FILE#COLUMN names another column), an .npy "
    "file of token ids (1-D: a stream; 2-D: windows), or wikitext2:FILE or ptb:FILE (a local copy)"
)


def load_tokens(spec: str, split: Split, encode: Encode, render: Render | None = None) -> np.ndarray:
    """Reads data as token ids.

    Args:
      spec: see `DATA_HELP`.
      split: which side of a named corpus; a file is used whole.
      encode: text to int32 [tokens], without special tokens.
      render: the text of a conversation (messages with `role` and `content`) in the
        model's chat template; None: the model has none.

    Returns:
      int32 [tokens], a stream, or [windows, length], windows as they are.

    Raises:
      DataError: no such data, or data that is empty or of the wrong kind.
      SpQRError: of `render`, with the record's place before it.
    """
    name, _, file = spec.partition(":")
    if spec in AT_HAND:
        return encode(_at_hand(spec, split, render))
    if name in CORPORA:
        text = _read_local(name, file) if file else _join_documents(read_corpus(name, split), render)
    else:
        path, column = _split_column(spec)
        if column is None and (path.suffix.lower() == ".npy" or _holds_ids(path)):
            return _read_ids(path)
        if not os.path.exists(path):
            raise DataError(f"no data found for {spec!r}: expected {DATA_HELP}")
        text = _join_documents(_read_column(path, column, TEXT_NAMES), render)
    tokens = encode(text) if text.strip() else np.empty(0, np.int32)
    if not tokens.size:
        raise DataError(f"{spec} holds no text")
    return tokens


def _at_hand(name: str, split: Split, render: Render | None) -> str:
    """A text that every Python carries."""
    if name == "pydoc":
        return pydoc_text(split)
    if name == "pysource":
        return pysource_text(split)
    conversations = pychat_conversations(split)
    documents = [Document(messages, f"pychat, conversation {i}") for i, messages in enumerate(conversations, 1)]
    return _join_documents(documents, render)


def _split_column(spec: str) -> tuple[Path, str | None]:
    """The file and the column of ``FILE#COLUMN``, where no file has this whole name."""
    file, separator, column = spec.rpartition("#")
    if separator and file and column and not os.path.exists(spec):
        return Path(file), column
    return Path(spec), None


def _read_column(path: Path, column: str | None, names: Sequence[str]) -> str | list[Document]:
    documents = read_documents(path, names if column is None else (column,))
    if column is not None and isinstance(documents, str):
        raise DataError(f"{path} is plain text and has no columns: remove '#{column}'")
    return documents


def _join_documents(documents: str | list[Document], render: Render | None) -> str:
    """Texts with "\n\n" between, conversations rendered; blank documents are left out."""
    if isinstance(documents, str):
        return documents
    parts: list[str] = []
    after_text = False
    for document in documents:
        is_text = isinstance(document.content, str)
        text = document.content if isinstance(document.content, str) else _rendered(document, render)
        if not text.strip():
            continue
        parts += ["\n\n", text] if after_text and is_text else [text]
        after_text = is_text
    return "".join(parts)


def _rendered(document: Document, render: Render | None) -> str:
    if render is None:
        raise DataError(
            f"{document.place} is a conversation, but the model has no chat template: give plain text, or use an "
            "instruction-tuned model"
        )
    assert not isinstance(document.content, str)
    try:
        text = render(document.content)
    except SpQRError as error:
        raise type(error)(f"{document.place}: {error}") from None
    return checked_characters(text, document.place)


def _holds_ids(path: Path) -> bool:
    """Whether a file is an .npy by its first bytes."""
    if not os.path.isfile(path):  # a pipe can be read once only
        return False
    try:
        with path.open("rb") as file:
            return file.read(6) == b"\x93NUMPY"
    except OSError:
        return False  # reading it says what is wrong


def _read_ids(path: Path) -> np.ndarray:
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)  # mapped: a header that lies asks for no memory
        if not isinstance(ids, np.ndarray):
            raise ValueError("it is an archive of several arrays (.npz), expected one array")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # NumPy's reader of headers fails in many ways
        raise DataError(f"{path} is not an .npy file of numbers: {error or type(error).__name__}") from None
    if ids.ndim not in (1, 2) or not np.issubdtype(ids.dtype, np.integer) or not ids.size:
        raise DataError(
            f"{path} holds {ids.dtype} of shape {ids.shape}; expected integer token ids, [tokens] or [windows, length]"
        )
    if ids.min() < 0:
        raise DataError(f"{path} holds negative token ids (smallest {ids.min()})")
    if ids.max() > LARGEST:
        raise DataError(
            f"{path} has values that do not fit in 32 bits (largest {ids.max()}): are these really token ids?"
        )
    return np.array(ids, np.int32)


def _read_local(name: str, file: str) -> str:
    """A local copy of a corpus, its lines or records joined as the corpus is."""
    corpus = CORPORA[name]
    if corpus.join_lines is None:
        raise DataError(f"{name} cannot be read from a local copy as {name}:FILE; give only the file's path")
    path, column = _split_column(file)
    if not os.path.exists(path):
        raise DataError(f"{path} does not exist")
    documents = _read_column(path, column, (corpus.column, "text"))
    if isinstance(documents, str):
        return corpus.join_lines(documents.splitlines(keepends=True))
    for document in documents:
        if not isinstance(document.content, str):
            raise DataError(f"{document.place} is a conversation, but {name} is plain text: give only the file's path")
    return corpus.join_lines(str(document.content) for document in documents)


def split_weight(spec: str) -> tuple[str, float]:
    """The text and the weight of ``TEXT=WEIGHT``, where no file has this whole name; 1 without one.

    Raises:
      DataError: a weight that is no positive number.
    """
    text, separator, weight = spec.rpartition("=")
    file = spec.partition(":")[2] if spec.partition(":")[0] in CORPORA else spec
    if not separator or os.path.exists(file) or ("#" in weight and os.path.exists(file.rpartition("#")[0])):
        return spec, 1.0
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not text or not (math.isfinite(value) and value > 0):
        raise DataError(
            f"{spec!r}: there is no file with this name, so {weight!r} must be the weight of the text: a positive "
            "number, as in code.jsonl=2"
        )
    return text, value
