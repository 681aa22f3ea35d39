"""Llama and those that differ from it in a bias, a norm or a window: Mistral, Yi, Qwen2, Qwen3."""

from __future__ import annotations

from typing import Any

from spqr_jax.files import Entries
from spqr_jax.models.config import DecoderConfig
from spqr_jax.models.families.family import (
    Family,
    GGUFNames,
    activation,
    common_from_gguf,
    common_from_hf,
    common_to_hf,
    gguf_window,
    layer_types,
    window,
)
from spqr_jax.models.families.packings import rotated_in_pairs
from spqr_jax.models.names import Row, Table, block_rows, outer_rows, with_biases

PREFIXES = ("model.",)
BUFFERS = r"(?:model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq"  # that old files carry

OUTER = outer_rows(
    {"model.embed_tokens.weight": "embed_tokens", "model.norm.weight": "final_norm", "lm_head.weight": "lm_head"}
)
ATTENTION = {
    "input_layernorm.weight": "attention_norm",
    **with_biases({f"self_attn.{name}_proj": f"{name}_proj" for name in "qkvo"}),
    "self_attn.q_norm.weight": "q_norm",
    "self_attn.k_norm.weight": "k_norm",
}
MLP = {
    "post_attention_layernorm.weight": "mlp_norm",
    **with_biases({f"mlp.{name}_proj": f"{name}_proj" for name in ("gate", "up", "down")}),
}
ROWS = OUTER + block_rows("model.layers.{layer}.", ATTENTION | MLP)
TABLE = Table(ROWS, PREFIXES, (BUFFERS,))

# GGUF's names are the same for all architectures.
GGUF_OUTER = outer_rows(
    {"token_embd.weight": "embed_tokens", "output_norm.weight": "final_norm", "output.weight": "lm_head"}
)
GGUF_ATTENTION = {
    "attn_norm.weight": "attention_norm",
    **with_biases({f"attn_{name}": f"{name}_proj" for name in "qkv"}),
    "attn_q_norm.weight": "q_norm",
    "attn_k_norm.weight": "k_norm",
    **with_biases({"attn_output": "o_proj"}),
}
GGUF_MLP = {
    "ffn_norm.weight": "mlp_norm",
    **with_biases({f"ffn_{name}": f"{name}_proj" for name in ("gate", "up", "down")}),
}
GGUF_IGNORED = (r"rope_(?:freqs|factors_long|factors_short)\.weight",)  # go into the configuration
GGUF_ROWS = GGUF_OUTER + block_rows("blk.{layer}.", GGUF_ATTENTION | GGUF_MLP)
GGUF_TABLE = Table(GGUF_ROWS, ignored=GGUF_IGNORED)


def _in_pairs(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """The same rows, Q and K in the order that llama.cpp has for Llama."""
    packings = {"q": rotated_in_pairs(query=True), "k": rotated_in_pairs(query=False)}
    changed = []
    for row in rows:
        name = row.paths[0].rpartition(".")[2]
        turned = name.startswith(("q_proj", "k_proj"))
        changed.append(Row(row.tensor, row.paths, packings[name[0]]) if turned else row)
    return tuple(changed)


LLAMA_GGUF_ROWS = _in_pairs(GGUF_ROWS)


SIZES = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
}
"""Of transformers' ``LlamaConfig``, from which the classes of Mistral and Qwen were made."""


def _llama_from_hf(values: Entries) -> DecoderConfig:
    bias = values.flag("attention_bias", False)
    return common_from_hf(
        values,
        "llama",
        activation=activation(values, "hidden_act", "silu"),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=values.flag("mlp_bias", False),
    )


def _llama_to_hf(config: DecoderConfig) -> dict[str, Any]:
    return common_to_hf(config, "LlamaForCausalLM", attention_bias=config.qkv_bias, mlp_bias=config.mlp_bias)


def _mistral_from_hf(values: Entries) -> DecoderConfig:
    local = window(values, lambda index: True)
    return common_from_hf(values, "mistral", activation=activation(values, "hidden_act", "silu"), **local)


def _mistral_to_hf(config: DecoderConfig) -> dict[str, Any]:
    return common_to_hf(config, "MistralForCausalLM") | {"sliding_window": config.sliding_window}


def _qwen_window(values: Entries) -> dict[str, Any]:
    if not values.flag("use_sliding_window", False):
        return {}
    first = values.integer("max_window_layers", 28)
    return window(values, lambda index: index >= first)


def _qwen2_from_hf(values: Entries) -> DecoderConfig:
    local = _qwen_window(values)
    return common_from_hf(values, "qwen2", activation=activation(values, "hidden_act", "silu"), qkv_bias=True, **local)


def _qwen3_from_hf(values: Entries) -> DecoderConfig:
    bias = values.flag("attention_bias", False)
    special = {"qk_norm": True, "qkv_bias": bias, "o_bias": bias, **_qwen_window(values)}
    return common_from_hf(values, "qwen3", activation=activation(values, "hidden_act", "silu"), **special)


def qwen_to_hf(config: DecoderConfig, architecture: str, **special: Any) -> dict[str, Any]:
    """Of every Qwen."""
    if config.sliding_window is not None:
        window_entries = {"sliding_window": config.sliding_window, "layer_types": layer_types(config)}
        special |= {"use_sliding_window": True, **window_entries}
    return common_to_hf(config, architecture, **special)


def _qwen2_to_hf(config: DecoderConfig) -> dict[str, Any]:
    return qwen_to_hf(config, "Qwen2ForCausalLM")


def _qwen3_to_hf(config: DecoderConfig) -> dict[str, Any]:
    return qwen_to_hf(config, "Qwen3ForCausalLM", attention_bias=config.o_bias)


def _llama_from_gguf(header: Any) -> DecoderConfig:
    """Of Mistral and Yi, too; a Mistral with a window is one by name."""
    local = gguf_window(header, lambda index: True)
    return common_from_gguf(header, "mistral" if local else "llama", **local)


LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    _llama_from_hf,
    _llama_to_hf,
    TABLE,
    (GGUFNames("llama", _llama_from_gguf, Table(LLAMA_GGUF_ROWS, ignored=GGUF_IGNORED)),),
    defaults=SIZES,
)
_QWEN_SIZES = SIZES | {"vocab_size": 151936, "intermediate_size": 22016, "max_position_embeddings": 32768}
MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    _mistral_from_hf,
    _mistral_to_hf,
    TABLE,
    LLAMA.gguf,
    defaults=SIZES
    | {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
)
QWEN2 = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    _qwen2_from_hf,
    _qwen2_to_hf,
    TABLE,
    (GGUFNames("qwen2", lambda header: common_from_gguf(header, "qwen2", qkv_bias=True), GGUF_TABLE),),
    defaults=_QWEN_SIZES | {"num_key_value_heads": 32, "sliding_window": 4096},
)
QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    _qwen3_from_hf,
    _qwen3_to_hf,
    TABLE,
    (GGUFNames("qwen3", lambda header: common_from_gguf(header, "qwen3", qk_norm=True), GGUF_TABLE),),
    defaults=_QWEN_SIZES | {"num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096},
)
