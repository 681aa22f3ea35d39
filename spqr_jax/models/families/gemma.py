"""Gemma 2 (arXiv 2408.00118) and the text part of Gemma 3 (arXiv 2503.19786).

Norms before and after attention and MLP, their gains stored without the 1 that is
added; embeddings scaled; attention over a window in most blocks. Gemma 2 caps
scores and logits; Gemma 3 norms queries and keys, and turns local blocks' heads
with a base of their own.
"""

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
    gguf_window,
    layer_types,
    refuse,
    rope,
    rope_entries,
    window,
)
from spqr_jax.models.families.packings import ONE_MORE
from spqr_jax.models.names import Row, Table, block_rows

_GEMMA2_PATTERN = 2  # every so many blocks one is not local
_GEMMA3_PATTERN = 6
_GEMMA3_LOCAL_THETA = 10000.0

_NORMS = {
    "post_attention_layernorm.weight": "attention_post_norm",
    "pre_feedforward_layernorm.weight": "mlp_norm",
    "post_feedforward_layernorm.weight": "mlp_post_norm",
}
_NAMES = llama.ATTENTION | llama.MLP | _NORMS
_TABLE = Table(
    llama.OUTER + block_rows("model.layers.{layer}.", _NAMES),
    ("model.language_model.", "language_model.model.", "language_model.", "model."),
    (llama.BUFFERS, r"(?:model\.)?(?:vision_tower|multi_modal_projector)\..*"),
)


def _with_one_more(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """The same rows; GGUF's norms have the 1 in them."""
    return tuple(Row(r.tensor, r.paths, ONE_MORE) if r.tensor.endswith("norm.weight") else r for r in rows)


_GGUF_TABLE = Table(
    _with_one_more(
        llama.GGUF_ROWS
        + block_rows(
            "blk.{layer}.",
            {"post_attention_norm.weight": "attention_post_norm", "post_ffw_norm.weight": "mlp_post_norm"},
        )
    ),
    ignored=llama.GGUF_IGNORED,
)


def _common(hidden_size: int) -> dict[str, Any]:
    return {
        "norm_offset": 1.0,
        "post_norms": True,
        "activation": "gelu_tanh",
        "embedding_scale": float(hidden_size) ** 0.5,
    }


def _from_hf(values: Values, family: str, pattern: int, **own: Any) -> DecoderConfig:
    refuse(values, {"attention_bias": False, "use_bidirectional_attention": False})
    pattern = values.get("sliding_window_pattern") or values.get("_sliding_window_pattern") or pattern
    base = _common(values.get("hidden_size", 0)) | {
        "head_dim": values.get("head_dim") or 256,
        "tied_head": bool(values.get("tie_word_embeddings", True)),
        "activation": activation(values.get("hidden_activation") or "gelu_pytorch_tanh"),
        "query_scale": float(values.get("query_pre_attn_scalar") or 256) ** -0.5,
        **window(values, lambda index: bool((index + 1) % pattern)),
    }
    return common_from_hf(values, family, **(base | own))


def _to_hf(config: DecoderConfig, architecture: str, **own: Any) -> dict[str, Any]:
    activation_name = common_to_hf(config, architecture)["hidden_act"]
    scale = config.head_dim**-0.5 if config.query_scale is None else config.query_scale
    values = common_to_hf(
        config,
        architecture,
        hidden_act=None,
        hidden_activation=activation_name,
        query_pre_attn_scalar=round(scale**-2),
        layer_types=layer_types(config),
        **own,
    )
    # Read by transformers even if no block is local.
    return values | {
        "sliding_window": config.sliding_window or config.max_positions,
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
    }


# ---- Gemma 2 ------------------------------------------------------------------------------------


def _gemma2_from_hf(values: Values) -> DecoderConfig:
    caps = {
        "attention_softcap": values.get("attn_logit_softcapping", 50.0),
        "logit_softcap": values.get("final_logit_softcapping", 30.0),
    }
    return _from_hf(values, "gemma2", _GEMMA2_PATTERN, **caps)


def _gguf_query_scale(header: Any, arch: str, large: int) -> float:
    """The 27B models divide by the width a head would have if they shared the hidden size; all others by their own."""
    heads, layers = header.get(f"{arch}.attention.head_count", 1), header.get(f"{arch}.block_count")
    width = header.get(f"{arch}.embedding_length", 0) // heads if layers == large else None
    return float(width or header.get(f"{arch}.attention.key_length", 256)) ** -0.5


def _gemma2_from_gguf(header: Any) -> DecoderConfig:
    return common_from_gguf(
        header,
        "gemma2",
        **_common(header.get("gemma2.embedding_length", 0)),
        attention_softcap=header.get("gemma2.attn_logit_softcapping", 50.0),
        logit_softcap=header.get("gemma2.final_logit_softcapping", 30.0),
        query_scale=_gguf_query_scale(header, "gemma2", 46),
        **gguf_window(header, lambda index: bool((index + 1) % _GEMMA2_PATTERN)),
    )


GEMMA2 = Family(
    "gemma2",
    "Gemma2ForCausalLM",
    _gemma2_from_hf,
    lambda config: _to_hf(config, "Gemma2ForCausalLM"),
    _TABLE,
    (GGUFNames("gemma2", _gemma2_from_gguf, _GGUF_TABLE),),
    starts_with_bos=True,
)


# ---- Gemma 3 ------------------------------------------------------------------------------------


def _gemma3_from_hf(values: Values) -> DecoderConfig:
    values = {**values, **values.get("text_config", {})}  # of a model that also sees
    nested = values.get("rope_parameters") or {}
    everywhere = {name: value for name, value in values.items() if name != "rope_parameters"}
    if "full_attention" in nested:
        everywhere["rope_parameters"] = nested["full_attention"]
    head_dim = values.get("head_dim") or 256
    local = values.get("rope_local_base_freq") or nested.get("sliding_attention", {}).get("rope_theta")
    return _from_hf(
        values,
        "gemma3_text",
        _GEMMA3_PATTERN,
        qk_norm=True,
        attention_softcap=values.get("attn_logit_softcapping"),
        logit_softcap=values.get("final_logit_softcapping"),
        local_rope_theta=float(local or _GEMMA3_LOCAL_THETA),
        **rope(everywhere, head_dim, 1_000_000.0),
    )


def _gemma3_to_hf(config: DecoderConfig) -> dict[str, Any]:
    everywhere = rope_entries(config.rope_theta, config.rope_factors, config.rope_scale, config.max_positions)
    local = rope_entries(config.local_rope_theta or config.rope_theta, None, 1.0, config.max_positions)
    own = {"rope_parameters": {"full_attention": everywhere, "sliding_attention": local}}
    return _to_hf(config, "Gemma3ForCausalLM", rope_theta=None, **own)


def _gemma3_from_gguf(header: Any) -> DecoderConfig:
    return common_from_gguf(
        header,
        "gemma3_text",
        **_common(header.get("gemma3.embedding_length", 0)),
        qk_norm=True,
        query_scale=_gguf_query_scale(header, "gemma3", 62),
        local_rope_theta=float(header.get("gemma3.rope.freq_base_swa", _GEMMA3_LOCAL_THETA)),
        **gguf_window(header, lambda index: bool((index + 1) % _GEMMA3_PATTERN)),
    )


GEMMA3 = Family(
    "gemma3_text",
    "Gemma3ForCausalLM",
    _gemma3_from_hf,
    _gemma3_to_hf,
    _TABLE,
    (GGUFNames("gemma3", _gemma3_from_gguf, _GGUF_TABLE),),
    other_names=("gemma3",),
    starts_with_bos=True,
)
