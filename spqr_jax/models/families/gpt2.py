"""GPT-2: learned positions, LayerNorm, biases, and weights stored [in, out]."""

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
    refuse,
)
from spqr_jax.models.families.packings import QKV_STACKED, QKV_TRANSPOSED, TRANSPOSED
from spqr_jax.models.names import Table, block_rows, outer_rows, with_biases

_QKV = tuple(f"{name}_proj" for name in "qkv")
_QKV_BIAS = tuple(f"{name}_proj_bias" for name in "qkv")
_BLOCK = "transformer.h.{layer}."
_NORMS = {"ln_1": "attention_norm", "ln_2": "mlp_norm"}
_MATRICES = {"attn.c_proj": "o_proj", "mlp.c_fc": "up_proj", "mlp.c_proj": "down_proj"}

_TABLE = Table(
    outer_rows(
        {
            "transformer.wte.weight": "embed_tokens",
            "transformer.wpe.weight": "embed_positions",
            "transformer.ln_f.weight": "final_norm",
            "transformer.ln_f.bias": "final_norm_bias",
            "lm_head.weight": "lm_head",
        }
    )
    + block_rows(_BLOCK, {f"{tensor}.weight": name for tensor, name in _NORMS.items()})
    + block_rows(_BLOCK, {f"{tensor}.bias": f"{name}_bias" for tensor, name in (_NORMS | _MATRICES).items()})
    + block_rows(_BLOCK, {f"{tensor}.weight": name for tensor, name in _MATRICES.items()}, TRANSPOSED)
    + block_rows(_BLOCK, {"attn.c_attn.weight": _QKV}, QKV_TRANSPOSED)
    + block_rows(_BLOCK, {"attn.c_attn.bias": _QKV_BIAS}, QKV_STACKED),
    ("transformer.",),
    (r"(?:transformer\.)?h\.\d+\.attn\.(?:masked_)?bias",),
)

_COMMON: dict[str, Any] = {
    "norm": "layer",
    "rope_theta": None,
    "gated": False,
    "qkv_bias": True,
    "o_bias": True,
    "mlp_bias": True,
}


def _from_hf(values: Entries) -> DecoderConfig:
    refuse(
        values,
        {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    )
    ours = {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
    }
    sizes = {name: values.integer(theirs, least=1) for name, theirs in ours.items()}
    return common_from_hf(
        values.changed(sizes),
        "gpt2",
        intermediate_size=values.integer("n_inner", 4 * sizes["hidden_size"], least=1),
        norm_eps=values.number("layer_norm_epsilon", least=0),
        activation=activation(values, "activation_function", "gelu_new"),
        learned_positions=sizes["max_position_embeddings"],
        **_COMMON,
    )


def _to_hf(config: DecoderConfig) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_embd": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_positions": config.max_positions,
        "n_inner": config.intermediate_size,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": {"gelu_tanh": "gelu_new"}.get(config.activation, config.activation),
        "tie_word_embeddings": config.tied_head,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
    }


def _from_gguf(header: Any) -> DecoderConfig:
    positions = header.shapes().get("position_embd.weight", (0,))[0]
    return common_from_gguf(header, "gpt2", activation="gelu_tanh", learned_positions=positions, **_COMMON)


_GGUF_BLOCK = "blk.{layer}."
_GGUF_TABLE = Table(
    llama.GGUF_OUTER
    + outer_rows({"output_norm.bias": "final_norm_bias", "position_embd.weight": "embed_positions"})
    + block_rows(
        _GGUF_BLOCK,
        llama.GGUF_MLP | with_biases({"attn_norm": "attention_norm", "ffn_norm": "mlp_norm", "attn_output": "o_proj"}),
    )
    + block_rows(_GGUF_BLOCK, {"attn_qkv.weight": _QKV, "attn_qkv.bias": _QKV_BIAS}, QKV_STACKED)
)

GPT2 = Family(
    "gpt2",
    "GPT2LMHeadModel",
    _from_hf,
    _to_hf,
    _TABLE,
    (GGUFNames("gpt2", _from_gguf, _GGUF_TABLE),),
    defaults={
        "vocab_size": 50257,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_positions": 1024,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
    },
)
