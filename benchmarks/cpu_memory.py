#!/usr/bin/env python3
"""What a process holds in memory while it generates from a packed model on a CPU.

    spqr quantize demo --out small --calib pydoc --nsamples 16 --seqlen 1024
    python benchmarks/cpu_memory.py small

Two processes are compared. One generates with a model of the same depth and a width of
next to nothing: what it holds is Python, JAX, the compiled programs. The other generates
with the real one. What it holds beyond that should be the packed weights and the cache.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
from pathlib import Path

from spqr_jax.cli.display import console, number, table
from spqr_jax.cli.stream import load_generator
from spqr_jax.generate import Generator
from spqr_jax.models.decoder import random_decoder
from spqr_jax.resolve import open_model
from spqr_jax.speed import generating

PROMPT, NEW = 64, 64


def resident() -> float:
    """MB held now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def measure(model: str, tiny: bool) -> dict[str, float]:
    """Generates; what is held then, in MB, and what of it is weights and cache."""
    opened = open_model(model, "float32", lambda message: None)
    if tiny:
        small = {"hidden_size": 32, "intermediate_size": 32, "num_heads": 1, "num_kv_heads": 1, "head_dim": 32}
        generator = Generator(random_decoder(dataclasses.replace(opened.source.config, vocab_size=64, **small), 0))
    else:
        generator = load_generator(opened.source, int8_activations=False)  # as `spqr generate` does
    run = generating(generator)
    prompt = [token % 60 for token in range(PROMPT)]
    for _ in range(2):
        run(prompt, NEW)
    config = opened.source.config
    cache = 0 if tiny else 2 * 4 * config.num_layers * config.num_kv_heads * config.head_dim * (PROMPT + NEW)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    return {"resident": resident(), "peak": peak, "weights": generator.weight_bytes / 1e6, "cache": cache / 1e6}


def in_process(model: str, kind: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, __file__, model, "--measure", kind], capture_output=True, text=True, check=True
    )
    values: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a directory that spqr wrote")
    parser.add_argument("--measure", choices=["real", "tiny"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given.model, given.measure == "tiny")))
        return
    runtime, real = in_process(given.model, "tiny"), in_process(given.model, "real")
    expected = runtime["resident"] + real["weights"] + real["cache"]
    lines = [
        ["runtime (a tiny model's process)", number(runtime["resident"], 0)],
        ["packed weights", number(real["weights"], 0)],
        ["cache", number(real["cache"], 0)],
        ["together", number(expected, 0)],
        ["held while generating", f"{real['resident']:.0f} ({100 * (real['resident'] / expected - 1):+.0f}%)"],
        ["at most, while loading", number(real["peak"], 0)],
    ]
    table(f"{given.model}: memory in MB", ["what", "MB"], lines)
    console.print("Resident pages; what is shared with other processes counts too.", style="dim")


if __name__ == "__main__":
    main()
