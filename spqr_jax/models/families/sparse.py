"""Llamas with experts in place of MLPs: Mixtral, Qwen3-MoE. Their GGUF files stack the experts' weights."""

from __future__ import annotations

from typing import Any

from spqr_jax.files import Entries
from spqr_jax.models.config import MOST_LAYERS, DecoderConfig
from spqr_jax.models.families import llama
from spqr_jax.models.families.family import (
    Family,
    GGUFNames,
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


def _mixtral_from_hf(values: Entries) -> DecoderConfig:
    return common_from_hf(
        values,
        "mixtral",
        activation=activation(values, "hidden_act", "silu"),
        num_experts=values.integer("num_local_experts", least=1),
        experts_per_token=values.integer("num_experts_per_tok", least=1),
        expert_size=values.integer("intermediate_size", least=1),
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
    return header.entries.integer("llama.expert_count", 0) > 0


def _mixtral_from_gguf(header: Any) -> DecoderConfig:
    keys = header.entries
    return common_from_gguf(
        header,
        "mixtral",
        num_experts=keys.integer("llama.expert_count", least=1),
        experts_per_token=keys.integer("llama.expert_used_count", least=1),
        expert_size=keys.integer("llama.feed_forward_length", least=1),
    )


MIXTRAL = Family(
    "mixtral",
    "MixtralForCausalLM",
    _mixtral_from_hf,
    _mixtral_to_hf,
    _hf_table("block_sparse_moe.", {"w1.weight": "gate_proj", "w3.weight": "up_proj", "w2.weight": "down_proj"}),
    (GGUFNames("llama", _mixtral_from_gguf, Table(llama.LLAMA_GGUF_ROWS + _GGUF_SPARSE, ignored=llama.GGUF_IGNORED)),),
    defaults=llama.SIZES
    | {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
)


# ---- Qwen3-MoE ----------------------------------------------------------------------------------


def _qwen3_moe_from_hf(values: Entries) -> DecoderConfig:
    count, step = (
        values.integer("num_hidden_layers", least=1, most=MOST_LAYERS),
        values.integer("decoder_sparse_step", least=1),
    )
    dense = set(values.integers("mlp_only_layers", most=count - 1)) | {i for i in range(count) if (i + 1) % step}
    bias = values.flag("attention_bias", False)
    return common_from_hf(
        values,
        "qwen3_moe",
        activation=activation(values, "hidden_act", "silu"),
        qk_norm=True,
        qkv_bias=bias,
        o_bias=bias,
        num_experts=values.maybe_integer("num_experts", least=1) or values.integer("num_local_experts", least=1),
        experts_per_token=values.integer("num_experts_per_tok", least=1),
        expert_size=values.integer("moe_intermediate_size", least=1),
        normalize_experts=values.flag("norm_topk_prob", False),
        dense_layers=tuple(sorted(dense)),
        **(window(values, lambda index: True) if values.flag("use_sliding_window", False) else {}),
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
    keys = header.entries
    return common_from_gguf(
        header,
        "qwen3_moe",
        qk_norm=True,
        num_experts=keys.integer("qwen3moe.expert_count", least=1),
        experts_per_token=keys.integer("qwen3moe.expert_used_count", least=1),
        expert_size=keys.integer("qwen3moe.expert_feed_forward_length", least=1),
    )


QWEN3_MOE = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    _qwen3_moe_from_hf,
    _qwen3_moe_to_hf,
    _hf_table("mlp.", {f"{name}_proj.weight": f"{name}_proj" for name in ("gate", "up", "down")}),
    (GGUFNames("qwen3moe", _qwen3_moe_from_gguf, Table(llama.GGUF_ROWS + _GGUF_SPARSE, ignored=llama.GGUF_IGNORED)),),
    defaults=llama.SIZES
    | {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 24,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "num_local_experts": 128,
    },
)
