"""Llamas with experts in place of MLPs: Mixtral, Qwen3-MoE. Their GGUF files stack the experts' weights."""

from __future__ import annotations

from typing import Any

from spqr_jax.models.config import DecoderConfig
from spqr_jax.models.families import llama
from spqr_jax.models.families.family import (
    Family,
    GGUFNames,
    Values,
    activation,
    common_from_gguf,
    common_from_hf,
    common_to_hf,
    window,
)
from spqr_jax.models.families.packings import EXPERTS_STACKED
from spqr_jax.models.names import Row, Table, block_rows

_EXPERT = "experts.{expert}."


def _hf_table(router: str, names: dict[str, str]) -> Table:
    """`names`: an expert's tensors, after the experts' own prefix."""
    sparse = {router + "gate.weight": "router"} | {
        router + _EXPERT + tensor: _EXPERT + name for tensor, name in names.items()
    }
    return Table(llama.ROWS + block_rows("model.layers.{layer}.", sparse), llama.PREFIXES, (llama.BUFFERS,))


_GGUF_SPARSE = block_rows("blk.{layer}.", {"ffn_gate_inp.weight": "router"}) + tuple(
    row
    for name in ("gate", "up", "down")
    for row in (
        Row(
            f"blk.{{layer}}.ffn_{name}_exps.weight",
            (f"layers.{{layer}}.experts.{{every}}.{name}_proj",),
            EXPERTS_STACKED,
        ),
        Row(f"blk.{{layer}}.ffn_{name}.{{expert}}.weight", (f"layers.{{layer}}.experts.{{expert}}.{name}_proj",)),
    )
)


# ---- Mixtral ------------------------------------------------------------------------------------


def _mixtral_from_hf(values: Values) -> DecoderConfig:
    return common_from_hf(
        values,
        "mixtral",
        activation=activation(values.get("hidden_act", "silu")),
        num_experts=values.get("num_local_experts", 8),
        experts_per_token=values.get("num_experts_per_tok", 2),
        expert_size=values.get("intermediate_size", 0),
        **window(values, lambda index: True),
    )


def _mixtral_to_hf(config: DecoderConfig) -> dict[str, Any]:
    return common_to_hf(
        config,
        "MixtralForCausalLM",
        intermediate_size=config.expert_size,
        num_local_experts=config.num_experts,
        num_experts_per_tok=config.experts_per_token,
    ) | {"sliding_window": config.sliding_window}


def is_mixtral(header: Any) -> bool:
    """Whether a GGUF file of architecture ``llama`` is one."""
    return bool(header.get("llama.expert_count"))


def _mixtral_from_gguf(header: Any) -> DecoderConfig:
    return common_from_gguf(
        header,
        "mixtral",
        num_experts=header.get("llama.expert_count"),
        experts_per_token=header.get("llama.expert_used_count"),
        expert_size=header.get("llama.feed_forward_length"),
    )


MIXTRAL = Family(
    "mixtral",
    "MixtralForCausalLM",
    _mixtral_from_hf,
    _mixtral_to_hf,
    _hf_table("block_sparse_moe.", {"w1.weight": "gate_proj", "w3.weight": "up_proj", "w2.weight": "down_proj"}),
    (GGUFNames("llama", _mixtral_from_gguf, Table(llama.LLAMA_GGUF_ROWS + _GGUF_SPARSE, ignored=llama.GGUF_IGNORED)),),
)


# ---- Qwen3-MoE ----------------------------------------------------------------------------------


def _qwen3_moe_from_hf(values: Values) -> DecoderConfig:
    count, step = values.get("num_hidden_layers", 0), values.get("decoder_sparse_step") or 1
    dense = set(values.get("mlp_only_layers") or ()) | {index for index in range(count) if (index + 1) % step}
    bias = bool(values.get("attention_bias"))
    return common_from_hf(
        values,
        "qwen3_moe",
        activation=activation(values.get("hidden_act", "silu")),
        qk_norm=True,
        qkv_bias=bias,
        o_bias=bias,
        num_experts=values.get("num_experts") or values.get("num_local_experts") or 128,
        experts_per_token=values.get("num_experts_per_tok", 8),
        expert_size=values.get("moe_intermediate_size", 768),
        normalize_experts=bool(values.get("norm_topk_prob", False)),
        dense_layers=tuple(sorted(dense)),
        **(window(values, lambda index: True) if values.get("use_sliding_window") else {}),
    )


def _qwen3_moe_to_hf(config: DecoderConfig) -> dict[str, Any]:
    return llama.qwen_to_hf(
        config,
        "Qwen3MoeForCausalLM",
        attention_bias=config.o_bias,
        num_experts=config.num_experts,
        num_experts_per_tok=config.experts_per_token,
        moe_intermediate_size=config.expert_size,
        norm_topk_prob=config.normalize_experts,
        mlp_only_layers=list(config.dense_layers),
        decoder_sparse_step=1,
    )


def _qwen3_moe_from_gguf(header: Any) -> DecoderConfig:
    return common_from_gguf(
        header,
        "qwen3_moe",
        qk_norm=True,
        num_experts=header.get("qwen3moe.expert_count"),
        experts_per_token=header.get("qwen3moe.expert_used_count"),
        expert_size=header.get("qwen3moe.expert_feed_forward_length"),
    )


QWEN3_MOE = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    _qwen3_moe_from_hf,
    _qwen3_moe_to_hf,
    _hf_table("mlp.", {f"{name}_proj.weight": f"{name}_proj" for name in ("gate", "up", "down")}),
    (GGUFNames("qwen3moe", _qwen3_moe_from_gguf, Table(llama.GGUF_ROWS + _GGUF_SPARSE)),),
)
