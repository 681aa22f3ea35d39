"""Tokenizers, read in one way: tokenizer.json is the truth, wherever it comes from.

What a tokenizer does is in tokenizer.json: how text is cut, which tokens are found
first, what stands before and after a text. tokenizer_config.json names tokens and holds
chat templates; what it says beside that (``add_bos_token``, ``tokenizer_class``,
``clean_up_tokenization_spaces``, ...) is for programs that rebuild the tokenizer, and
counts for nothing here. The class that transformers would pick is not asked: some of
them rebuild normalizer, decoder or post-processor by rules of their own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from spqr_jax.errors import ModelError
from spqr_jax.files.json_file import read_bytes
from spqr_jax.models.chat import chat_templates, pick_template, render_chat
from spqr_jax.models.gguf_tokenizer import gguf_tokenizer
from spqr_jax.models.raw_tokenizer import as_transformers, parse_tokenizer, token_ids
from spqr_jax.models.special_tokens import named_tokens

__all__ = [
    "encode_stream",
    "gguf_tokenizer",
    "gguf_tokenizer_files",
    "load_tokenizer",
    "pick_template",
    "render_chat",
    "token_ids",
    "tokenizer_files",
]

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
_MORE_TEMPLATES = "additional_chat_templates"


def load_tokenizer(directory: Path, say: Callable[[str], None] = lambda message: None) -> Any:
    """The tokenizer of a model directory (Hugging Face's or ours), as a transformers tokenizer.

    Its ids and texts are those of tokenizer.json alone. A token that tokenizer_config.json
    or special_tokens_map.json names and that is no token is left out, not added: the model
    has no row for it. No code of the model's is run.

    Args:
      directory: with tokenizer.json.
      say: told of a BOS or EOS token that is left out.

    Raises:
      ModelError: the directory holds no tokenizer that can be read.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise ModelError(
            f"{directory} has no tokenizer.json (only fast tokenizers are supported); give token ids (.npy) as data "
            "instead of text"
        )
    tokenizer, named = parse_tokenizer(read_bytes(path), str(path)), named_tokens(directory)
    for role in ("bos_token", "eos_token"):
        if role in named and tokenizer.token_to_id(named[role]) is None:
            say(f"{directory}: its {role} {named[role]!r} is not a token of its tokenizer.json and is ignored")
    return as_transformers(tokenizer, named, chat_templates(directory), name=str(directory))


def encode_stream(tokenizer: Any, text: str) -> np.ndarray:
    """Token ids of a long text, int32 [tokens], without special tokens."""
    return np.array(token_ids(tokenizer, text, add_special_tokens=False), np.int32)


# ---- files --------------------------------------------------------------------------------------


def tokenizer_files(directory: Path) -> dict[str, bytes]:
    """What to keep of a directory's tokenizer: its files, byte for byte, by their path in the directory.

    Raises:
      ModelError: a file cannot be read.
    """
    paths = [directory / name for name in _FILES]
    paths += sorted((directory / _MORE_TEMPLATES).glob("*.jinja"))
    return {path.relative_to(directory).as_posix(): read_bytes(path) for path in paths if path.is_file()}


def gguf_tokenizer_files(file: Any) -> dict[str, bytes]:
    """The same files for the tokenizer of a `spqr_jax.models.gguf.GGUFFile`, as transformers writes them.

    Raises:
      ModelError: as :func:`gguf_tokenizer`.
    """
    tokenizer = gguf_tokenizer(file)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        return tokenizer_files(Path(scratch))
