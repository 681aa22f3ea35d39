"""Phi-3 and Phi-4 (arXiv 2404.14219): Llama with fused projections. Long contexts end where the original one did."""

from __future__ import annotations

from typing import Any

from spqr_jax.errors import ModelError
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
    ignored=(r"rope_factors_(?:long|short)\.weight",),
)


def _from_hf(values: Values) -> DecoderConfig:
    refuse(values, {"attention_bias": False})
    own = window(values, lambda index: True)
    return common_from_hf(values, "phi3", activation=activation(values.get("hidden_act", "silu")), **own)


def _to_hf(config: DecoderConfig) -> dict[str, Any]:
    values = common_to_hf(config, "Phi3ForCausalLM", original_max_position_embeddings=config.max_positions)
    return values | {"sliding_window": config.sliding_window, "pad_token_id": None}


def _from_gguf(header: Any) -> DecoderConfig:
    if any(name.startswith("rope_factors") for name in header.shapes()):
        raise ModelError(
            f"{header.label}: a Phi-3 of long context is not read from GGUF; use its Hugging Face directory"
        )
    return common_from_gguf(header, "phi3", **gguf_window(header, lambda index: True))


PHI3 = Family("phi3", "Phi3ForCausalLM", _from_hf, _to_hf, _TABLE, (GGUFNames("phi3", _from_gguf, _GGUF_TABLE),))
