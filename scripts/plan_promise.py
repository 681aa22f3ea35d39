#!/usr/bin/env python3
"""How much a loss on a plan's own text is too small by, and what the plan makes of it.

    scripts/plan_promise.py demo --blocks 5 15 25 --text pydoc --text pysource --text pychat

Matrices of some blocks are quantized with 3-bit codes in the dense model's inputs. "Half" is the loss on the second
half of the plan's text of a matrix made for the first half, over its loss there; "factor" what `planning/unseen.py`
makes of it; "real" the loss on the texts' other side of a matrix made for all calibration windows, over the loss on the
plan's text of a matrix made for that. Geometric means over blocks. Writes table.md into OUT.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from kept_rows import markdown_table

from spqr_jax import SpQRConfig, SpQRError
from spqr_jax.data import evaluation_windows
from spqr_jax.models.decoder import STAGES, Block
from spqr_jax.planning.budget import text_of_plan
from spqr_jax.planning.unseen import factor_for
from spqr_jax.resolve import open_model
from spqr_jax.solver import Hessian, quantize_weights
from spqr_jax.stream import sweep
from spqr_jax.stream.activations import Activations
from spqr_jax.stream.blocks import role
from spqr_jax.stream.stages import rounded_linear, stage_groups
from spqr_jax.stream.windows import batched, beginnings
from spqr_jax.terminal.display import say, table
from spqr_jax.texts import read_calibration, read_tokens

CONFIG = SpQRConfig(bits=3, outlier_threshold=0.2, calibration_dtype="float32")


@jax.jit
def loss(w: jax.Array, dense: jax.Array, h: jax.Array) -> jax.Array:
    """Σ_r (w_r-ŵ_r) H (w_r-ŵ_r)ᵀ."""
    miss = w - dense
    return jnp.sum((miss @ h) * miss)


def ratios(w: jax.Array, sums: dict[str, Hessian], planned: int, calibrated: int) -> tuple[float, float, float]:
    """Half, factor and real of one matrix."""
    both = jax.tree.map(lambda a, b: a + b, sums["first"], sums["second"])
    h = {name: given.matrix() for name, given in (sums | {"plan": both}).items()}
    solved = {name: quantize_weights([w], h[name], [CONFIG])[0].dense for name in ("first", "plan", "calibration")}
    half = float(loss(w, solved["first"], h["second"]) / loss(w, solved["first"], h["first"]))
    real = float(loss(w, solved["calibration"], h["evaluation"]) / loss(w, solved["plan"], h["plan"]))
    return half, factor_for(np.log(half), planned, calibrated), real


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="demo, a GGUF file, a Hugging Face directory or hub id")
    parser.add_argument("--text", action="append", required=True, help="a named text with two sides; repeat to mix")
    parser.add_argument("--blocks", type=int, nargs="+", required=True, help="blocks to measure")
    parser.add_argument(
        "--nsamples", type=int, default=16, help="calibration windows, and half as many of each text to measure"
    )
    parser.add_argument("--seqlen", type=int, default=1024, help="tokens a window")
    parser.add_argument("--seed", type=int, default=0, help="draws the calibration windows")
    parser.add_argument("--out", type=Path, default=Path("plan_promise"), help="where the table is written")
    given = parser.parse_args()
    opened = open_model(given.model, "float32", say)
    windows, _ = read_calibration(given.text, opened, given.seqlen, given.nsamples, given.seed)
    read, length = text_of_plan(*windows.shape)
    plan = beginnings(batched(windows), read * length, length)
    count = max(given.nsamples // 2, 1)
    sides = [
        evaluation_windows(read_tokens(spec, "evaluation", opened), given.seqlen, count, spec, opened.first_token)
        for spec in given.text
    ]
    texts = {"first": plan[::2], "second": plan[1::2], "calibration": batched(windows),
             "evaluation": batched(np.concatenate(sides))}  # fmt: skip
    if not texts["second"]:
        raise SpQRError("the plan's text is one batch, which has no halves: use more or longer windows")
    config, outer = opened.source.config, opened.source.outer()
    streams = {name: Activations(config, outer, batches, rounded_linear) for name, batches in texts.items()}
    planned, by_matrix = sum(batch.size for batch in plan), dict[tuple[str, int], list[Any]]()

    def visit(index: int, block: Block) -> None:
        for stage in range(len(STAGES)):
            if index in given.blocks:
                sums = {name: stream.hessians(stage, block) for name, stream in streams.items()}
                for place, (names, width) in enumerate(stage_groups(config, block.kind, stage)):
                    of_input = {name: parts[place] for name, parts in sums.items()}
                    for name in names:
                        w = jnp.asarray(block[name], jnp.float32)
                        by_matrix.setdefault((role(name), width), []).append(ratios(w, of_input, planned, windows.size))
            for stream in streams.values():
                stream.advance(stage, block)
        say(f"block {index}")

    sweep.forward(opened.source, visit, end=max(given.blocks) + 1)
    columns = ["matrix", "inputs", "half", "factor", "real"]
    lines = [
        [name, str(width), *(f"{mean:.2f}" for mean in np.exp(np.mean(np.log(values), axis=0)))]
        for (name, width), values in by_matrix.items()
    ]
    table(f"{given.model}: losses on unseen text over losses on a plan's own", columns, lines)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "table.md").write_text(markdown_table(columns, lines, left=1), encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except SpQRError as error:
        sys.exit(f"plan_promise: {error}")
