"""Which tokens end an answer, and which begins a text: one rule for all kinds of files.

An answer ends at any token that any source names: config.json, generation_config.json
and the tokenizer (as mlx-lm and vLLM do it), or a GGUF file's keys and llama.cpp's list
of end-of-generation tokens. `null` names none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from spqr_jax.errors import ModelError
from spqr_jax.files.entries import Entries, shown
from spqr_jax.files.json_file import read_object
from spqr_jax.models.config import DecoderConfig
from spqr_jax.models.gguf_vocabulary import PREFIX, Vocabulary
from spqr_jax.models.special_tokens import named_id


def all_ends(vocab_size: int, sources: Iterable[tuple[str, Iterable[Any]]]) -> tuple[int, ...]:
    """Every id that any source names, once each, in the sources' order.

    Args:
      vocab_size: of the model.
      sources: what is named, for messages, and ids.

    Raises:
      ModelError: an id that is no whole number, or outside of the vocabulary.
    """
    ends: dict[int, None] = {}
    for label, ids in sources:
        for index in ids:
            if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < vocab_size:
                raise ModelError(
                    f"{label} is {shown(index)}, expected a token id from 0 to {vocab_size - 1}, the model's "
                    "vocabulary: correct the entry, or does the file belong to another model?"
                )
            ends[index] = None
    return tuple(ends)


# ---- directories --------------------------------------------------------------------------------


def tokenizer_ends(directory: Path) -> tuple[int, ...]:
    """Id of the tokenizer's EOS token; none where it has none.

    Raises:
      ModelError: a file of the tokenizer is damaged.
    """
    index = named_id(directory, "eos_token")
    return () if index is None else (index,)


def with_named_tokens(config: DecoderConfig, directory: Path) -> DecoderConfig:
    """A directory's configuration with every token that ends an answer, and the one that begins a text.

    BOS is config.json's, else generation_config.json's, else the tokenizer's.

    Args:
      config: as config.json, or a checkpoint of ours, has it.
      directory: with generation_config.json and the tokenizer's files, where there are some.

    Raises:
      ModelError: a file is damaged, or an id is outside of the vocabulary.
    """
    path = directory / "generation_config.json"
    generation = read_object(path) if path.is_file() else Entries({}, str(path))
    settings = directory / "config.json"
    label = str(settings if settings.is_file() else directory)  # a checkpoint of ours has none
    ends = (
        (f"{label}: eos_token_id", config.eos_token_ids),
        (f"{generation.label}: eos_token_id", generation.integers("eos_token_id")),
        (f"{directory}: the id of the tokenizer's eos_token", tokenizer_ends(directory)),
    )
    begin = config.bos_token_id
    if begin is None:
        begin, label = generation.maybe_integer("bos_token_id"), generation.label
    if begin is None:
        begin, label = named_id(directory, "bos_token"), f"{directory}: the tokenizer"
    all_ends(config.vocab_size, [(f"{label}: bos_token_id", () if begin is None else (begin,))])
    return dataclasses.replace(config, bos_token_id=begin, eos_token_ids=all_ends(config.vocab_size, ends))


# ---- GGUF files ---------------------------------------------------------------------------------


def gguf_ends(file: Any) -> tuple[int, ...]:
    """Tokens of a `spqr_jax.models.gguf.GGUFFile` that end an answer, as llama.cpp has them.

    Raises:
      ModelError: entries of another type, or ids that are none of a token.
    """
    return _gguf_ids(file.entries)[1]


def with_gguf_tokens(config: DecoderConfig, file: Any) -> DecoderConfig:
    """A GGUF file's configuration with every token that ends an answer, and the one that begins a text.

    Raises:
      ModelError: as :func:`gguf_ends`, or an id is outside of the model's vocabulary.
    """
    label = file.entries.label
    begin, ends = _gguf_ids(file.entries)
    all_ends(config.vocab_size, [(f"{label}: {PREFIX}bos_token_id", () if begin is None else (begin,))])
    ends = all_ends(config.vocab_size, [(f"{label}: a token that ends an answer", ends)])
    return dataclasses.replace(config, bos_token_id=begin, eos_token_ids=ends)


def _gguf_ids(entries: Entries) -> tuple[int | None, tuple[int, ...]]:
    """BOS, and the tokens that end an answer; a file without a vocabulary may still name some."""
    if f"{PREFIX}tokens" in entries:
        vocabulary = Vocabulary(entries)
        return vocabulary.special_id("bos"), vocabulary.ends()
    begin, *ends = (entries.maybe_integer(f"{PREFIX}{name}_token_id") for name in ("bos", "eos", "eot", "eom"))
    return begin, tuple(dict.fromkeys(index for index in ends if index is not None))
