"""What a family is, and what the mappings of most of them share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from spqr_jax.errors import ModelError
from spqr_jax.files import Entries
from spqr_jax.models.config import MOST_LAYERS, Activation, DecoderConfig
from spqr_jax.models.families.rope import gguf_rope, rope, rope_to_hf
from spqr_jax.models.names import Table


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
      read_config: maps a ``config.json``; raises ModelError on an option that we do not run.
      to_hf: back again: the entries that make transformers build the same model.
      table: names of the tensors in Hugging Face directories.
      gguf: the family in GGUF files, where it has one.
      other_names: further values of ``model_type``.
      starts_with_bos: made for texts that begin with the BOS token, and of no use without it.
      defaults: what transformers' configuration class takes for entries that a ``config.json`` does not name.
    """

    name: str
    architecture: str
    read_config: Callable[[Entries], DecoderConfig]
    to_hf: Callable[[DecoderConfig], dict[str, Any]]
    table: Table
    gguf: tuple[GGUFNames, ...] = ()
    other_names: tuple[str, ...] = ()
    starts_with_bos: bool = False
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def from_hf(self, values: Entries | Mapping[str, Any]) -> DecoderConfig:
        """The configuration that a ``config.json`` describes.

        Args:
          values: its entries; of a plain mapping errors say ``config.json``.

        Raises:
          ModelError: names the file and the entry that is missing, of a wrong type, or an option that we do not run.
        """
        entries = values if isinstance(values, Entries) else Entries(values, "config.json")
        with entries.blamed():
            return self.read_config(entries.changed({}, defaults=self.defaults))

    def ties(self, values: Entries) -> bool:
        """Whether a ``config.json`` ties the output head to the embedding."""
        return values.changed({}, defaults=self.defaults).flag("tie_word_embeddings", False)


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


