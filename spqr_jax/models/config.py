"""What a decoder is made of, as static configuration.

Read from a Hugging Face ``config.json`` or a GGUF header; every entry that we
do not understand is refused, so a model is never run as something it is not.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from spqr_jax.errors import ModelError

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM",)


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and constants of a decoder of the Llama family.

    Attributes:
      vocab_size, hidden_size, intermediate_size: widths.
      num_layers, num_heads, num_kv_heads, head_dim: of the attention.
      norm_eps: added to the mean square in every RMSNorm.
      rope_theta: base of the rotary frequencies.
      rope_factors: divisor of each of the head_dim/2 rotary frequencies (Llama-3
        and linear scaling), or None for none.
      max_positions: longest sequence the model was made for.
      tied_head: the output head is the embedding.
      bos_token_id, eos_token_ids: special tokens, as the model's files name them.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    max_positions: int
    tied_head: bool
    rope_factors: tuple[float, ...] | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ModelError(f"{self.num_heads} query heads cannot share {self.num_kv_heads} key-value heads evenly")
        if self.head_dim % 2:
            raise ModelError(f"rotary embedding needs an even head size, got {self.head_dim}")
        if self.rope_factors is not None and len(self.rope_factors) != self.head_dim // 2:
            raise ModelError(f"expected {self.head_dim // 2} rotary factors, got {len(self.rope_factors)}")

    @property
    def head_path(self) -> str:
        """Path of the weight that serves as output head."""
        return "embed_tokens" if self.tied_head else "lm_head"

    def to_json(self) -> dict[str, Any]:
        """A JSON-serializable dictionary; `from_json` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> DecoderConfig:
        """Reads what `to_json` wrote."""
        values = dict(values)
        for name in ("rope_factors", "eos_token_ids"):
            if values.get(name) is not None:
                values[name] = tuple(values[name])
        try:
            return cls(**values)
        except TypeError as error:
            raise ModelError(f"not a decoder configuration of this version: {error}") from None


def config_from_hf(values: Mapping[str, Any]) -> DecoderConfig:
    """Maps a Hugging Face ``config.json``.

    Raises:
      ModelError: an architecture or an option that we do not run.
    """
    architecture = (values.get("architectures") or [None])[0]
    if architecture not in SUPPORTED_ARCHITECTURES and values.get("model_type") != "llama":
        raise ModelError(
            f"architecture {architecture or values.get('model_type')!r} is not supported; "
            f"supported: {', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    if values.get("attention_bias") or values.get("mlp_bias"):
        raise ModelError("a Llama with biases (attention_bias or mlp_bias) is not supported")
    if values.get("hidden_act", "silu") != "silu":
        raise ModelError(f"hidden_act {values['hidden_act']!r} is not supported, expected 'silu'")
    try:
        heads = values["num_attention_heads"]
        head_dim = values.get("head_dim") or values["hidden_size"] // heads
        rope = {**(values.get("rope_scaling") or {}), **(values.get("rope_parameters") or {})}
        theta = float(values.get("rope_theta") or rope.get("rope_theta") or 10000.0)
        eos = values.get("eos_token_id")
        return DecoderConfig(
            vocab_size=values["vocab_size"],
            hidden_size=values["hidden_size"],
            intermediate_size=values["intermediate_size"],
            num_layers=values["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=values.get("num_key_value_heads") or heads,
            head_dim=head_dim,
            norm_eps=float(values.get("rms_norm_eps", 1e-6)),
            rope_theta=theta,
            max_positions=values.get("max_position_embeddings", 2048),
            tied_head=bool(values.get("tie_word_embeddings", False)),
            rope_factors=_rope_factors(rope, theta, head_dim),
            bos_token_id=values.get("bos_token_id"),
            eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        )
    except KeyError as error:
        raise ModelError(f"config.json lacks {error}") from None


def _rope_factors(scaling: Mapping[str, Any], theta: float, head_dim: int) -> tuple[float, ...] | None:
    """Divisors of the rotary frequencies for a ``rope_scaling`` entry."""
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return (float(scaling["factor"]),) * (head_dim // 2)
    if kind != "llama3":
        raise ModelError(f"rotary scaling {kind!r} is not supported, expected default, linear or llama3")
    # Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those
    # between blended by where they lie.
    factor, original = scaling["factor"], scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    factors = []
    for i in range(head_dim // 2):
        turns = original / (2 * math.pi * theta ** (2 * i / head_dim))
        blend = min(max((turns - low) / (high - low), 0.0), 1.0)
        factors.append(1.0 / (blend + (1.0 - blend) / factor))
    return tuple(factors)
