"""`spqr bench`: how fast a model generates here."""

from __future__ import annotations

import os
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from spqr_jax.cli.display import console, number, progress_bar, say, size, table, write_json
from spqr_jax.cli.help import flag, option
from spqr_jax.cli.next_step import after_bench
from spqr_jax.cli.options import Json, Model
from spqr_jax.cli.outlook import before_bench, say_next
from spqr_jax.cli.stream import describe_products
from spqr_jax.errors import DataError
from spqr_jax.generate import Generator
from spqr_jax.models.decoder import Decoder
from spqr_jax.models.ready import ReadyDecoder, make_ready
from spqr_jax.products import default_implementation
from spqr_jax.quantized import quantized_leaves
from spqr_jax.resolve import open_model
from spqr_jax.speed import Speed, generating, read_bandwidth, take_turns
from spqr_jax.stream.blocks import collect

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


def candidates(model: str, dense: str | None, bfloat16: bool) -> dict[str, Decoder | ReadyDecoder]:
    """The models to measure, ready to generate, the dense ones first."""
    models: dict[str, Decoder | ReadyDecoder] = {}
    if dense is not None:
        models["dense float32"] = collect(open_model(dense, "float32", say).source)
        if bfloat16:
            models["dense bfloat16"] = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), models["dense float32"])
    given = collect(open_model(model, "float32", say).source)
    if not quantized_leaves(given):
        models["not quantized"] = given
    elif default_implementation() == "cpu":
        models["packed"] = make_ready(given)
        models["packed, int8 activations"] = make_ready(given, int8_activations=True)
    else:
        models["dequantized" if default_implementation() == "xla" else "packed"] = make_ready(given)
    return models


def held_bytes(params: Decoder | ReadyDecoder) -> int:
    """Bytes of a model's weights."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def summary(speed: Speed, params: Decoder | ReadyDecoder | None) -> dict[str, Any]:
    """Medians, and what of its weights a model reads a second (not an untied embedding, of which it reads rows)."""
    values: dict[str, Any] = {
        "decode_tokens_per_second": float(np.median(speed.decode)),
        "prefill_tokens_per_second": float(np.median(speed.prefill)),
        "decode_turns": speed.decode.tolist(),
        "prefill_turns": speed.prefill.tolist(),
    }
    if params is not None:
        held = held_bytes(params)
        rows_only = 0 if params.config.tied_head else params.outer.embed_tokens.nbytes
        values["bytes"] = held
        values["gb_per_second"] = (held - rows_only) * values["decode_tokens_per_second"] / 1e9
    return values


def show(title: str, results: dict[str, dict[str, Any]]) -> None:
    """The table; ratios are to the first row."""
    base = next(iter(results.values()))
    lines = []
    for name, values in results.items():
        decode, prefill = values["decode_tokens_per_second"], values["prefill_tokens_per_second"]
        line = [name, number(decode, 1), number(decode / base["decode_tokens_per_second"], 2)]
        line += [number(prefill, 0), number(prefill / base["prefill_tokens_per_second"], 2)]
        known = "bytes" in values
        lines.append(
            [*line, size(values["bytes"]) if known else "–", number(values["gb_per_second"], 1) if known else "–"]
        )
    notes = "×: relative to the first row. Weights read: GB of weights read per second while generating."
    columns = ["model", "tokens/s", "×", "prefill tokens/s", "×", "weights", "weights read, GB/s"]
    table(title, columns, lines, notes)
