"""What a family is, and what the mappings of most of them share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from spqr_jax.errors import ModelError
from spqr_jax.models.config import Activation, DecoderConfig
from spqr_jax.models.names import Table

Values = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class GGUFNames:
    """A family in GGUF files.

    Attributes:
      architecture: ``general.architecture``, and the prefix of the header's keys.
      config: ``config(header)`` maps a header.
      table: names of the tensors.
    """

    architecture: str
    config: Callable[[Any], DecoderConfig]
    table: Table


@dataclasses.dataclass(frozen=True)
class Family:
    """Models whose files have one form.

    Attributes:
      name: the ``model_type`` of a ``config.json``.
      architecture: the class that transformers has for it.
      from_hf: maps a ``config.json``; raises ModelError on an option that we do not run.
      to_hf: back again: the entries that make transformers build the same model.
      table: names of the tensors in Hugging Face directories.
      gguf: the family in GGUF files, where it has one.
      other_names: further values of ``model_type``.
      starts_with_bos: made for texts that begin with the BOS token, and of no use without it.
    """

    name: str
    architecture: str
    from_hf: Callable[[Values], DecoderConfig]
    to_hf: Callable[[DecoderConfig], dict[str, Any]]
    table: Table
    gguf: tuple[GGUFNames, ...] = ()
    other_names: tuple[str, ...] = ()
    starts_with_bos: bool = False


# ---- config.json --------------------------------------------------------------------------------

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
_HF_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}


def activation(name: str) -> Activation:
    """Ours for a name of transformers'.

    Raises:
      ModelError: one that we do not have.
    """
    if name not in _ACTIVATIONS:
        raise ModelError(f"activation {name!r} is not supported, expected one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def refuse(values: Values, expected: Mapping[str, Any]) -> None:
    """Checks entries that we run with one value only; None and absent are fine.

    Raises:
      ModelError: names the first that has another value.
    """
    for name, value in expected.items():
        if values.get(name) not in (None, value):
            raise ModelError(f"a model with {name} = {values[name]!r} is not supported, expected {value!r}")


def common_from_hf(values: Values, family: str, **own: Any) -> DecoderConfig:
    """A configuration from the entries that most families name alike; `own` replaces and adds to them.

    Raises:
      ModelError: an entry is missing, or is one that we do not run.
    """
    try:
        heads, hidden = values["num_attention_heads"], values["hidden_size"]
        head_dim = own.get("head_dim") or values.get("head_dim") or hidden // heads
        eos = values.get("eos_token_id")
        base: dict[str, Any] = {
            "family": family,
            "vocab_size": values["vocab_size"],
            "hidden_size": hidden,
            "num_layers": values["num_hidden_layers"],
            "num_heads": heads,
            "num_kv_heads": values.get("num_key_value_heads") or heads,
            "head_dim": head_dim,
            "max_positions": values.get("max_position_embeddings", 2048),
            "tied_head": bool(values.get("tie_word_embeddings", False)),
            "bos_token_id": values.get("bos_token_id"),
            "eos_token_ids": tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        }
        if "norm_eps" not in own:
            base["norm_eps"] = float(values.get("rms_norm_eps", 1e-6))
        if "intermediate_size" not in own:
            base["intermediate_size"] = values["intermediate_size"]
        if "rope_theta" not in own:
            base |= rope(values, head_dim)
        return DecoderConfig(**(base | own))
    except KeyError as error:
        raise ModelError(f"config.json lacks {error}") from None


def common_to_hf(config: DecoderConfig, architecture: str, **own: Any) -> dict[str, Any]:
    """The entries of a ``config.json`` that most families name alike; `own` replaces and adds, with None leaves out."""
    values: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": _HF_ACTIVATIONS[config.activation],
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tied_head,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids) if len(config.eos_token_ids) != 1 else config.eos_token_ids[0],
        **rope_to_hf(config),
    }
    return {name: value for name, value in (values | own).items() if value is not None}


# ---- rotary embedding ---------------------------------------------------------------------------


def rope(values: Values, head_dim: int, default_theta: float = 10000.0) -> dict[str, Any]:
    """The rotary entries of a configuration, from ``rope_theta``, ``rope_scaling`` or ``rope_parameters``.

    Raises:
      ModelError: a way of scaling that we do not have.
    """
    entries = {**(values.get("rope_scaling") or {}), **(values.get("rope_parameters") or {})}
    theta = float(values.get("rope_theta") or entries.get("rope_theta") or default_theta)
    partial = entries.get("partial_rotary_factor") or values.get("partial_rotary_factor") or 1.0
    rotated = int(head_dim * partial)
    found: dict[str, Any] = {"rope_theta": theta, "rope_dim": None if rotated == head_dim else rotated}
    kind = entries.get("rope_type", entries.get("type", "default"))
    if kind == "linear":
        found["rope_factors"] = (float(entries["factor"]),) * (rotated // 2)
    elif kind == "llama3":
        found["rope_factors"] = _llama3_factors(entries, theta, rotated)
    elif kind in ("longrope", "su"):
        found |= _long_rope(values, entries, rotated)
    elif kind != "default":
        raise ModelError(f"rotary scaling {kind!r} is not supported, expected default, linear, llama3 or longrope")
    return found


def _llama3_factors(entries: Values, theta: float, rotated: int) -> tuple[float, ...]:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    factor, original = entries["factor"], entries["original_max_position_embeddings"]
    low, high = entries["low_freq_factor"], entries["high_freq_factor"]
    factors = []
    for i in range(rotated // 2):
        turns = original / (2 * math.pi * theta ** (2 * i / rotated))
        blend = min(max((turns - low) / (high - low), 0.0), 1.0)
        factors.append(1.0 / (blend + (1.0 - blend) / factor))
    return tuple(factors)


def _long_rope(values: Values, entries: Values, rotated: int) -> dict[str, Any]:
    """LongRoPE (arXiv 2402.13753) as it is for texts up to the original context, which becomes the model's.

    Beyond it other factors apply to the whole text at once, keys that are cached already included.
    """
    longest = values.get("max_position_embeddings", 2048)
    original = entries.get("original_max_position_embeddings") or values.get("original_max_position_embeddings")
    original = original or longest
    if len(entries["short_factor"]) != rotated // 2:
        raise ModelError(f"expected {rotated // 2} short rotary factors, got {len(entries['short_factor'])}")
    scale = entries.get("attention_factor")
    if scale is None:
        stretch = entries.get("factor") or longest / original
        scale = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
    return {
        "rope_factors": tuple(float(factor) for factor in entries["short_factor"]),
        "rope_scale": float(scale),
        "max_positions": min(original, longest),
    }


def rope_entries(theta: float | None, factors: tuple[float, ...] | None, scale: float, context: int) -> dict[str, Any]:
    """One ``rope_parameters``: any factors can be said as LongRoPE's."""
    if factors is None and scale == 1.0:
        return {"rope_type": "default", "rope_theta": theta}
    own = list(factors) if factors is not None else []
    return {
        "rope_type": "longrope",
        "rope_theta": theta,
        "short_factor": own,
        "long_factor": own,
        "factor": 1.0,
        "attention_factor": scale,
        "original_max_position_embeddings": context,
    }


