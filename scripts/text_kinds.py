#!/usr/bin/env python3
"""How well a matrix that was quantized for one kind of text serves another, and what damping and shrinkage change.

    scripts/text_kinds.py demo --text prose wikitext2 --text code pysource --text chat pychat

Each row is a way to quantize: the texts that the Hessian is of, and how it is regularized. Each column is a kind of
text: its other side, which nothing was calibrated on. An entry is the relative error of a matrix's output,
Σ ‖(w-ŵ)X‖² / Σ ‖wX‖², in thousandths: the geometric mean over the matrices of every third block, each quantized by
itself with 3-bit codes in the dense model's inputs. Shrinkage by r stands for (1-r) H + r diag(H), root r for
r √(d_i mean(d)) more on the diagonal d. "No compensation" takes the diagonal alone. Writes table.md into OUT.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from kept_rows import markdown_table

from spqr_jax import SpQRConfig, SpQRError
from spqr_jax.data import calibration_windows, evaluation_windows
from spqr_jax.models.decoder import STAGES, Block
from spqr_jax.resolve import OpenedModel, open_model
from spqr_jax.solver import quantize_weights
from spqr_jax.stream import sweep
from spqr_jax.stream.activations import Activations
from spqr_jax.stream.stages import rounded_linear, stage_groups
from spqr_jax.stream.windows import batched
from spqr_jax.terminal.display import console, say, table
from spqr_jax.texts import read_tokens

EVERY = 3  # blocks: the others are only passed
CONFIG = SpQRConfig(bits=3, outlier_threshold=0.2, calibration_dtype="float32")


class Way(NamedTuple):
    """How a Hessian H with diagonal d is regularized.

    Attributes:
      name: in the table.
      damping: times mean(d), added to the diagonal.
      shrinkage: share by which H is moved toward its diagonal.
      root: times √(d · mean(d)), added to the diagonal.
    """

    name: str
    damping: float
    shrinkage: float = 0.0
    root: float = 0.0


WAYS = (
    Way("damping 0.01", 0.01),
    Way("damping 0.1", 0.1),
    Way("damping 1", 1.0),
    Way("shrinkage 0.2", 0.01, shrinkage=0.2),
    Way("shrinkage 0.7", 0.01, shrinkage=0.7),
    Way("root 0.1", 0.003, root=0.1),
    Way("root 0.3", 0.003, root=0.3),
    Way("no compensation", 0.01, shrinkage=1.0),
)


def calibrations(labels: list[str], nsamples: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Names, and the weight of each text's Hessian: each text alone, and all in equal parts."""
    for label in labels:
        yield f"{label}, {nsamples} windows", {label: 1.0}
    yield f"mixture, {nsamples} windows of each", dict.fromkeys(labels, 1 / len(labels))


def regularized(h: np.ndarray, way: Way) -> np.ndarray:
    """The matrix shrunk toward its diagonal, with more on its diagonal; without the damping."""
    d = np.diag(h)
    return (1 - way.shrinkage) * h + np.diag(way.shrinkage * d + way.root * np.sqrt(d * d.mean()))


@jax.jit
def relative_error(w: jax.Array, dense: jax.Array, h: jax.Array) -> jax.Array:
    """Σ ‖(w-ŵ)X‖² / Σ ‖wX‖² for H = X Xᵀ, any scale."""
    miss = w - dense
    return jnp.sum((miss @ h) * miss) / jnp.sum((w @ h) * w)


class Bench:
    """The texts on their way through the dense model, and the errors so far."""

    def __init__(self, opened: OpenedModel, given: argparse.Namespace) -> None:
        nsamples, seqlen, texts = given.nsamples, given.seqlen, given.text
        self._opened, self._seen = opened, [label for label, _ in texts]
        self.labels = [label for label, _ in [*texts, *given.unseen]]
        self._nsamples = nsamples
        self.logs: dict[tuple[str, str], dict[str, list[float]]] = {}
        self._texts: dict[tuple[str, str], Activations] = {}
        config, outer = opened.source.config, opened.source.outer()
        for label, spec in texts:
            tokens = read_tokens(spec, "calibration", opened)
            windows = calibration_windows(tokens, seqlen, nsamples, given.seed, spec, opened.first_token)
            self._texts[label, "calibration"] = Activations(config, outer, batched(windows), rounded_linear)
        for label, spec in [*texts, *given.unseen]:
            tokens = read_tokens(spec, "evaluation", opened)
            windows = evaluation_windows(tokens, seqlen, nsamples, spec, opened.first_token)
            self._texts[label, "evaluation"] = Activations(config, outer, batched(windows), rounded_linear)

    def visit(self, index: int, block: Block) -> None:
        """Measures a block's matrices, and takes the texts through it."""
        config = self._opened.source.config
        for stage in range(len(STAGES)):
            if index % EVERY == 0:
                sums = {key: text.hessians(stage, block) for key, text in self._texts.items()}
                for place, (names, _) in enumerate(stage_groups(config, block.kind, stage)):
                    hessians = {key: np.asarray(parts[place].matrix()) for key, parts in sums.items()}
                    self._measure([jnp.asarray(block[name], jnp.float32) for name in names], hessians)
            for text in self._texts.values():
                text.advance(stage, block)
        console.print(f"block {index}", markup=False)

    def _measure(self, weights: list[jax.Array], hessians: dict[tuple[str, str], np.ndarray]) -> None:
        for calibration, shares in calibrations(self._seen, self._nsamples):
            h = sum(share * hessians[label, "calibration"] for label, share in shares.items())
            for way in WAYS:
                config = dataclasses.replace(CONFIG, damping=way.damping)
                solved = quantize_weights(weights, jnp.asarray(regularized(h, way)), [config] * len(weights))
                logs = self.logs.setdefault((calibration, way.name), {label: [] for label in self.labels})
                for label in self.labels:
                    other = jnp.asarray(hessians[label, "evaluation"])
                    errors = [relative_error(w, s.dense, other) for w, s in zip(weights, solved, strict=True)]
                    logs[label] += [float(np.log(error)) for error in errors]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="demo, a GGUF file, a Hugging Face directory or hub id")
    parser.add_argument("--text", action="append", nargs=2, required=True, metavar=("LABEL", "SPEC"),
                        help="a kind of text: a named one, which has two sides; repeatable")  # fmt: skip
    parser.add_argument("--unseen", action="append", nargs=2, default=[], metavar=("LABEL", "SPEC"),
                        help="text that is only measured on; repeatable")  # fmt: skip
    parser.add_argument("--nsamples", type=int, default=16, help="windows of each text and side")
    parser.add_argument("--seqlen", type=int, default=1024, help="tokens a window")
    parser.add_argument("--seed", type=int, default=0, help="draws the calibration windows")
    parser.add_argument("--out", type=Path, default=Path("text_kinds"), help="where the table is written")
    given = parser.parse_args()
    opened = open_model(given.model, "float32", say)
    bench = Bench(opened, given)
    sweep.forward(opened.source, bench.visit)
    columns = ["calibrated on", "how", *bench.labels]
    lines = [
        [*row, *(f"{1000 * np.exp(np.mean(logs[label])):.2f}" for label in bench.labels)]
        for row, logs in bench.logs.items()
    ]
    table(f"relative error of outputs, thousandths: {given.model}", columns, lines)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "table.md").write_text(markdown_table(columns, lines, left=2), encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except SpQRError as error:
        sys.exit(f"text_kinds: {error}")
