"""Models made ready to run: what is said of them, and the table of how fast they are."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cpu_kernels import chosen_kernels
from spqr_jax._compat import give_back_memory
from spqr_jax.generate import Generator
from spqr_jax.models.decoder import Decoder
from spqr_jax.models.ready import ReadyDecoder, make_ready
from spqr_jax.parallel import parse_mesh, shard_source
from spqr_jax.products import default_implementation, why_no_kernels
from spqr_jax.quantized import quantized_leaves
from spqr_jax.resolve import open_model
from spqr_jax.speed import Speed
from spqr_jax.stream.blocks import BlockSource, collect
from spqr_jax.terminal.display import number, say, size, table


def describe_products() -> str:
    """How products with quantized weights are made on this machine."""
    implementation = default_implementation()
    if implementation == "cpu":
        return f"matrix products use the native CPU kernels ({chosen_kernels()})"
    if implementation != "xla":
        return f"matrix products use the Pallas kernels ({implementation})"
    return f"matrix products dequantize the weights, which is slow: {why_no_kernels()}"


def load_generator(source: BlockSource, int8_activations: bool, mesh: str | None = None) -> Generator:
    """Reads a whole model and makes it ready; says so if that is the slow way.

    Args:
      source: of the model.
      int8_activations: as `Generator` has it.
      mesh: devices that share the model, as ``--mesh`` has them; None for one device.
    """
    params = collect(source) if mesh is None else shard_source(source, parse_mesh(mesh))
    if quantized_leaves(params) and default_implementation() == "xla":
        say(describe_products())
    generator = Generator(params, int8_activations=int8_activations)
    del params  # what was read is no longer needed: with a small model it is half of what the process holds
    give_back_memory()
    return generator


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
