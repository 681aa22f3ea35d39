"""`spqr bench`: how fast a model generates here."""

from __future__ import annotations

import os
from typing import Annotated

import numpy as np

from spqr_jax.cli.display import console, progress_bar, write_json
from spqr_jax.cli.help import flag, option
from spqr_jax.cli.next_step import after_bench
from spqr_jax.cli.options import Json, Model
from spqr_jax.cli.outlook import before_bench, say_next
from spqr_jax.errors import DataError
from spqr_jax.generate import Generator
from spqr_jax.speed import generating, read_bandwidth, take_turns
from spqr_jax.terminal.models import candidates, describe_products, held_bytes, show, summary

COMPARISON, WORK = "Comparison", "Work"


def bench(
    model: Model,
    dense: Annotated[
        str | None, option(COMPARISON, "MODEL", "A dense model to compare with, such as the original model.")
    ] = None,
    bfloat16: Annotated[
        bool, flag(COMPARISON, "--bfloat16", "Also measure the dense model in bfloat16 (slow on a CPU).")
    ] = False,
    prompt_tokens: Annotated[int, option(WORK, "N", "Tokens in the prompt.", min=1)] = 128,
    new_tokens: Annotated[int, option(WORK, "N", "Tokens to generate in each turn.", min=2)] = 64,
    turns: Annotated[int, option(WORK, "N", "Turns for each model.", min=1)] = 5,
    json: Json = None,
) -> None:
    """Measure how many tokens per second a model generates on this machine.

    All models run in one process and take turns, so that they meet the same conditions.
    """
    models = candidates(model, dense, bfloat16)
    config = next(iter(models.values())).config
    if prompt_tokens + new_tokens > config.max_positions:
        raise DataError(
            f"{prompt_tokens} prompt tokens and {new_tokens} new tokens do not fit into {model}'s context of "
            f"{config.max_positions} tokens: ask for fewer"
        )
    bandwidth = read_bandwidth()
    console.print(f"{describe_processors()}; memory reads at {bandwidth:.1f} GB/s; {describe_products()}")
    prompt = np.random.default_rng(0).integers(0, config.vocab_size, prompt_tokens).tolist()
    sizes = [(params.config, held_bytes(params), name.startswith("packed")) for name, params in models.items()]
    before_bench(sizes, prompt_tokens, new_tokens, turns, 1e9 * bandwidth)
    rivals = {name: generating(Generator(params)) for name, params in models.items()}
    with progress_bar("generating", (turns + 1) * len(rivals)) as advance:
        speeds = take_turns(rivals, prompt, new_tokens, turns, advance)
    results = {name: summary(speeds[name], params) for name, params in models.items()}
    show(f"{model}: {prompt_tokens} prompt tokens, {new_tokens} new tokens, medians of {turns} turns", results)
    write_json(
        json, {"model": model, "read_bandwidth_gb_s": bandwidth, "processors": os.cpu_count(), "results": results}
    )
    say_next(after_bench(model))


def describe_processors() -> str:
    """How many processors there are, and how busy they are where the system says so (Windows does not)."""
    busy = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return f"{os.cpu_count()} processors{busy}"
