"""Llama and those that differ from it in a bias, a norm or a window: Mistral, Yi, Qwen2, Qwen3."""

from __future__ import annotations

from typing import Any

from spqr_jax.models.config import DecoderConfig
from spqr_jax.models.families.family import (
    Family,
    GGUFNames,
    Values,
    activation,
    common_from_gguf,
    common_from_hf,
    common_to_hf,
    gguf_window,
    layer_types,
    refuse,
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
GGUF_IGNORED = (r"rope_freqs\.weight",)  # goes into the configuration
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


def _llama_from_hf(values: Values) -> DecoderConfig:
    refuse(values, {"pretraining_tp": 1})
    bias = bool(values.get("attention_bias"))
    return common_from_hf(
        values,
        "llama",
        activation=activation(values.get("hidden_act", "silu")),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bool(values.get("mlp_bias")),
    )


def _llama_to_hf(config: DecoderConfig) -> dict[str, Any]:
    return common_to_hf(config, "LlamaForCausalLM", attention_bias=config.qkv_bias, mlp_bias=config.mlp_bias)


def _mistral_from_hf(values: Values) -> DecoderConfig:
    own = window(values, lambda index: True)
    return common_from_hf(values, "mistral", activation=activation(values.get("hidden_act", "silu")), **own)


def _mistral_to_hf(config: DecoderConfig) -> dict[str, Any]:
    return common_to_hf(config, "MistralForCausalLM") | {"sliding_window": config.sliding_window}


def _qwen_window(values: Values) -> dict[str, Any]:
    if not values.get("use_sliding_window"):
        return {}
    return window(values, lambda index: index >= values.get("max_window_layers", 28))


def _qwen2_from_hf(values: Values) -> DecoderConfig:
    own = _qwen_window(values)
    return common_from_hf(
        values, "qwen2", activation=activation(values.get("hidden_act", "silu")), qkv_bias=True, **own
    )


def _qwen3_from_hf(values: Values) -> DecoderConfig:
    bias = bool(values.get("attention_bias"))
    own = {"qk_norm": True, "qkv_bias": bias, "o_bias": bias, **_qwen_window(values)}
    head_dim = values.get("head_dim") or 128
    return common_from_hf(
        values, "qwen3", activation=activation(values.get("hidden_act", "silu")), head_dim=head_dim, **own
    )


def qwen_to_hf(config: DecoderConfig, architecture: str, **own: Any) -> dict[str, Any]:
    """Of every Qwen."""
    if config.sliding_window is not None:
        own |= {"use_sliding_window": True, "sliding_window": config.sliding_window, "layer_types": layer_types(config)}
    return common_to_hf(config, architecture, **own)


def _qwen2_to_hf(config: DecoderConfig) -> dict[str, Any]:
    return qwen_to_hf(config, "Qwen2ForCausalLM")


def _qwen3_to_hf(config: DecoderConfig) -> dict[str, Any]:
    return qwen_to_hf(config, "Qwen3ForCausalLM", attention_bias=config.o_bias)


def _llama_from_gguf(header: Any) -> DecoderConfig:
    """Of Mistral and Yi, too; a Mistral with a window is one by name."""
    found = gguf_window(header, lambda index: True)
    return common_from_gguf(header, "mistral" if found else "llama", **found)


LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    _llama_from_hf,
    _llama_to_hf,
    TABLE,
    (GGUFNames("llama", _llama_from_gguf, Table(LLAMA_GGUF_ROWS, ignored=GGUF_IGNORED)),),
)
MISTRAL = Family("mistral", "MistralForCausalLM", _mistral_from_hf, _mistral_to_hf, TABLE, LLAMA.gguf)
QWEN2 = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    _qwen2_from_hf,
    _qwen2_to_hf,
    TABLE,
    (GGUFNames("qwen2", lambda header: common_from_gguf(header, "qwen2", qkv_bias=True), GGUF_TABLE),),
)
QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    _qwen3_from_hf,
    _qwen3_to_hf,
    TABLE,
    (GGUFNames("qwen3", lambda header: common_from_gguf(header, "qwen3", qk_norm=True), GGUF_TABLE),),
)
