"""Falcon (arXiv 2311.16867): attention and MLP side by side, one or few heads of keys and values, LayerNorm."""

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
    refuse,
)
from spqr_jax.models.families.packings import QKV_BY_HEADS, QKV_STACKED
from spqr_jax.models.names import Table, block_rows, outer_rows, with_biases

_QKV = tuple(f"{name}_proj" for name in "qkv")
_QKV_BIAS = tuple(f"{name}_proj_bias" for name in "qkv")


def _two_norms(config: DecoderConfig) -> bool:
    return config.parallel and not config.shared_norm


def _other_norms(config: DecoderConfig) -> bool:
    return not _two_norms(config)


_OUTER = outer_rows(
    {
        "transformer.word_embeddings.weight": "embed_tokens",
        "transformer.ln_f.weight": "final_norm",
        "transformer.ln_f.bias": "final_norm_bias",
        "lm_head.weight": "lm_head",
    }
)
_BLOCK = "transformer.h.{layer}."
_MATRICES = {
    "self_attention.dense": "o_proj",
    "mlp.dense_h_to_4h": "up_proj",
    "mlp.dense_4h_to_h": "down_proj",
}
# With one head of keys and values, by heads is one below the other, so one packing serves all.
_FUSED = block_rows(
    _BLOCK,
    {"self_attention.query_key_value.weight": _QKV, "self_attention.query_key_value.bias": _QKV_BIAS},
    QKV_BY_HEADS,
)
_TABLE = Table(
    _OUTER
    + block_rows(_BLOCK, with_biases(_MATRICES))
    + block_rows(
        _BLOCK,
        with_biases({"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}),
        when=_other_norms,
    )
    + block_rows(_BLOCK, with_biases({"ln_attn": "attention_norm", "ln_mlp": "mlp_norm"}), when=_two_norms)
    + _FUSED,
    ("transformer.",),
    (r"(?:transformer\.)?h\.\d+\.self_attention\.rotary_emb\.inv_freq",),
)


_OLDER = {"hidden_size": "n_embed", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
"""Names of the files from before transformers had the model."""


def _from_hf(values: Entries) -> DecoderConfig:
    refuse(values, {"alibi": False})
    renamed = {name: values.raw(old) for name, old in _OLDER.items() if old in values and name not in values}
    values = values.changed(renamed)
    new = values.flag("new_decoder_architecture", False)
    parallel = new or values.flag("parallel_attn", True)
    norms = values.integer("num_ln_in_parallel_attn", 2 if new else 1, least=1, most=2)
    heads = values.integer("num_attention_heads", least=1)
    kv_heads = values.maybe_integer("num_kv_heads", least=1) or values.integer("n_head_kv", heads, least=1)
    bias = values.flag("bias", False)
    return common_from_hf(
        values.changed({"num_key_value_heads": kv_heads if new or not values.flag("multi_query", True) else 1}),
        "falcon",
        intermediate_size=values.integer("ffn_hidden_size", 4 * values.integer("hidden_size", least=1), least=1),
        norm="layer",
        norm_eps=values.number("layer_norm_epsilon", 1e-5, least=0),
        activation=activation(values, "activation", "gelu"),
        gated=False,
        parallel=parallel,
        shared_norm=parallel and norms == 1,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
    )


def _to_hf(config: DecoderConfig) -> dict[str, Any]:
    two_norms = _two_norms(config)
    multi_query = config.num_kv_heads == 1 and not two_norms
    return common_to_hf(
        config,
        "FalconForCausalLM",
        intermediate_size=None,
        num_key_value_heads=None,
        head_dim=None,
        hidden_act=None,
        rms_norm_eps=None,
        ffn_hidden_size=config.intermediate_size,
        num_kv_heads=config.num_kv_heads,
        layer_norm_epsilon=config.norm_eps,
        activation="gelu" if config.activation == "gelu" else common_to_hf(config, "")["hidden_act"],
        alibi=False,
        bias=config.qkv_bias,
        parallel_attn=config.parallel,
        multi_query=multi_query,
        # Few heads of keys and values, or two norms, are what the new architecture has.
        new_decoder_architecture=two_norms or 1 < config.num_kv_heads < config.num_heads,
        num_ln_in_parallel_attn=(1 if config.shared_norm else 2) if config.parallel else None,
    )


def _from_gguf(header: Any) -> DecoderConfig:
    two_norms = "blk.0.attn_norm_2.weight" in header.shapes()
    return common_from_gguf(
        header,
        "falcon",
        norm="layer",
        activation="gelu",
        gated=False,
        parallel=True,
        shared_norm=not two_norms,
    )


_GGUF_BLOCK = "blk.{layer}."
_GGUF_TABLE = Table(
    llama.GGUF_OUTER
    + outer_rows({"output_norm.bias": "final_norm_bias"})
    + block_rows(_GGUF_BLOCK, with_biases({"attn_output": "o_proj", "ffn_up": "up_proj", "ffn_down": "down_proj"}))
    + block_rows(_GGUF_BLOCK, with_biases({"attn_norm": "attention_norm"}), when=_other_norms)
    + block_rows(_GGUF_BLOCK, with_biases({"attn_norm_2": "attention_norm", "attn_norm": "mlp_norm"}), when=_two_norms)
    + block_rows(_GGUF_BLOCK, {"attn_qkv.weight": _QKV, "attn_qkv.bias": _QKV_BIAS}, QKV_STACKED)
)

FALCON = Family(
    "falcon",
    "FalconForCausalLM",
    _from_hf,
    _to_hf,
    _TABLE,
    (GGUFNames("falcon", _from_gguf, _GGUF_TABLE),),
    other_names=("RefinedWebModel", "RefinedWeb"),
    defaults={
        "vocab_size": 65024,
        "hidden_size": 4544,
        "num_hidden_layers": 32,
        "num_attention_heads": 71,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    },
)
