"""Texts that the scripts measure on."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np

from spqr_jax.data import evaluation_windows
from spqr_jax.resolve import OpenedModel
from spqr_jax.texts import read_tokens


@dataclasses.dataclass(frozen=True)
class Text:
    """What a model is measured on.

    Attributes:
      label: for tables.
      spec: as for `spqr perplexity --data`.
      seqlen: tokens a window.
      count: windows, at most.
    """

    label: str
    spec: str
    seqlen: int
    count: int

    def windows(self, model: OpenedModel) -> np.ndarray:
        """Its windows, int32 [windows, seqlen], in the tokens of a model."""
        tokens = read_tokens(self.spec, "evaluation", model)
        return evaluation_windows(tokens, self.seqlen, self.count, self.label, model.first_token)


def add_texts(parser: argparse.ArgumentParser, **options: Any) -> None:
    """The option `--data`; `given.data` is then read by `texts_of`."""
    parser.add_argument(
        "--data",
        action="append",
        nargs=4,
        metavar=("LABEL", "SPEC", "SEQLEN", "N"),
        help="text to measure on: SPEC as for spqr perplexity, N windows of SEQLEN tokens; repeatable",
        **options,
    )


def texts_of(data: Iterable[tuple[str, str, str, str]]) -> tuple[Text, ...]:
    """What `--data` asked for."""
    return tuple(Text(label, spec, int(seqlen), int(count)) for label, spec, seqlen, count in data)
