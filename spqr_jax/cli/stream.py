"""Prompts in, text out, as it is made."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from spqr_jax.cli.display import console
from spqr_jax.errors import ModelError


def encode_prompts(tokenizer: Any, prompts: Sequence[str], chat: bool) -> list[list[int]]:
    """Token ids of each prompt; with `chat`, as a user's message in the model's template.

    Raises:
      ModelError: `chat` with a model that has no chat template.
    """
    if not chat:
        return [tokenizer(prompt)["input_ids"] for prompt in prompts]
    if not tokenizer.chat_template:
        raise ModelError("this model has no chat template: leave out --chat, or use an instruction-tuned model")
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for prompt in prompts
    ]


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
            console.print(prompt, style="dim", markup=False)
            console.print(text + "\n", markup=False)
