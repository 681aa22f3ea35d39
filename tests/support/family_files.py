"""Tiny models of every family: transformers' own, and what their files look like."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gguf
import numpy as np

from spqr_jax.models.families import FAMILIES
from spqr_jax.models.weights import OUTER_NAMES

_SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.1 * i for i in range(6)],
    "long_factor": [2.0 + 0.1 * i for i in range(6)],
    "partial_rotary_factor": 0.75,
}
_GEMMA = {"query_pre_attn_scalar": 24, "sliding_window": 24, "num_hidden_layers": 3}
_FALCON = {"ffn_hidden_size": 96, "num_attention_heads": 4}
_NOT_THERE = ("intermediate_size", "num_key_value_heads", "head_dim")

# What is particular: name -> (class of transformers', changes to the sizes above).
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "llama 3": ("Llama", {"rope_scaling": _LLAMA3}),
    "llama, stretched": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "llama with biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {"sliding_window": 24}),
    "qwen2": ("Qwen2", {}),
    "qwen2 with a window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "gemma2": ("Gemma2", {**_GEMMA, "tie_word_embeddings": True}),
    "gemma3": (
        "Gemma3",
        {
            **_GEMMA,
            "tie_word_embeddings": True,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "phi3": ("Phi3", {"sliding_window": 24}),
    "phi3 of long context": (
        "Phi3",
        {"rope_scaling": _LONGROPE, "original_max_position_embeddings": 128, "max_position_embeddings": 256},
    ),
    "falcon 7b": ("Falcon", {**_FALCON, "tie_word_embeddings": True}),
    "falcon 40b": ("Falcon", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}),
    "falcon 11b": (
        "Falcon",
        {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    "falcon, one after the other": ("Falcon", {**_FALCON, "parallel_attn": False, "multi_query": False, "bias": True}),
    "opt": ("OPT", {"ffn_dim": 96, "tie_word_embeddings": True}),
    "gpt2": ("GPT2", {}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 24}),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
            "num_hidden_layers": 3,
        },
    ),
}


def torch_config(variant: str) -> Any:
    """transformers' own configuration."""
    import transformers

    name, changes = VARIANTS[variant]
    sizes = {n: v for n, v in _SIZES.items() if name not in ("Falcon", "OPT") or n not in _NOT_THERE}
    if name == "GPT2":
        sizes = {"vocab_size": 256, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_inner": 96,
                 "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
    kind = "Text" if name == "Gemma3" else ""
    return getattr(transformers, f"{name}{kind}Config")(**(sizes | changes))


def torch_model(variant: str) -> Any:
    """transformers' own model with weights that leave nothing at its start value."""
    import torch
    import transformers

    name, config = VARIANTS[variant][0], torch_config(variant)
    model = getattr(transformers, "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")(config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            gain = "norm" in parameter_name.lower() or ".ln_" in parameter_name
            around = 1.0 if gain and parameter_name.endswith("weight") and not name.startswith("Gemma") else 0.0
            parameter.copy_(torch.randn_like(parameter) * 0.15 + around)
    return model


def write_gguf(
    path: Any,
    model: Any,
    quantization: Any = None,
    keys: dict[str, Any] | None = None,
    part: Callable[[str], bool] = lambda tensor: True,
) -> Any:
    """A GGUF file of a model, with the names of its family.

    Args:
      keys: entries of the header besides the common ones, or in their place; those of the architecture without its
        name; None leaves one out.
      part: which tensors the file holds.
    """
    config = model.config
    names = FAMILIES[config.family].gguf[0]
    writer = gguf.GGUFWriter(path, names.architecture)
    epsilon = "attention.layer_norm_rms_epsilon" if config.norm == "rms" else "attention.layer_norm_epsilon"
    entries: dict[str, Any] = {
        "context_length": config.max_positions,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": config.num_layers,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        epsilon: float(config.norm_eps),
        "tokenizer.ggml.bos_token_id": config.bos_token_id,
        "tokenizer.ggml.eos_token_id": config.eos_token_ids[0],
    }
    if config.rope_theta is not None:
        entries |= {"rope.freq_base": float(config.rope_theta), "rope.dimension_count": config.rotated}
    for key, value in (entries | (keys or {})).items():
        if value is not None:
            put = {int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool, str: writer.add_string,
                   list: writer.add_array}[type(value)]  # fmt: skip
            put(key if key.startswith(("general.", "tokenizer.", "split.")) else f"{names.architecture}.{key}", value)
    weights = {name: getattr(model.outer, name) for name in OUTER_NAMES}
    for index, block in enumerate(model.layers):
        weights |= {f"layers.{index}.{name}": weight for name, weight in block.items()}
    written: set[str] = set()
    for tensor, row in names.table.expand(config).items():
        if written & set(row.paths) or not part(tensor):
            continue
        written |= set(row.paths)
        value = np.ascontiguousarray(row.packing.join([np.asarray(weights[path]) for path in row.paths], config))
        if quantization is not None and value.ndim == 2:
            writer.add_tensor(tensor, gguf.quants.quantize(value, quantization), raw_dtype=quantization)
        else:
            writer.add_tensor(tensor, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
