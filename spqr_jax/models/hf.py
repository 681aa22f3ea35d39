"""Hugging Face model directories: config.json and safetensors, sharded or not; dense models read and written."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from spqr_jax.errors import ModelError
from spqr_jax.files import Entries, read_object
from spqr_jax.files.safetensors_file import refuse_adapter
from spqr_jax.models.config import DecoderConfig
from spqr_jax.models.families import FAMILIES, family_of_hf
from spqr_jax.models.names import TensorSource
from spqr_jax.models.quantized import open_tensors
from spqr_jax.models.stops import with_named_tokens
from spqr_jax.models.weights import OUTER_NAMES, Decoder


def open_hf(directory: Path, dtype: Any) -> TensorSource:
    """A lazily read model from a Hugging Face directory, weights in `dtype`.

    Raises:
      ModelError: files that are missing or damaged, or a model that we do not run.
    """
    refuse_adapter(directory)
    values = read_object(directory / "config.json")
    tensors = open_tensors(directory, values)
    family = family_of_hf(values)
    config = with_named_tokens(family.from_hf(values), directory)
    return TensorSource(tensors, family.table, config, dtype)


# ---- writing ----------------------------------------------------------------------------


def hf_config(config: DecoderConfig) -> dict[str, Any]:
    """The entries of a config.json from which transformers builds the model."""
    return FAMILIES[config.family].to_hf(config)


_OF_QUANTIZED_WEIGHTS = ("quantization_config", "compression_config")


def exported_config(config: DecoderConfig, dtype: Any, origin: Entries | None = None) -> dict[str, Any]:
    """The entries of a config.json for a model that is written again.

    They keep the form of the file that the model was read from: the same names, the same
    rotary entries, whatever else other programs look for. Without such a file, or where
    it describes another model (a part of one that also sees, say), they are made anew.

    Args:
      config: of the model.
      dtype: of the weights as they are written.
      origin: the config.json that the model came with, or None.
    """
    if origin is None or not _describes(origin, config):
        return hf_config(config) | {"dtype": str(np.dtype(dtype))}
    values = {name: value for name, value in origin.to_dict().items() if name not in _OF_QUANTIZED_WEIGHTS}
    if origin.raw("tie_word_embeddings") is not None or config.tied_head != FAMILIES[config.family].ties(origin):
        values["tie_word_embeddings"] = config.tied_head
    return values | {"torch_dtype" if "torch_dtype" in values else "dtype": str(np.dtype(dtype))}


def _describes(origin: Entries, config: DecoderConfig) -> bool:
    """Whether a config.json makes the same model; of token ids and tying other files tell, too."""
    if origin.raw("model_type") != config.family:
        return False
    try:
        read = FAMILIES[config.family].from_hf(origin)
    except ModelError:
        return False
    other = ("bos_token_id", "eos_token_ids", "tied_head")
    return dataclasses.replace(read, **{name: getattr(config, name) for name in other}) == config


def hf_tensors(model: Decoder) -> dict[str, np.ndarray]:
    """A dense model's weights under the names, and in the order of numbers, that its family has in transformers."""
    weights = {name: getattr(model.outer, name) for name in OUTER_NAMES}
    for index, block in enumerate(model.layers):
        weights |= {f"layers.{index}.{name}": weight for name, weight in block.items()}
    rows = FAMILIES[model.config.family].table.expand(model.config)
    return {
        tensor: np.ascontiguousarray(row.packing.join([np.asarray(weights[p]) for p in row.paths], model.config))
        for tensor, row in rows.items()
    }


def write_hf(directory: Path, model: Decoder) -> None:
    """Writes config.json and model.safetensors of a dense model into a new directory."""
    from safetensors.numpy import save_file

    config = hf_config(model.config)
    directory.mkdir(parents=True)
    save_file(hf_tensors(model), directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
