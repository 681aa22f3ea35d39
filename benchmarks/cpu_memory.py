#!/usr/bin/env python3
"""Measures the memory of a process that generates with a packed model on a CPU.

    spqr quantize demo --out small --calib pydoc --nsamples 16 --seqlen 1024
    python benchmarks/cpu_memory.py small

Two processes are compared. The first generates with a model of the same depth that is only 32 features wide: its memory
is that of Python, JAX and the compiled programs. The second generates with the given model. It should hold only the
packed weights and the KV cache in addition.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
from pathlib import Path

from timings import MemoryRow, add_csv_options, check_csv, save

from spqr_jax.generate import Generator
from spqr_jax.models.decoder import random_decoder
from spqr_jax.resolve import open_model
from spqr_jax.speed import generating
from spqr_jax.terminal.display import console, number, table
from spqr_jax.terminal.models import load_generator

PROMPT, NEW = 64, 64


def resident() -> float:
    """MB that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def measure(model: str, tiny: bool) -> dict[str, float]:
    """MB after generating: of the whole process, its peak, the weights and the KV cache."""
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
    add_csv_options(parser, "memory.csv")
    given = parser.parse_args()
    check_csv(parser, given.csv, MemoryRow)
    if given.measure:
        print(json.dumps(measure(given.model, given.measure == "tiny")))
        return
    runtime, real = in_process(given.model, "tiny"), in_process(given.model, "real")
    expected = runtime["resident"] + real["weights"] + real["cache"]
    lines = [
        ["Python, JAX and compiled programs (a tiny model's process)", number(runtime["resident"], 0)],
        ["packed weights", number(real["weights"], 0)],
        ["KV cache", number(real["cache"], 0)],
        ["sum of these", number(expected, 0)],
        ["the process while it generates", f"{real['resident']:.0f} ({100 * (real['resident'] / expected - 1):+.0f}%)"],
        ["its peak, while it loads", number(real["peak"], 0)],
    ]
    table(f"{given.model}: memory in MB", ["", "MB"], lines)
    console.print("Resident pages; pages shared with other processes count too.", style="dim")
    row = {
        "model": Path(given.model).name,
        "runtime_mb": runtime["resident"],
        "weights_mb": real["weights"],
        "cache_mb": real["cache"],
        "held_mb": real["resident"],
        "excess_percent": 100 * (real["resident"] / expected - 1),
        "peak_mb": real["peak"],
    }
    save(given.csv, MemoryRow, given, [row])


if __name__ == "__main__":
    main()
