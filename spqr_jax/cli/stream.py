"""Prompts in, text out, as it is made."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from spqr_jax.cli.display import console, say
from spqr_jax.errors import DataError
from spqr_jax.files.text import decode_text
from spqr_jax.generate import Generation
from spqr_jax.models.tokenizer import render_chat, token_ids

Message = dict[str, str]


# ---- prompts ------------------------------------------------------------------------------------


def read_prompts(given: Sequence[str] | None) -> list[str]:
    """The prompts of the command line, else the one that comes in on stdin, as valid text.

    Raises:
      DataError: they are text in no encoding that can be told, or stdin cannot be read.
    """
    if given:
        return [as_text(prompt, f"--prompt number {number}") for number, prompt in enumerate(given, 1)]
    try:
        stream = getattr(sys.stdin, "buffer", sys.stdin)  # bytes, where it has them: they may be in another encoding
        content = stream.read()
    except (OSError, ValueError, AttributeError) as error:  # closed, or None, or a device that fails
        raise DataError(
            f"stdin cannot be read ({getattr(error, 'strerror', None) or 'it is closed'}): give a prompt with --prompt"
        ) from None
    text = decode_text(content, "stdin") if isinstance(content, bytes) else as_text(content, "stdin")
    return [text.rstrip("\n")]


def as_text(text: str, label: str) -> str:
    """Text in which bytes that are not UTF-8 may stand as lone surrogates, as Python hands arguments over.

    Raises:
      DataError: its bytes are text in no encoding that can be told.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        try:
            return decode_text(os.fsencode(text), label)
        except UnicodeEncodeError:  # surrogates that stand for no byte
            raise DataError(f"{label} contains lone surrogates (halves of characters): give valid text") from None
    return text


def encode_chat(tokenizer: Any, messages: Sequence[Message], template: str | None = None) -> list[int]:
    """Token ids of a conversation in a chat template (None: the tokenizer's own), ready for the model's answer.

    Raises:
      ModelError: the model has no chat template, or it fails or refuses the conversation.
      DataError: it makes no text.
    """
    text = render_chat(tokenizer, messages, add_generation_prompt=True, template=template)
    return _some(token_ids(tokenizer, text, add_special_tokens=False))  # the template writes BOS itself


def encode_prompts(tokenizer: Any, prompts: Sequence[str], chat: bool, template: str | None = None) -> list[list[int]]:
    """Token ids of each prompt; with `chat`, as a user's message.

    Raises:
      ModelError: as :func:`encode_chat`, or the tokenizer cannot encode a prompt.
      DataError: a prompt holds no tokens.
    """
    if chat:
        return [encode_chat(tokenizer, [{"role": "user", "content": prompt}], template) for prompt in prompts]
    return [_some(token_ids(tokenizer, prompt, add_special_tokens=True)) for prompt in prompts]


def _some(ids: list[int]) -> list[int]:
    if not ids:
        raise DataError("the prompt holds no tokens: give a text with --prompt or on stdin")
    return ids


# ---- conversations ------------------------------------------------------------------------------


def converse(
    tokenizer: Any,
    answer: Callable[[list[int], TextStream], Generation],
    template: str | None = None,
    describe_end: Callable[[Generation], str] = lambda result: "",
) -> None:
    """Talks with the user at the terminal until Ctrl-D or an empty line.

    Args:
      tokenizer: with a chat template.
      answer: generates from token ids, putting tokens into the stream.
      template: a chat template; None for the tokenizer's own.
      describe_end: why an answer ended; said where that is not at a stop token.
    """
    say("Type a message. An empty line or Ctrl-D ends the conversation.")
    messages: list[Message] = []
    while text := _ask():
        messages.append({"role": "user", "content": text})
        stream = TextStream(tokenizer, live=True)
        result = answer(encode_chat(tokenizer, messages, template), stream)
        reply = tokenizer.decode(result.tokens[0], skip_special_tokens=True)
        stream.finish([text], [reply])
        if result.ended != ["stop"]:
            say(describe_end(result))
        messages.append({"role": "assistant", "content": reply})


def _ask() -> str:
    try:
        return as_text(input("> "), "the line").strip()
    except EOFError:
        return ""
    except UnicodeDecodeError as error:
        raise DataError(f"the line is not text in the terminal's encoding, {error.encoding}: {error.reason}") from None


# ---- text ---------------------------------------------------------------------------------------


class TextStream:
    """Prints text as its tokens come, whole characters only.

    Args:
      tokenizer: decodes.
      live: print while tokens come (one prompt); otherwise all at the end.
    """

    def __init__(self, tokenizer: Any, live: bool) -> None:
        self._tokenizer, self._live = tokenizer, live
        self._tokens: list[int] = []
        self._shown = ""

    def put(self, token: int) -> None:
        """Takes the next token."""
        if not self._live:
            return
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # the middle of a character
            sys.stdout.write(text[len(self._shown) :])
            sys.stdout.flush()
            self._shown = text

    def finish(self, prompts: Sequence[str], texts: Sequence[str]) -> None:
        """Prints what is not yet shown."""
        if self._live:
            sys.stdout.write(texts[0][len(self._shown) :] + "\n")
            sys.stdout.flush()
            return
        for prompt, text in zip(prompts, texts, strict=True):
            console.print(prompt, style="dim")
            console.print(text + "\n")
