"""OPT (arXiv 2205.01068): learned positions, LayerNorm, biases, ReLU. Of those with the norms before, not after."""

from __future__ import annotations

from typing import Any

from spqr_jax.files import Entries
from spqr_jax.models.config import DecoderConfig
from spqr_jax.models.families.family import Family, activation, common_from_hf, common_to_hf, refuse
from spqr_jax.models.names import Table, block_rows, outer_rows, with_biases

_FIRST_POSITION = 2  # rows before it stand for padding in the library that OPT was made with


_TABLE = Table(
    outer_rows(
        {
            "model.decoder.embed_tokens.weight": "embed_tokens",
            "model.decoder.embed_positions.weight": "embed_positions",
            "lm_head.weight": "lm_head",
            **with_biases({"model.decoder.final_layer_norm": "final_norm"}),
        }
    )
    + block_rows(
        "model.decoder.layers.{layer}.",
        with_biases(
            {
                "self_attn_layer_norm": "attention_norm",
                "self_attn.q_proj": "q_proj",
                "self_attn.k_proj": "k_proj",
                "self_attn.v_proj": "v_proj",
                "self_attn.out_proj": "o_proj",
                "final_layer_norm": "mlp_norm",
                "fc1": "up_proj",
                "fc2": "down_proj",
            }
        ),
    ),
    ("model.decoder.", "decoder."),
)


def _from_hf(values: Entries) -> DecoderConfig:
    refuse(
        values,
        {
            "do_layer_norm_before": True,
            "_remove_final_layer_norm": False,
            "layer_norm_elementwise_affine": True,
            "word_embed_proj_dim": values.raw("hidden_size"),
        },
    )
    bias = values.flag("enable_bias", True)
    return common_from_hf(
        values,
        "opt",
        intermediate_size=values.integer("ffn_dim", least=1),
        norm="layer",
        norm_eps=1e-5,
        rope_theta=None,
        activation=activation(values, "activation_function", "relu"),
        gated=False,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
        learned_positions=values.integer("max_position_embeddings", least=1) + _FIRST_POSITION,
        position_offset=_FIRST_POSITION,
    )


def _to_hf(config: DecoderConfig) -> dict[str, Any]:
    return common_to_hf(
        config,
        "OPTForCausalLM",
        intermediate_size=None,
        num_key_value_heads=None,
        head_dim=None,
        rms_norm_eps=None,
        hidden_act=None,
        ffn_dim=config.intermediate_size,
        activation_function=common_to_hf(config, "")["hidden_act"],
        word_embed_proj_dim=config.hidden_size,
        do_layer_norm_before=True,
        enable_bias=config.mlp_bias,
    )


OPT = Family(
    "opt",
    "OPTForCausalLM",
    _from_hf,
    _to_hf,
    _TABLE,
    defaults={
        "vocab_size": 50272,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "ffn_dim": 3072,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    },
)
