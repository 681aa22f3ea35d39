#!/usr/bin/env python3
"""Tokens a second of a quantized model on this CPU, against dense inference in JAX.

    spqr quantize demo --out small --calib pydoc --nsamples 16 --seqlen 1024
    python benchmarks/cpu_decode.py small --dense demo

All rivals are loaded in one process and take turns, round after round; a ratio is of
medians. A round decodes a few dozen tokens after a prompt, greedily.
"""

from __future__ import annotations

import argparse
import os

import jax
import jax.numpy as jnp
import numpy as np

import cpu_kernels
from spqr_jax.blocks import collect
from spqr_jax.cli.display import console, number, say, table
from spqr_jax.generate import Generator
from spqr_jax.linear import prepare
from spqr_jax.models.decoder import Decoder
from spqr_jax.resolve import open_model


def leaf_bytes(params: Decoder) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a directory that spqr wrote")
    parser.add_argument("--dense", default="demo", help="the model it was made from")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bfloat16", action="store_true", help="the dense model in bfloat16 as well (slow)")
    given = parser.parse_args()
    if why := cpu_kernels.why_unavailable():
        parser.exit(1, f"cpu_decode: {why}\n")
    quantized = collect(open_model(given.model, "float32", say).source)
    dense = collect(open_model(given.dense, "float32", say).source)
    models = {"dense float32": dense, "packed": prepare(quantized)}
    models["packed, int8 activations"] = prepare(quantized, int8_activations=True)
    if given.bfloat16:
        models["dense bfloat16"] = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), dense)
    del quantized, dense
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, models["packed"].config.vocab_size, given.prompt_tokens).tolist()]
    generators = {name: Generator(params) for name, params in models.items()}
    made: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    console.print(f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}; kernels {cpu_kernels.chosen_kernels()}")
    for round_ in range(given.rounds + 1):  # the first one warms up
        for name, generator in generators.items():
            result = generator(prompts, max_new_tokens=given.new_tokens, stop_tokens=())
            if round_:
                made[name].append((result.decode_tokens_per_second, given.prompt_tokens / result.prefill_seconds))
    medians = {name: np.median(np.array(values), axis=0) for name, values in made.items()}
    base = medians["dense float32"]
    lines = [
        [
            name,
            number(decode, 1),
            number(decode / base[0], 2),
            number(prefill, 0),
            number(prefill / base[1], 2),
            number(leaf_bytes(models[name]) / 1e6, 0),
        ]
        for name, (decode, prefill) in medians.items()
    ]
    columns = ["what", "tokens/s", "× dense", "prefill tokens/s", "× dense", "MB of weights"]
    table(f"{given.model} against {given.dense}", columns, lines)


if __name__ == "__main__":
    main()
