"""The vocabulary of a GGUF file, checked: tokens, their types, and the ids that mean something.

Keys, token types and defaults are those of llama.cpp's src/llama-vocab.cpp.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

from spqr_jax.errors import ModelError
from spqr_jax.files.entries import Entries, shown

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # tokenizer.ggml.token_type
PREFIX = "tokenizer.ggml."

BYTE_LEVEL, SENTENCEPIECE = "gpt2", "llama"  # tokenizer.ggml.model

# Ids that llama.cpp takes where the file names none. 11 is Falcon's <|endoftext|>.
_DEFAULT_IDS = {
    BYTE_LEVEL: {"bos": 11, "eos": 11},
    SENTENCEPIECE: {"bos": 1, "eos": 2, "unknown": 0},
}

# Tokens that end an answer by their text, of whatever type they are; llama.cpp makes control tokens of them.
_ENDS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>",
    "<eos>", "<turn|>", "<|tool_response>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "[e~[",
)  # fmt: skip
# Padding, repository and file of code that is to be filled in: they end an answer, too.
_CODE_ENDS = {
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}
_KEYS_OF_ENDS = ("eos", "eot", "eom", *_CODE_ENDS)
_HTML_OR_END = "</s>"  # Gemma has it as a tag of HTML: it ends an answer only as a control token


class Vocabulary:
    """Tokens of a GGUF file by id.

    Args:
      entries: the file's header.

    Attributes:
      kind: ``tokenizer.ggml.model``.
      tokens: texts; an empty one is named ``[EMPTY_id]``, as llama.cpp does.

    Raises:
      ModelError: no tokens, tokens of another type, or two that are the same.
    """

    def __init__(self, entries: Entries) -> None:
        self._entries, self.label = entries, entries.label
        self.kind = entries.maybe_text(f"{PREFIX}model")
        tokens = entries.texts(f"{PREFIX}tokens")
        if not tokens:
            raise entries.lacks(f"{PREFIX}tokens", "the vocabulary")
        self.tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(tokens)]

    @cached_property
    def ids(self) -> dict[str, int]:
        """Id of each token.

        Raises:
          ModelError: two tokens are the same.
        """
        ids = {token: index for index, token in enumerate(self.tokens)}
        if len(ids) < len(self.tokens):
            first = next(index for index, token in enumerate(self.tokens) if ids[token] != index)
            raise ModelError(
                f"{self.label}: {PREFIX}tokens has {shown(self.tokens[first])} twice, at {first} and "
                f"{ids[self.tokens[first]]}, but each token must occur once: convert the model again"
            )
        return ids

    @cached_property
    def types(self) -> list[int]:
        """Type of each token; empty where the file has none.

        Raises:
          ModelError: their number is another, or they are no whole numbers.
        """
        types = self._entries.integers(f"{PREFIX}token_type")
        self.check_length("token_type", types)
        return types

    def check_length(self, name: str, values: list[Any]) -> None:
        """Raises an error where a list about tokens is not as long as the vocabulary; an absent one is empty."""
        if values and len(values) != len(self.tokens):
            raise ModelError(
                f"{self.label}: {PREFIX}{name} has {len(values)} values for {len(self.tokens)} tokens, expected one "
                "for each token: convert the model again"
            )

    def is_special(self, index: int) -> bool:
        """Whether a token is found in a text before all others and is no part of what a reader sees."""
        return self._has_type(index, _CONTROL, _UNKNOWN) or self.tokens[index] in _ENDS

    def is_user_defined(self, index: int) -> bool:
        """Whether a token is found in a text before all others, and is ordinary text."""
        return self._has_type(index, _USER_DEFINED) and not self.is_special(index)

    def special_id(self, name: str) -> int | None:
        """The id of ``bos``, ``eos``, ``unknown``, ``padding``, ...; llama.cpp's default, or None, where there is none.

        The defaults of byte-level vocabularies are Falcon's: they count only where that
        token is a control token, else a text would begin or end with some letter.

        Raises:
          ModelError: it is no id of a token.
        """
        index = self._entries.maybe_integer(f"{PREFIX}{name}_token_id", most=len(self.tokens) - 1)
        if index is not None:
            return index
        default = _DEFAULT_IDS.get(self.kind or "", {}).get(name)
        if default is None or default >= len(self.tokens):
            return None
        return default if self.kind == SENTENCEPIECE or self._has_type(default, _CONTROL) else None

    def ends(self) -> tuple[int, ...]:
        """Tokens that end an answer: llama.cpp's end-of-generation tokens, those named by keys first.

        Raises:
          ModelError: a key names no id of a token.
        """
        ends = [index for key in _KEYS_OF_ENDS if (index := self.special_id(key)) is not None]
        by_text, present = set(_ENDS), {token: index for index, token in enumerate(self.tokens)}
        for key, its_texts in _CODE_ENDS.items():
            if f"{PREFIX}{key}_token_id" not in self._entries:
                by_text.update(its_texts)
        if _HTML_OR_END in present and self._has_type(present[_HTML_OR_END], _CONTROL):
            by_text.add(_HTML_OR_END)
        ends += sorted(present[text] for text in by_text & present.keys())
        texts = {self.tokens[index] for index in ends}
        # where an answer has parts, <|end|> ends one of them; where tools answer, </s> is HTML
        if texts & {"<|call|>", "<|calls|>"} and texts & {"<|return|>", "<|flush|>"}:
            texts.discard("<|end|>")
        if "<|tool_response>" in texts:
            texts.discard(_HTML_OR_END)
        return tuple(dict.fromkeys(index for index in ends if self.tokens[index] in texts))

    def _has_type(self, index: int, *types: int) -> bool:
        return bool(self.types) and self.types[index] in types
