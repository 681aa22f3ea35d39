"""Prompts in, text out, as it is made."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax

from cpu_kernels import chosen_kernels
from spqr_jax._compat import give_back_memory
from spqr_jax.array import SpQRArray
from spqr_jax.blocks import BlockSource, collect
from spqr_jax.cli.display import console, say
from spqr_jax.errors import ModelError
from spqr_jax.generate import Generation, Generator
from spqr_jax.linear import default_implementation, why_no_kernels, why_no_pallas

Message = dict[str, str]


def describe_products() -> str:
    """How products with quantized weights are made on this machine."""
    implementation = default_implementation()
    if implementation == "cpu":
        return f"products here: native CPU kernels, {chosen_kernels()}"
    if implementation != "xla":
        return f"products here: Pallas kernels, {implementation}"
    why = why_no_kernels() if jax.default_backend() == "cpu" else why_no_pallas()
    return f"products here: from dequantized weights, the slow way: {why}"


def load_generator(source: BlockSource, int8_activations: bool) -> Generator:
    """Reads a whole model and makes it ready; says so if that is the slow way."""
    params = collect(source)
    arrays = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, SpQRArray))
    quantized = any(isinstance(leaf, SpQRArray) for leaf in arrays)
    if quantized and default_implementation() == "xla":
        say(describe_products())
    generator = Generator(params, int8_activations=int8_activations)
    del params, arrays  # what was read is no longer needed: with a small model it is half of what the process holds
    give_back_memory()
    return generator


def encode_chat(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation in the model's chat template, ready for its answer.

    Raises:
      ModelError: the model has no chat template.
    """
    if not tokenizer.chat_template:
        raise ModelError("this model has no chat template: leave out --chat, or use an instruction-tuned model")
    encoded = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=True)
    ids: list[int] = encoded["input_ids"]
    return ids


def encode_prompts(tokenizer: Any, prompts: Sequence[str], chat: bool) -> list[list[int]]:
    """Token ids of each prompt; with `chat`, as a user's message."""
    if chat:
        return [encode_chat(tokenizer, [{"role": "user", "content": prompt}]) for prompt in prompts]
    return [tokenizer(prompt)["input_ids"] for prompt in prompts]


def converse(
    tokenizer: Any,
    answer: Callable[[list[int], TextStream], Generation],
    describe_end: Callable[[Generation], str] = lambda result: "",
) -> None:
    """Talks with the user at the terminal until Ctrl-D or an empty line.

    Args:
      tokenizer: with a chat template.
      answer: generates from token ids, putting tokens into the stream.
      describe_end: why an answer ended; said where that is not at a stop token.
    """
    say("an empty line or Ctrl-D ends the conversation")
    messages: list[Message] = []
    while text := _ask():
        messages.append({"role": "user", "content": text})
        stream = TextStream(tokenizer, live=True)
        result = answer(encode_chat(tokenizer, messages), stream)
        reply = tokenizer.decode(result.tokens[0], skip_special_tokens=True)
        stream.finish([text], [reply])
        if result.ended != ["stop"]:
            say(describe_end(result))
        messages.append({"role": "assistant", "content": reply})


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


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
