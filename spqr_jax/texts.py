"""Texts that users name, as token ids of a model: to measure on, and to calibrate with."""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import Sequence
from typing import Any

import numpy as np

from spqr_jax.data import Split, load_tokens, mixed_windows, shares, split_weight
from spqr_jax.models.tokenizer import encode_stream, render_chat
from spqr_jax.resolve import OpenedModel
from spqr_jax.stream.windows import checked_windows
from spqr_jax.terminal.display import say

_HUB = ("huggingface.co", 443)


def default_corpus() -> str:
    """`wikitext2` where the hub can be reached, else `pydoc`."""
    if os.environ.get("HF_HUB_OFFLINE", "0") in ("", "0", "false", "False"):
        try:
            socket.create_connection(_HUB, timeout=2).close()
            return "wikitext2"
        except OSError:
            pass
    say("the Hugging Face hub cannot be reached: using the text 'pydoc'")
    return "pydoc"


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
    texts = [split_weight(spec) for spec in specs or [default_corpus()]]
    names, weights = [name for name, _ in texts], [weight for _, weight in texts]
    counts = shares(weights, nsamples)
    tokens = [read_tokens(name, "calibration", model) for name in names]
    windows = mixed_windows(tokens, weights, seqlen, nsamples, seed, names, model.first_token)
    kept: dict[str, Any] = {"data": _mixture(texts), "windows": len(windows), "seqlen": seqlen, "seed": seed}
    if len(texts) > 1:
        kept["texts"] = [
            {"name": name, "weight": weight, "windows": count}
            for name, weight, count in zip(names, weights, counts, strict=True)
        ]
    return checked_windows(windows, model.source.config), kept


def _mixture(texts: Sequence[tuple[str, float]]) -> str:
    """Texts and their weights for people: ``wikitext2 + 2 × code.jsonl``; a text alone needs no weight."""
    if len(texts) == 1:
        return texts[0][0]
    return " + ".join(name if weight == 1 else f"{weight:g} × {name}" for name, weight in texts)
