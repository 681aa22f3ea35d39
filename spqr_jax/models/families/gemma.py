"""Gemma 2 (arXiv 2408.00118) and the text part of Gemma 3 (arXiv 2503.19786).

Norms before and after attention and MLP, their gains stored without the 1 that is
added; embeddings scaled; attention over a window in most blocks. Gemma 2 caps
scores and logits; Gemma 3 norms queries and keys, and turns local blocks' heads
with a base of their own.
"""

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
    layer_types,
    refuse,
    window,
)
from spqr_jax.models.families.packings import ONE_MORE
from spqr_jax.models.families.rope import rope, rope_entries
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


_DEFAULTS = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
}
"""Of transformers' configuration classes for Gemma 2 and for the text part of Gemma 3."""


def _from_hf(values: Entries, family: str, pattern: int, **special: Any) -> DecoderConfig:
    refuse(values, {"attention_bias": False, "use_bidirectional_attention": False})
    for name in ("_sliding_window_pattern", "sliding_window_pattern"):
        pattern = values.integer(name, pattern, least=1)
    base = _common(values.integer("hidden_size", least=1)) | {
        "activation": activation(values, "hidden_activation", "gelu_pytorch_tanh"),
        "query_scale": values.number("query_pre_attn_scalar", 256.0, least=1e-6) ** -0.5,
        **window(values, lambda index: bool((index + 1) % pattern)),
    }
    return common_from_hf(values, family, **(base | special))


def _to_hf(config: DecoderConfig, architecture: str, **special: Any) -> dict[str, Any]:
    activation_name = common_to_hf(config, architecture)["hidden_act"]
    scale = config.head_dim**-0.5 if config.query_scale is None else config.query_scale
    values = common_to_hf(
        config,
        architecture,
        hidden_act=None,
        hidden_activation=activation_name,
        query_pre_attn_scalar=round(scale**-2),
        layer_types=layer_types(config),
        **special,
    )
    # Read by transformers even if no block is local.
    return values | {
        "sliding_window": config.sliding_window or config.max_positions,
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
    }


# ---- Gemma 2 ------------------------------------------------------------------------------------


def _caps(values: Entries) -> dict[str, Any]:
    return {
        "attention_softcap": values.maybe_number("attn_logit_softcapping", least=1e-6),
        "logit_softcap": values.maybe_number("final_logit_softcapping", least=1e-6),
    }


def _gemma2_from_hf(values: Entries) -> DecoderConfig:
    return _from_hf(values, "gemma2", _GEMMA2_PATTERN, **_caps(values))


def _gguf_query_scale(header: Any, arch: str, large: int) -> float:
    """The 27B models divide by the width a head would have if they shared the hidden size; all others by their own."""
    keys = header.entries
    width = keys.integer(f"{arch}.attention.key_length", 256, least=1)
    if keys.integer(f"{arch}.block_count", least=1) == large:
        width = keys.integer(f"{arch}.embedding_length") // keys.integer(f"{arch}.attention.head_count", least=1)
    return float(max(width, 1)) ** -0.5


def _gemma2_from_gguf(header: Any) -> DecoderConfig:
    return common_from_gguf(
        header,
        "gemma2",
        **_common(header.entries.integer("gemma2.embedding_length", least=1)),
        attention_softcap=header.entries.number("gemma2.attn_logit_softcapping", 50.0, least=1e-6),
        logit_softcap=header.entries.number("gemma2.final_logit_softcapping", 30.0, least=1e-6),
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
    defaults=_DEFAULTS
    | {
        "vocab_size": 256000,
        "max_position_embeddings": 8192,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
)


# ---- Gemma 3 ------------------------------------------------------------------------------------


def _gemma3_from_hf(values: Entries) -> DecoderConfig:
    values = values.changed(values.nested("text_config").to_dict())  # of a model that also sees
    entries, local = _gemma3_rope(values)
    return _from_hf(
        values,
        "gemma3_text",
        _GEMMA3_PATTERN,
        qk_norm=True,
        **_caps(values),
        local_rope_theta=local,
        **rope(
            values.changed({"rope_scaling": None, "rope_parameters": entries}),
            values.integer("head_dim", 256, least=2),
            1_000_000.0,
        ),
    )


def _gemma3_rope(values: Entries) -> tuple[dict[str, Any], float]:
    """The entries of blocks that see everything, and the base of local blocks: `rope_scaling` adds to the former."""
    kinds = values.nested("rope_parameters")
    if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
        values.refuse("rope_parameters", f"only full_attention and sliding_attention, not {', '.join(sorted(unknown))}")
    local = kinds.nested("sliding_attention")
    if local.text("rope_type", "default") != "default":
        local.refuse("rope_type", "'default' for blocks with a sliding window")
    theta = local.maybe_number("rope_theta", least=1e-6) or values.maybe_number("rope_local_base_freq", least=1e-6)
    entries = kinds.nested("full_attention").to_dict() | values.nested("rope_scaling").to_dict()
    return entries, theta or _GEMMA3_LOCAL_THETA


def _gemma3_to_hf(config: DecoderConfig) -> dict[str, Any]:
    everywhere = rope_entries(config.rope_theta, config.rope_factors, config.rope_scale, config.max_positions)
    local = rope_entries(config.local_rope_theta or config.rope_theta, None, 1.0, config.max_positions)
    entries = {"full_attention": everywhere, "sliding_attention": local}
    return _to_hf(config, "Gemma3ForCausalLM", rope_theta=None, rope_parameters=entries)


def _gemma3_from_gguf(header: Any) -> DecoderConfig:
    return common_from_gguf(
        header,
        "gemma3_text",
        **_common(header.entries.integer("gemma3.embedding_length", least=1)),
        qk_norm=True,
        query_scale=_gguf_query_scale(header, "gemma3", 62),
        local_rope_theta=header.entries.number("gemma3.rope.freq_base_swa", _GEMMA3_LOCAL_THETA, least=1e-6),
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
    defaults=_DEFAULTS | {"vocab_size": 262208, "max_position_embeddings": 131072},
)
