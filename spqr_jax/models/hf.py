"""Hugging Face model directories: config.json and safetensors, sharded or not; dense models read and written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from spqr_jax.errors import ModelError
from spqr_jax.models.config import DecoderConfig
from spqr_jax.models.families import FAMILIES, family_of_hf
from spqr_jax.models.names import TensorSource
from spqr_jax.models.stops import with_named_tokens
from spqr_jax.models.weights import OUTER_NAMES, Decoder


class SafetensorsReader:
    """The safetensors files of one directory, each opened anew for every tensor: of none anything stays mapped."""

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
        self._files: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for name in files:
            with _open_safetensors(directory / name) as file:
                for tensor in file.keys():  # noqa: SIM118 (not a dict)
                    if tensor in self._files:
                        raise ModelError(f"{directory}: tensor {tensor} stands in more than one file")
                    self._files[tensor] = directory / name
                    self._shapes[tensor] = tuple(file.get_slice(tensor).get_shape())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def read(self, name: str, dtype: Any = None) -> np.ndarray:
        """One tensor, an array of its own; `dtype` None for the file's."""
        with _open_safetensors(self._files[name]) as file:
            value = np.asarray(file.get_tensor(name))
        return value if dtype is None else value.astype(dtype, copy=False)


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
    """A lazily read model from a Hugging Face directory, weights in `dtype`.

    Raises:
      ModelError: files that are missing or damaged, or a model that we do not run.
    """
    values = read_json(directory / "config.json")
    family = family_of_hf(values)
    config = with_named_tokens(family.from_hf(values), directory)
    return TensorSource(SafetensorsReader(directory), family.table, config, dtype)


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
