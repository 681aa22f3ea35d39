"""Small models, and where files are put."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from spqr_jax.models.config import DecoderConfig
from spqr_jax.models.weights import Block, Decoder, Outer, block_shapes, outer_shapes


def small_config(family: str = "llama", **changes: Any) -> DecoderConfig:
    """A decoder of a few thousand weights."""
    values: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_layers": 2, "num_heads": 2,
        "num_kv_heads": 1, "head_dim": 16, "norm_eps": 1e-5, "rope_theta": 10000.0, "max_positions": 64,
        "tied_head": False, "bos_token_id": 1, "eos_token_ids": (2,), "family": family,
    }  # fmt: skip
    particular: dict[str, dict[str, Any]] = {
        "qwen2": {"qkv_bias": True},
        "qwen3": {"qk_norm": True},
        "gemma2": {"norm_offset": 1.0, "post_norms": True, "activation": "gelu_tanh", "tied_head": True,
                   "attention_softcap": 50.0, "logit_softcap": 30.0, "sliding_window": 16, "local_layers": (0,),
                   "query_scale": 0.25, "embedding_scale": 32**0.5},
        "gemma3_text": {"norm_offset": 1.0, "post_norms": True, "activation": "gelu_tanh", "tied_head": True,
                   "qk_norm": True, "sliding_window": 16, "local_layers": (0,), "local_rope_theta": 10000.0,
                   "query_scale": 0.25, "embedding_scale": 32**0.5},
        "falcon": {"norm": "layer", "activation": "gelu", "gated": False, "parallel": True, "shared_norm": True},
        "opt": {"norm": "layer", "activation": "relu", "gated": False, "rope_theta": None, "qkv_bias": True,
                "o_bias": True, "mlp_bias": True, "learned_positions": 66, "position_offset": 2, "num_kv_heads": 2,
                "tied_head": True},
        "gpt2": {"norm": "layer", "activation": "gelu_tanh", "gated": False, "rope_theta": None, "qkv_bias": True,
                 "o_bias": True, "mlp_bias": True, "learned_positions": 64, "num_kv_heads": 2, "tied_head": True},
        "mixtral": {"num_experts": 2, "experts_per_token": 1, "expert_size": 32},
        "qwen3_moe": {"num_experts": 2, "experts_per_token": 1, "expert_size": 32, "qk_norm": True},
    }  # fmt: skip
    return DecoderConfig(**(values | particular.get(family, {}) | changes))


def small_model(config: DecoderConfig) -> Decoder:
    """Random weights, without a program compiled."""
    rng = np.random.default_rng(0)

    def draw(shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
        return {name: (0.1 * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}

    blocks = tuple(Block(draw(block_shapes(config, kind)), kind) for kind in config.kinds)
    return Decoder(Outer(**draw(outer_shapes(config))), blocks, config)


def new_folder(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_json(folder: Path, name: str, values: Any) -> None:
    (new_folder(folder) / name).write_text(json.dumps(values))
