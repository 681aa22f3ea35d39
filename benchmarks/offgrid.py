"""The same function with other weights: a Llama-like model taken off the grid of the file it comes from.

    python benchmarks/offgrid.py demo offgrid-demo
    spqr quantize offgrid-demo --out packed ...

Weights out of a 4-bit file lie on 4-bit grids, so 4-bit results on them flatter
whatever finds those grids again. Two rewritings leave the function as it is and
the grids behind: each norm's gain is folded into the matrices that read it, and
channels are rescaled in pairs (rows of v with the columns of o that read them,
rows of up with columns of down), by random factors in exp(-0.5..0.5).

Writes a Hugging Face directory in float32, and says how far the logits moved.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from spqr_jax import Decoder, SpQRError, forward, load_model
from spqr_jax.models.decoder import Block

HF_NAMES = {
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    **{f"{name}_proj": f"self_attn.{name}_proj" for name in "qkvo"},
    **{f"{name}_proj": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}


def off_grid(params: Decoder, seed: int) -> Decoder:
    """The model with gains folded and channels rescaled; its logits change by rounding only."""
    rng, config = np.random.default_rng(seed), params.config

    def factors(count: int) -> jnp.ndarray:
        return jnp.asarray(np.exp(rng.uniform(-0.5, 0.5, count)), jnp.float32)

    def rewrite(block: Block) -> Block:
        value, up = factors(block.v_proj.shape[0]), factors(block.up_proj.shape[0])
        # each value head is read by the query heads that share it
        read = jnp.repeat(
            value.reshape(config.num_kv_heads, config.head_dim), config.num_heads // config.num_kv_heads, axis=0
        ).reshape(-1)
        return dataclasses.replace(
            block,
            attention_norm=jnp.ones_like(block.attention_norm),
            mlp_norm=jnp.ones_like(block.mlp_norm),
            q_proj=block.q_proj * block.attention_norm,
            k_proj=block.k_proj * block.attention_norm,
            v_proj=block.v_proj * block.attention_norm * value[:, None],
            o_proj=block.o_proj / read,
            gate_proj=block.gate_proj * block.mlp_norm,
            up_proj=block.up_proj * block.mlp_norm * up[:, None],
            down_proj=block.down_proj / up,
        )

    return dataclasses.replace(params, layers=tuple(rewrite(block) for block in params.layers))


def write_hf(params: Decoder, directory: Path) -> None:
    """config.json and model.safetensors, as transformers' Llama has them."""
    config = params.config
    if config.rope_factors is not None:
        raise SpQRError("models with scaled rotary frequencies are not written by this script")
    tensors = {"model.embed_tokens.weight": params.outer.embed_tokens, "model.norm.weight": params.outer.final_norm}
    if params.outer.lm_head is not None:
        tensors["lm_head.weight"] = params.outer.lm_head
    for index, block in enumerate(params.layers):
        for ours, theirs in HF_NAMES.items():
            tensors[f"model.layers.{index}.{theirs}.weight"] = getattr(block, ours)
    directory.mkdir(parents=True)
    save_file({name: np.asarray(value, np.float32) for name, value in tensors.items()}, directory / "model.safetensors")
    values = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tied_head,
        "hidden_act": "silu",
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
    }
    (directory / "config.json").write_text(json.dumps(values, indent=2) + "\n")


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
    write_hf(rewritten, arguments.out)
    if tokenizer is not None:
        tokenizer.save_pretrained(arguments.out)
    moved = float(jnp.max(jnp.abs(after - before)) / jnp.max(jnp.abs(before)))
    print(f"{arguments.out}: largest change of a logit, relative to the largest logit: {moved:.1e}")


if __name__ == "__main__":
    main()
