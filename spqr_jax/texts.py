"""Texts that users name, as token ids of a model: to measure on, and to calibrate with."""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from spqr_jax.data import Split, load_tokens, mixed_windows, shares, split_weight
from spqr_jax.data.mixture import FROM_HUB, FROM_PYTHON, MIXED, parts_for
from spqr_jax.errors import DataError
from spqr_jax.models.tokenizer import encode_stream, render_chat
from spqr_jax.resolve import OpenedModel
from spqr_jax.stream.windows import checked_windows
from spqr_jax.terminal.display import say

_HUB = ("huggingface.co", 443)


def default_corpus() -> str:
    """The text to measure on: `wikitext2` where the hub can be reached, else `pydoc`."""
    return "wikitext2" if _reaches_hub("the text 'pydoc'") else "pydoc"


def _reaches_hub(otherwise: str) -> bool:
    """Whether the hub can be reached; says so if not."""
    if os.environ.get("HF_HUB_OFFLINE", "0") in ("", "0", "false", "False"):
        try:
            socket.create_connection(_HUB, timeout=2).close()
            return True
        except OSError:
            pass
    say(f"the Hugging Face hub cannot be reached: using {otherwise}")
    return False


def read_tokens(spec: str, split: Split, model: OpenedModel) -> np.ndarray:
    """Token ids of `spec`; the tokenizer is read only if there is text, and once."""
    tokenizer = functools.cache(model.tokenizer)
    return load_tokens(
        spec,
        split,
        encode=lambda text: encode_stream(tokenizer(), text),
        render=lambda messages: render_chat(tokenizer(), messages),
    )


def read_calibration(
    specs: Sequence[str] | None, model: OpenedModel, seqlen: int, nsamples: int, seed: int
) -> tuple[np.ndarray, dict[str, Any]]:
    """Calibration windows of the texts that were asked for, and what is kept about them.

    Args:
      specs: texts as `DATA_HELP` says, each with ``=WEIGHT`` or without; none: the default.
      model: whose tokens they are.
      seqlen, nsamples, seed: length, number and draw of the windows.

    Returns:
      int32 [nsamples, seqlen], and `data`, `windows`, `seqlen`, `seed`; of several texts also
      `texts`, with the `name`, `weight` and `windows` of each.

    Raises:
      DataError: no such text, too little of it, or tokens that are not this model's.
    """
    wanted = [split_weight(spec) for spec in specs or [MIXED]]
    texts = [text for name, weight in wanted for text in _read_texts(name, weight, model, nsamples, len(wanted) == 1)]
    names, weights = [text.name for text in texts], [text.weight for text in texts]
    counts = shares(weights, nsamples)
    tokens = [text.tokens for text in texts]
    windows = mixed_windows(tokens, weights, seqlen, nsamples, seed, names, model.first_token)
    kept: dict[str, Any] = {"data": _mixture(texts), "windows": len(windows), "seqlen": seqlen, "seed": seed}
    if len(texts) > 1:
        kept["texts"] = [
            {"name": text.name, "weight": text.weight, "windows": count}
            for text, count in zip(texts, counts, strict=True)
        ]
    return checked_windows(windows, model.source.config), kept


class _Text(NamedTuple):
    """A text of a mixture: its name, its weight, its token ids."""

    name: str
    weight: float
    tokens: np.ndarray


def _read_texts(name: str, weight: float, model: OpenedModel, nsamples: int, alone: bool) -> list[_Text]:
    """The text of this name, or those that `MIXED` stands for, which share its weight unless they are `alone`."""
    if name != MIXED:
        return [_Text(name, weight, read_tokens(name, "calibration", model))]
    all_parts = FROM_HUB if _reaches_hub("texts that come with Python") else FROM_PYTHON
    parts = parts_for(all_parts, has_chat_template=bool(model.tokenizer().chat_template), windows=nsamples)
    total, texts = sum(part.weight for part in parts), []
    for part in parts:
        share = part.weight if alone else weight * part.weight / total
        try:
            texts.append(_Text(part.name, share, read_tokens(part.name, "calibration", model)))
        except DataError as error:
            if part not in FROM_HUB:
                raise
            say(f"{error}; using {part.otherwise or 'the other texts'} in its place")
            if part.otherwise is not None:
                texts.append(_Text(part.otherwise, share, read_tokens(part.otherwise, "calibration", model)))
    return texts


def _mixture(texts: Sequence[_Text]) -> str:
    """Texts and their weights for people: ``wikitext2 + 2 × code.jsonl``; a text alone needs no weight."""
    if len(texts) == 1:
        return texts[0].name
    return " + ".join(text.name if text.weight == 1 else f"{text.weight:g} × {text.name}" for text in texts)