def activation(values: Entries, key: str, default: str) -> Activation:
    """Ours for the name of transformers' that the entry `key` has.

    Raises:
      ModelError: one that we do not have.
    """
    name = values.text(key, default)
    if name not in _ACTIVATIONS:
        values.refuse(key, f"one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def refuse(values: Entries, expected: Mapping[str, Any]) -> None:
    """Checks entries that we run with one value only; None and absent are fine.

    Raises:
      ModelError: names the first that has another value.
    """
    for name, value in expected.items():
        if name in values and values.raw(name) != value:
            values.refuse(name, f"{value!r}, the only value that is supported")


def common_from_hf(values: Entries, family: str, **special: Any) -> DecoderConfig:
    """A configuration from the entries that most families name alike; `special` replaces and adds to them.

    Raises:
      ModelError: an entry is missing or of a wrong type, or is one that we do not run.
    """
    heads = values.integer("num_attention_heads", least=1)
    hidden = values.integer("hidden_size", least=1)
    head_dim = special.get("head_dim") or values.maybe_integer("head_dim", least=1) or hidden // heads
    base: dict[str, Any] = {
        "family": family,
        "vocab_size": values.integer("vocab_size", least=1),
        "hidden_size": hidden,
        "num_layers": values.integer("num_hidden_layers", least=1, most=MOST_LAYERS),
        "num_heads": heads,
        "num_kv_heads": values.integer("num_key_value_heads", heads, least=1),
        "head_dim": head_dim,
        "max_positions": values.integer("max_position_embeddings", 2048, least=1),
        "tied_head": values.flag("tie_word_embeddings", False),
        "bos_token_id": token_id(values, "bos_token_id"),
        "eos_token_ids": tuple(dict.fromkeys(values.integers("eos_token_id"))),
    }
    if "norm_eps" not in special:
        base["norm_eps"] = values.number("rms_norm_eps", 1e-6, least=0)
    if "intermediate_size" not in special:
        base["intermediate_size"] = values.integer("intermediate_size", least=1)
    if "rope_theta" not in special:
        base |= rope(values, head_dim)
    return DecoderConfig(**(base | special))


def token_id(values: Entries, name: str) -> int | None:
    """A token's id; of a list, the first."""
    return next(iter(values.integers(name)), None)


def common_to_hf(config: DecoderConfig, architecture: str, **special: Any) -> dict[str, Any]:
    """The entries that most families name alike; `special` replaces and adds, with None leaves out."""
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
    return {name: value for name, value in (values | special).items() if value is not None}


# ---- windows ------------------------------------------------------------------------------------


_LOCAL = {"sliding_attention": True, "full_attention": False}


def window(values: Entries, local: Callable[[int], bool]) -> dict[str, Any]:
    """The sliding window of a configuration.

    Args:
      values: ``config.json``; its ``layer_types`` decide if they are there.
      local: whether the block at an index is local, if they are not.
    """
    count, types = values.integer("num_hidden_layers", least=1, most=MOST_LAYERS), values.texts("layer_types")
    if types and (len(types) != count or not set(types) <= set(_LOCAL)):
        values.refuse("layer_types", f"{count} values, each one of {', '.join(_LOCAL)}", types)
    size = values.maybe_integer("sliding_window")
    if not size or size >= values.integer("max_position_embeddings", 2048):
        return {}
    layers = tuple(i for i in range(count) if (_LOCAL[types[i]] if types else local(i)))
    return {"sliding_window": size, "local_layers": layers} if layers else {}


def layer_types(config: DecoderConfig) -> list[str]:
    """The entry of a ``config.json`` that says which blocks are local."""
    return ["sliding_attention" if kind.local else "full_attention" for kind in config.kinds]


# ---- GGUF ---------------------------------------------------------------------------------------


def common_from_gguf(header: Any, family: str, **special: Any) -> DecoderConfig:
    """A configuration from a GGUF header; `special` replaces and adds to what all architectures name alike.

    Of the tokens that begin and end a text `spqr_jax.models.stops` tells.

    Args:
      header: a `spqr_jax.models.gguf.GGUFFile`.

    Raises:
      ModelError: entries that are missing or of a wrong type, or a way of scaling that we do not have.
    """
    keys, shapes = header.entries, header.shapes()
    arch = keys.text("general.architecture")
    if len(embedding := shapes.get("token_embd.weight", ())) != 2:
        raise ModelError(f"{header.label}: token_embd.weight has shape {embedding}, expected [vocab, hidden]")
    layers = keys.integer(f"{arch}.block_count", least=1, most=MOST_LAYERS)
    hidden = keys.integer(f"{arch}.embedding_length", least=1)
    heads = special.get("num_heads") or per_block(header, f"{arch}.attention.head_count", layers)
    head_dim = keys.maybe_integer(f"{arch}.attention.key_length", least=1) or hidden // heads
    if keys.integer(f"{arch}.attention.value_length", head_dim) != head_dim:
        keys.refuse(f"{arch}.attention.value_length", f"the key length, {head_dim}")
    epsilon = "attention.layer_norm_epsilon" if special.get("norm") == "layer" else "attention.layer_norm_rms_epsilon"
    base: dict[str, Any] = {
        "family": family,
        "vocab_size": embedding[0],
        "hidden_size": hidden,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": per_block(header, f"{arch}.attention.head_count_kv", layers, heads),
        "head_dim": head_dim,
        "norm_eps": keys.number(f"{arch}.{epsilon}", least=0),
        "max_positions": keys.integer(f"{arch}.context_length", least=1),
        "tied_head": "output.weight" not in shapes,
    }
    if "intermediate_size" not in special:
        base["intermediate_size"] = per_block(header, f"{arch}.feed_forward_length", layers)
    if "rope_theta" not in special:
        base |= gguf_rope(header, arch, head_dim)
    with keys.blamed():
        return DecoderConfig(**(base | special))


def per_block(header: Any, key: str, layers: int, default: int | None = None) -> int:
    """A size that a header gives once, or for every block; all blocks must agree."""
    keys = header.entries
    if not isinstance(keys.raw(key), (list, np.ndarray)):
        return keys.integer(key, default, least=1)
    values = keys.integers(key, least=1)
    if len(values) != layers or len(set(values)) != 1:
        keys.refuse(key, f"one number, or the same number for each of {layers} blocks", values)
    return values[0]


def gguf_window(header: Any, local: Callable[[int], bool]) -> dict[str, Any]:
    """The sliding window that a GGUF header names, of the blocks that `local` picks."""
    keys = header.entries
    arch = keys.text("general.architecture")
    size = keys.maybe_integer(f"{arch}.attention.sliding_window")
    if not size or size >= keys.integer(f"{arch}.context_length", 0):
        return {}
    count = keys.integer(f"{arch}.block_count", least=1, most=MOST_LAYERS)
    return {"sliding_window": size, "local_layers": tuple(i for i in range(count) if local(i))}
