#!/usr/bin/env python3
"""Compares the time of `spqr compare` with one perplexity run of the dense model, and prints its temporary memory.

    benchmarks/compare_cost.py demo SMALL --data IDS.npy --seqlen 2048 --windows 2 --turns 3

All runs take turns in one process. Compilation and reading the models are not counted; dequantizing packed weights is.
Temporary memory is the amount that the compiled program allocates in addition to its arguments.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from timings import CompareRow, add_csv_options, check_csv, save

from spqr_jax.data import evaluation_windows
from spqr_jax.evaluate import fidelity
from spqr_jax.evaluate.perplexity import perplexity
from spqr_jax.resolve import open_model
from spqr_jax.stream.blocks import collect
from spqr_jax.texts import read_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", help="the dense model")
    parser.add_argument("quantized", help="a directory that spqr wrote")
    parser.add_argument("--data", default="pydoc")
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--turns", type=int, default=3)
    add_csv_options(parser, "compare_cost.csv")
    given = parser.parse_args()
    check_csv(parser, given.csv, CompareRow)
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
    rows = []
    for name, values in seconds.items():
        median, ratio = statistics.median(values), statistics.median(a / b for a, b in zip(values, base, strict=True))
        print(f"{name:35} {median:7.2f} s   {ratio:.2f}x dense perplexity")
        sizes = {"model": Path(given.quantized).name, "seqlen": given.seqlen, "windows": given.windows}
        rows.append(sizes | {"rival": name, "median_s": median, "ratio_to_dense_perplexity": ratio})
    shape = (1, given.seqlen, dense.config.hidden_size)
    residual = jax.ShapeDtypeStruct(shape, dense.outer.final_norm.dtype)
    program = fidelity._token_statistics.lower(
        dense.config, quantized.config, (dense.outer, dense.outer), (residual, residual),
        jax.ShapeDtypeStruct((1, given.seqlen), jnp.int32),
    ).compile()  # fmt: skip
    held = program.memory_analysis().temp_size_in_bytes
    whole = 2 * given.seqlen * dense.config.vocab_size * 4
    print(f"temporary memory: {held / 1e6:.0f} MB (one window's logits of both models: {whole / 1e6:.0f} MB)")
    save(given.csv, CompareRow, given, rows)


if __name__ == "__main__":
    main()
