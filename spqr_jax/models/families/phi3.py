"""Phi-3 and Phi-4 (arXiv 2404.14219): Llama with fused projections. Long contexts end where the original one did."""

from __future__ import annotations

from typing import Any

from spqr_jax.files import Entries
from spqr_jax.models.config import DecoderConfig
from spqr_jax.models.families import llama
from spqr_jax.models.families.family import (
    Family,
    GGUFNames,
    activation,
    common_from_gguf,
    common_from_hf,
    common_to_hf,
    gguf_window,
    refuse,
    window,
)
from spqr_jax.models.families.packings import GATE_UP_STACKED, QKV_STACKED
from spqr_jax.models.names import Table, block_rows

_FUSED = {"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}


def _rows(prefix: str, names: dict[str, str], qkv: str, gate_up: str) -> tuple[Any, ...]:
    alone = {tensor: name for tensor, name in names.items() if not any(name in fused for fused in _FUSED)}
    return (
        block_rows(prefix, alone)
        + block_rows(prefix, {qkv: ("q_proj", "k_proj", "v_proj")}, QKV_STACKED)
        + block_rows(prefix, {gate_up: ("gate_proj", "up_proj")}, GATE_UP_STACKED)
    )


_TABLE = Table(
    llama.OUTER
    + _rows(
        "model.layers.{layer}.",
        llama.ATTENTION | llama.MLP,
        "self_attn.qkv_proj.weight",
        "mlp.gate_up_proj.weight",
    ),
    llama.PREFIXES,
    (llama.BUFFERS,),
)
_GGUF_TABLE = Table(
    llama.GGUF_OUTER + _rows("blk.{layer}.", llama.GGUF_ATTENTION | llama.GGUF_MLP, "attn_qkv.weight", "ffn_up.weight"),
    ignored=llama.GGUF_IGNORED,
)


def _from_hf(values: Entries) -> DecoderConfig:
    refuse(values, {"attention_bias": False})
    local = window(values, lambda index: True)
    return common_from_hf(values, "phi3", activation=activation(values, "hidden_act", "silu"), **local)


def _to_hf(config: DecoderConfig) -> dict[str, Any]:
    values = common_to_hf(config, "Phi3ForCausalLM", original_max_position_embeddings=config.max_positions)
    return values | {"sliding_window": config.sliding_window, "pad_token_id": None}


def _from_gguf(header: Any) -> DecoderConfig:
    return common_from_gguf(header, "phi3", **gguf_window(header, lambda index: True))


PHI3 = Family(
    "phi3",
    "Phi3ForCausalLM",
    _from_hf,
    _to_hf,
    _TABLE,
    (GGUFNames("phi3", _from_gguf, _GGUF_TABLE),),
    defaults=llama.SIZES
    | {
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
)
