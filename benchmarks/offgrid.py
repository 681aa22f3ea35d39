"""Rewrites a Llama-like model: the same function, with weights that no longer lie on the grid of a 4-bit file.

    python benchmarks/offgrid.py demo offgrid-demo
    spqr quantize offgrid-demo --out packed ...

Weights from a 4-bit file lie on 4-bit grids. A method that finds these grids again gets better 4-bit results than it
would on other weights. Two changes keep the function and remove the grids. Each norm's gain is multiplied into the
matrices that read the norm's output. Channels are rescaled in pairs by random factors in exp(-0.5..0.5): rows of v with
the columns of o that read them, rows of up with columns of down.

Writes a Hugging Face directory in float32, and prints the largest change of a logit.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from spqr_jax import Decoder, forward, load_model
from spqr_jax.models.decoder import Block
from spqr_jax.models.hf import write_hf


def off_grid(params: Decoder, seed: int) -> Decoder:
    """The model with folded gains and rescaled channels. Its logits change only by rounding."""
    rng, config = np.random.default_rng(seed), params.config

    def factors(count: int) -> jnp.ndarray:
        return jnp.asarray(np.exp(rng.uniform(-0.5, 0.5, count)), jnp.float32)

    def rewrite(block: Block) -> Block:
        value, up = factors(block.v_proj.shape[0]), factors(block.up_proj.shape[0])
        # each value head is read by the query heads that share it
        read = jnp.repeat(
            value.reshape(config.num_kv_heads, config.head_dim), config.num_heads // config.num_kv_heads, axis=0
        ).reshape(-1)
        return block.replace(
            {
                "attention_norm": jnp.ones_like(block.attention_norm),
                "mlp_norm": jnp.ones_like(block.mlp_norm),
                "q_proj": block.q_proj * block.attention_norm,
                "k_proj": block.k_proj * block.attention_norm,
                "v_proj": block.v_proj * block.attention_norm * value[:, None],
                "o_proj": block.o_proj / read,
                "gate_proj": block.gate_proj * block.mlp_norm,
                "up_proj": block.up_proj * block.mlp_norm * up[:, None],
                "down_proj": block.down_proj / up,
            }
        )

    return dataclasses.replace(params, layers=tuple(rewrite(block) for block in params.layers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="demo, a GGUF file, a Hugging Face directory or hub id of the Llama family")
    parser.add_argument("out", type=Path, help="directory to write")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.out.exists():
        parser.error(f"{arguments.out} exists already")
    params, tokenizer = load_model(arguments.model, "float32")
    rewritten = off_grid(params, arguments.seed)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, params.config.vocab_size, (1, 128)), jnp.int32)
    before, after = forward(params, tokens), forward(rewritten, tokens)
    write_hf(arguments.out, rewritten)
    if tokenizer is not None:
        tokenizer.save_pretrained(arguments.out)
    change = float(jnp.max(jnp.abs(after - before)) / jnp.max(jnp.abs(before)))
    print(f"{arguments.out}: largest change of a logit, relative to the largest logit: {change:.1e}")


if __name__ == "__main__":
    main()