def rope_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The rotary entries of a ``config.json``."""
    if config.rope_theta is None:
        return {}
    entries = rope_entries(config.rope_theta, config.rope_factors, config.rope_scale, config.max_positions)
    if config.rope_dim is not None:
        entries["partial_rotary_factor"] = config.rope_dim / config.head_dim
    return {"rope_theta": config.rope_theta, "rope_parameters": entries}


# ---- windows ------------------------------------------------------------------------------------


def window(values: Values, local: Callable[[int], bool]) -> dict[str, Any]:
    """The sliding window of a configuration.

    Args:
      values: ``config.json``; its ``layer_types`` decide if they are there.
      local: whether the block at an index is local, if they are not.
    """
    size = values.get("sliding_window")
    if not size or size >= values.get("max_position_embeddings", 2048):
        return {}
    count = values["num_hidden_layers"]
    types = values.get("layer_types")
    chosen = [types[i] == "sliding_attention" if types else local(i) for i in range(count)]
    layers = tuple(i for i in range(count) if chosen[i])
    return {"sliding_window": size, "local_layers": layers} if layers else {}


def layer_types(config: DecoderConfig) -> list[str]:
    """The entry of a ``config.json`` that says which blocks are local."""
    return ["sliding_attention" if kind.local else "full_attention" for kind in config.kinds]


# ---- GGUF ---------------------------------------------------------------------------------------


def common_from_gguf(header: Any, family: str, **own: Any) -> DecoderConfig:
    """A configuration from a GGUF header; `own` replaces and adds to what all architectures name alike.

    Args:
      header: a `spqr_jax.models.gguf.GGUFFile`.

    Raises:
      ModelError: entries are missing, or a way of scaling that we do not have.
    """
    arch, shapes = header.get("general.architecture"), header.shapes()
    needed = {
        "hidden_size": "embedding_length",
        "intermediate_size": "feed_forward_length",
        "num_layers": "block_count",
        "num_heads": "attention.head_count",
        "max_positions": "context_length",
    }
    found = {ours: header.get(f"{arch}.{key}") for ours, key in needed.items() if ours not in own}
    epsilon = "attention.layer_norm_epsilon" if own.get("norm") == "layer" else "attention.layer_norm_rms_epsilon"
    found["norm_eps"] = header.get(f"{arch}.{epsilon}")
    missing = [name for name, value in found.items() if value is None]
    if missing or "token_embd.weight" not in shapes:
        raise ModelError(f"{header.label}: the GGUF header lacks {', '.join(missing) or 'token_embd.weight'}")
    heads = own.get("num_heads") or found["num_heads"]
    head_dim = header.get(f"{arch}.attention.key_length") or (own.get("hidden_size") or found["hidden_size"]) // heads
    rotated = header.get(f"{arch}.rope.dimension_count") or head_dim
    ends = [header.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot")]  # of a text, of a turn
    base: dict[str, Any] = {
        **found,
        "family": family,
        "vocab_size": shapes["token_embd.weight"][0],
        "num_kv_heads": header.get(f"{arch}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "tied_head": "output.weight" not in shapes,
        "bos_token_id": header.get("tokenizer.ggml.bos_token_id"),
        "eos_token_ids": tuple(dict.fromkeys(end for end in ends if end is not None)),
    }
    if "rope_theta" not in own:
        base |= {
            "rope_theta": float(header.get(f"{arch}.rope.freq_base", 10000.0)),
            "rope_dim": None if rotated == head_dim else rotated,
            "rope_factors": _gguf_rope_factors(header, arch, rotated),
        }
    return DecoderConfig(**(base | own))


def _gguf_rope_factors(header: Any, arch: str, rotated: int) -> tuple[float, ...] | None:
    if "rope_freqs.weight" in header.shapes():
        return tuple(float(factor) for factor in header.read("rope_freqs.weight", "float32"))
    scaling = header.get(f"{arch}.rope.scaling.type", "none")
    if scaling == "linear":
        return (float(header.get(f"{arch}.rope.scaling.factor", 1.0)),) * (rotated // 2)
    if scaling != "none":
        raise ModelError(f"{header.label}: rotary scaling {scaling!r} is not supported, expected none or linear")
    return None


def gguf_window(header: Any, local: Callable[[int], bool]) -> dict[str, Any]:
    """The sliding window that a GGUF header names, of the blocks that `local` picks."""
    arch = header.get("general.architecture")
    size, count = header.get(f"{arch}.attention.sliding_window"), header.get(f"{arch}.block_count", 0)
    if not size or size >= header.get(f"{arch}.context_length", 0):
        return {}
    return {"sliding_window": size, "local_layers": tuple(i for i in range(count) if local(i))}
