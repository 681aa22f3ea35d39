"""Hugging Face model directories: config.json and safetensors, sharded or not; dense models read and written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from spqr_jax.errors import ModelError
from spqr_jax.models.config import DecoderConfig, config_from_hf
from spqr_jax.models.decoder import Decoder
from spqr_jax.models.names import Name, TensorSource

_LAYER = r"(?:model\.)?layers\.(\d+)\."

HF_TABLE = (
    Name(r"(?:model\.)?embed_tokens\.weight", "embed_tokens"),
    Name(r"(?:model\.)?norm\.weight", "final_norm"),
    Name(r"lm_head\.weight", "lm_head"),
    Name(_LAYER + r"input_layernorm\.weight", r"layers.\1.attention_norm"),
    Name(_LAYER + r"self_attn\.([qkvo])_proj\.weight", r"layers.\1.\2_proj"),
    Name(_LAYER + r"post_attention_layernorm\.weight", r"layers.\1.mlp_norm"),
    Name(_LAYER + r"mlp\.(gate|up|down)_proj\.weight", r"layers.\1.\2_proj"),
    Name(_LAYER + r"self_attn\.rotary_emb\.inv_freq", None),  # a buffer that old files carry
)


class SafetensorsReader:
    """The safetensors files of one directory, memory-mapped."""

    def __init__(self, directory: Path) -> None:
        self.label = str(directory)
        index = directory / "model.safetensors.index.json"
        if index.is_file():
            files = sorted(set(read_json(index)["weight_map"].values()))
        else:
            files = sorted(path.name for path in directory.glob("*.safetensors"))
        if not files:
            raise ModelError(f"{directory} has no *.safetensors file; other weight formats are not read (no pickles)")
        missing = [name for name in files if not (directory / name).is_file()]
        if missing:
            raise ModelError(f"{directory}: {index.name} names files that are not there: {', '.join(missing)}")
        self._files: dict[str, Any] = {}
        for name in files:
            file = _open_safetensors(directory / name)
            for tensor in file.keys():  # noqa: SIM118 (not a dict)
                if tensor in self._files:
                    raise ModelError(f"{directory}: tensor {tensor} stands in more than one file")
                self._files[tensor] = file

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(file.get_slice(name).get_shape()) for name, file in self._files.items()}

    def read(self, name: str) -> np.ndarray:
        return self._files[name].get_tensor(name)


def _open_safetensors(path: Path) -> Any:
    import safetensors

    try:
        return safetensors.safe_open(path, framework="numpy")
    except Exception as error:  # its own SafetensorError for a bad header, OSError for the rest
        raise ModelError(f"{path} cannot be read as safetensors: {error}") from None


def read_json(path: Path) -> Any:
    """Reads a JSON file, with an error that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from None


def open_hf(directory: Path, dtype: Any) -> TensorSource:
    """A lazily read model from a Hugging Face directory, weights in `dtype`."""
    values = read_json(directory / "config.json")
    generation = directory / "generation_config.json"
    if generation.is_file():  # it names the tokens that end a turn of a chat, which config.json may not
        values |= {"eos_token_id": read_json(generation).get("eos_token_id", values.get("eos_token_id"))}
    config = config_from_hf(values)
    return TensorSource(SafetensorsReader(directory), HF_TABLE, config, dtype)


# ---- writing ----------------------------------------------------------------------------


def hf_config(config: DecoderConfig) -> dict[str, Any]:
    """The entries of a Llama's config.json.

    Raises:
      ModelError: the model scales its rotary frequencies, which a config.json says in ways of its own.
    """
    if config.rope_factors is not None:
        raise ModelError("a model with scaled rotary frequencies cannot be written as a Hugging Face directory")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tied_head,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
    }


def hf_tensors(model: Decoder) -> dict[str, np.ndarray]:
    """A dense model's weights under the names that transformers' Llama gives them."""
    tensors = {"model.embed_tokens.weight": model.outer.embed_tokens, "model.norm.weight": model.outer.final_norm}
    if model.outer.lm_head is not None:
        tensors["lm_head.weight"] = model.outer.lm_head
    for index, block in enumerate(model.layers):
        prefix = f"model.layers.{index}."
        tensors |= {
            prefix + "input_layernorm.weight": block.attention_norm,
            prefix + "post_attention_layernorm.weight": block.mlp_norm,
            **{prefix + f"self_attn.{name}_proj.weight": getattr(block, f"{name}_proj") for name in "qkvo"},
            **{prefix + f"mlp.{name}_proj.weight": getattr(block, f"{name}_proj") for name in ("gate", "up", "down")},
        }
    return {name: np.asarray(value) for name, value in tensors.items()}


def write_hf(directory: Path, model: Decoder) -> None:
    """Writes config.json and model.safetensors of a dense model into a new directory."""
    from safetensors.numpy import save_file

    config = hf_config(model.config)
    directory.mkdir(parents=True)
    save_file(hf_tensors(model), directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
