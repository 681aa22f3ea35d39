#!/usr/bin/env python3
"""What `spqr compare` costs beside one perplexity run of the dense model, in turns, and what it holds.

    benchmarks/compare_cost.py demo SMALL --data IDS.npy --seqlen 2048 --windows 2 --turns 3

Both run in one process with everything compiled; reading the models is not counted, turning packed weights into
dense ones is. Memory is what the compiled programs ask for beside their arguments.
"""

from __future__ import annotations

import argparse
import statistics
import time

import jax
import jax.numpy as jnp

from spqr_jax.blocks import collect
from spqr_jax.cli.options import read_tokens
from spqr_jax.data import evaluation_windows
from spqr_jax.evaluate import fidelity
from spqr_jax.evaluate.perplexity import perplexity
from spqr_jax.resolve import open_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense")
    parser.add_argument("quantized")
    parser.add_argument("--data", default="pydoc")
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--turns", type=int, default=3)
    given = parser.parse_args()
    opened = open_model(given.dense, "float32")
    tokens = read_tokens(given.data, "evaluation", opened)
    windows = evaluation_windows(tokens, given.seqlen, given.windows, given.data, opened.first_token)
    dense, quantized = collect(opened.source), collect(open_model(given.quantized, "float32").source)
    rivals = {
        "perplexity of the dense model": lambda: perplexity(dense, windows),
        "perplexity of the quantized model": lambda: perplexity(quantized, windows),
        "compare": lambda: fidelity.compare(dense, quantized, windows),
    }
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for turn in range(given.turns + 1):  # the first one compiles
        for name, run in rivals.items():
            begun = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - begun)
    base = seconds["perplexity of the dense model"]
    for name, taken in seconds.items():
        ratios = [a / b for a, b in zip(taken, base, strict=True)]
        print(f"{name:35} {statistics.median(taken):7.2f} s   {statistics.median(ratios):.2f}x dense perplexity")
    shape = (1, given.seqlen, dense.config.hidden_size)
    residual = jax.ShapeDtypeStruct(shape, dense.outer.final_norm.dtype)
    program = fidelity._token_statistics.lower(
        dense.config, quantized.config, (dense.outer, dense.outer), (residual, residual),
        jax.ShapeDtypeStruct((1, given.seqlen), jnp.int32),
    ).compile()  # fmt: skip
    held = program.memory_analysis().temp_size_in_bytes
    whole = 2 * given.seqlen * dense.config.vocab_size * 4
    print(f"temporary memory: {held / 1e6:.0f} MB (one window's logits of both: {whole / 1e6:.0f} MB)")


if __name__ == "__main__":
    main()
