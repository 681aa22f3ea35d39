"""Hugging Face model directories: config.json and safetensors, sharded or not; dense models read and written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from spqr_jax.errors import ModelError
from spqr_jax.files import read_object
from spqr_jax.files.safetensors_file import refuse_adapter
from spqr_jax.models.config import DecoderConfig
from spqr_jax.models.families import FAMILIES, family_of_hf
from spqr_jax.models.names import TensorSource
from spqr_jax.models.quantized import open_tensors
from spqr_jax.models.weights import OUTER_NAMES, Decoder


def read_json(path: Path) -> Any:
    """Reads a JSON file, with an error that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from None


def open_hf(directory: Path, dtype: Any) -> TensorSource:
    """A lazily read model from a Hugging Face directory, weights in `dtype`.

    Raises:
      ModelError: files that are missing or damaged, or a model that we do not run.
    """
    refuse_adapter(directory)
    values = read_json(directory / "config.json")
    tensors = open_tensors(directory, read_object(directory / "config.json"))
    generation = directory / "generation_config.json"
    if generation.is_file():  # it names the tokens that end a turn of a chat, which config.json may not
        values |= {"eos_token_id": read_json(generation).get("eos_token_id", values.get("eos_token_id"))}
    family = family_of_hf(values)
    return TensorSource(tensors, family.table, family.from_hf(values), dtype)


# ---- writing ----------------------------------------------------------------------------


def hf_config(config: DecoderConfig) -> dict[str, Any]:
    """The entries of a config.json from which transformers builds the model."""
    return FAMILIES[config.family].to_hf(config)


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
