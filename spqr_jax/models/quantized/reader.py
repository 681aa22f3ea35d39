"""A model directory's tensors as a dense model has them, whether they were quantized or not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from spqr_jax.errors import ModelError
from spqr_jax.files import Entries
from spqr_jax.files.safetensors_file import SafetensorsReader
from spqr_jax.models.quantized import compressed, packed, scaled
from spqr_jax.models.quantized.method import Description, read_description
from spqr_jax.models.quantized.module import FLOAT8, FLOATS, Module, QuantizedModules, QuantizedWeight, tensors_of

_OF_ACTIVATIONS = frozenset(
    {"input_scale", "activation_scale", "act_scale", "output_scale", "q_scale", "k_scale", "v_scale", "kv_scale",
     "prob_output_scale", "input_scale_ub", "input_zero_point", "output_zero_point", "k_zero_point", "v_zero_point"}
)  # fmt: skip
"""Last parts of the names of tensors that say how activations are quantized, which they are not here."""

_PARTS = frozenset({*scaled.PARTS, *packed.PARTS, *compressed.PARTS} - {"weight"})
"""Last parts of the names of tensors that only quantized modules have."""

_SHOWN = 3


_METHODS: dict[str, Callable[[SafetensorsReader, Description, bool], QuantizedModules]] = {
    "fp8": scaled.find_fp8,
    "fbgemm-fp8": scaled.find_fp8,
    "modelopt": scaled.find_fp8,
    "compressed-tensors": compressed.find_compressed,
    "gptq": packed.find_gptq,
    "awq": packed.find_awq,
    "auto-round": packed.find_auto_round,
    "bitsandbytes": lambda reader, description, inputs_first: ({}, {}),  # saved again after it was dequantized
}
"""`quant_method` -> what finds its modules: in the tensors, which are [in, out] where `inputs_first`."""


class DenseReader:
    """A `TensorReader` over a directory: quantized modules are dense tensors `<module>.weight`.

    Attributes:
      label: the directory.
      quantized_by: the method in words, such as "gptq, 4 bits, groups of 128"; None for a dense model.
      note: what the user should know of the tensors; None for nothing.
      spare: tensors that the model may lack.
    """

    def __init__(
        self,
        reader: SafetensorsReader,
        weights: dict[str, QuantizedWeight],
        hidden: frozenset[str],
        quantized_by: str | None,
        note: str | None,
        spare: frozenset[str] = frozenset(),
    ) -> None:
        self.label, self.quantized_by, self.note, self.spare = reader.label, quantized_by, note, spare
        self._reader, self._weights = reader, weights
        self._shapes = {name: shape for name, shape in reader.shapes().items() if name not in hidden}
        self._shapes |= {name: weight.shape for name, weight in weights.items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def files(self) -> list[Path]:
        """The files that tensors are read from, and those that say how they are quantized."""
        directory = Path(self.label)
        return [*self._reader.files(), *directory.glob("config.json"), *directory.glob("*quant*config.json")]

    def read(self, name: str, dtype: Any) -> np.ndarray:
        if name in self._weights:
            return self._weights[name].read(dtype)
        return self._reader.read(name, dtype)


def open_tensors(directory: Path, config: Entries) -> DenseReader:
    """The tensors of a Hugging Face directory, whatever quantized them; a weight is dequantized when it is read.

    Args:
      directory: with safetensors.
      config: config.json.

    Raises:
      ModelError: files that are missing or damaged, a method that is not read, tensors that do not fit it.
    """
    description = read_description(directory, config)
    if description is not None and description.key not in _METHODS:
        raise description.refused()
    reader = SafetensorsReader(directory, config.maybe_text("transformers_weights"))
    if description is None:
        return _open_undescribed(reader)
    if description.key == "bitsandbytes" and not set(reader.kinds().values()) <= set(FLOATS):
        raise description.refused()
    inputs_first = config.maybe_text("model_type") == "gpt2"  # its Conv1D, whose transposed weight GPTQ packs
    modules, weights = _METHODS[description.key](reader, description, inputs_first)
    if not modules:
        note = (
            f"{description.entries.label} names the quantization {description.method}, but no tensor is in that format"
        )
        note += ": the weights are read unchanged"
        return _dense(reader, description, note)
    return _quantized(reader, description, modules, weights)


def _quantized(
    reader: SafetensorsReader,
    description: Description,
    modules: dict[str, Module],
    weights: dict[str, QuantizedWeight],
) -> DenseReader:
    hidden = tensors_of(modules, _PARTS | {"weight"}) | _of_activations(reader)
    names = {f"{name}.weight": weight for name, weight in weights.items()}
    if doubled := [name for name in names if name in reader.shapes() and name not in hidden]:
        raise modules[doubled[0].removesuffix(".weight")].problem(f"also has the dense weight {doubled[0]}")
    quantized_by = f"{description.method}, {_forms(list(weights.values()))}"
    note = (
        f"the weights are already quantized ({quantized_by}): they are dequantized, but the lost precision stays lost"
    )
    other = [name for name, weight in weights.items() if not weight.as_described]
    if other and not any(description.entries.raw(name) for name in ("dynamic", "extra_config")):
        note += (
            f"; {Path(description.entries.label).name} describes {len(other)} of them differently "
            f"({', '.join(other[:_SHOWN])}{', ...' if len(other) > _SHOWN else ''}): the tensors are used as they are"
        )
    _refuse_leftovers(reader, hidden, description)
    return DenseReader(reader, names, hidden, quantized_by, _with_adapters(reader, note), _zero_biases(reader, modules))


def _open_undescribed(reader: SafetensorsReader) -> DenseReader:
    """A model that says nothing of a quantization; its tensors may."""
    if any(name.endswith(scaled.SCALES) for name in reader.shapes()) and set(reader.kinds().values()) & set(FLOAT8):
        description = Description("fp8", Entries({}, f"{reader.label}/config.json"))
        return _quantized(reader, description, *scaled.find_fp8(reader, description, False))
    return _dense(reader)


def _dense(reader: SafetensorsReader, description: Description | None = None, note: str | None = None) -> DenseReader:
    """All tensors as they are; float8 without scales is said."""
    hidden = frozenset() if description is None else _of_activations(reader)
    _refuse_leftovers(reader, hidden, description)
    float8 = [name for name, kind in reader.kinds().items() if kind in FLOAT8]
    if float8:
        said = f"{len(float8)} tensors are float8 without scales, such as {float8[0]}: their float8 values are "
        note = "; ".join(filter(None, (note, said + "used as the weights, with the precision they have")))
    return DenseReader(reader, {}, hidden, "float8 without scales" if float8 else None, _with_adapters(reader, note))


def _refuse_leftovers(reader: SafetensorsReader, hidden: frozenset[str], description: Description | None) -> None:
    """Parts of quantized modules and matrices of integers, of which the description says nothing, are refused."""
    shapes = reader.shapes()
    for name, kind in reader.kinds().items():
        integers = name.endswith(".weight") and kind[0] in "IU" and len(shapes[name]) > 1
        if name in hidden or not (integers or name.rpartition(".")[2] in _PARTS):
            continue
        told = (
            "no quantization method is named (config.json lacks quantization_config)"
            if description is None
            else f"not in the way that {description.entries.label} describes ({description.method})"
        )
        raise ModelError(
            f"{reader.label}: {name}, of type {kind}, belongs to a model that is already quantized, but {told}: fetch "
            "all files of one model again, or give the original dense model"
        )


def _of_activations(reader: SafetensorsReader) -> frozenset[str]:
    return frozenset(name for name in reader.shapes() if name.rpartition(".")[2] in _OF_ACTIVATIONS)


def _zero_biases(reader: SafetensorsReader, modules: dict[str, Module]) -> frozenset[str]:
    """Biases of zeros, which AutoGPTQ gives to modules that had none; vLLM skips them, too (`models/llama.py`)."""
    biases = [f"{name}.bias" for name in modules if f"{name}.bias" in reader.shapes()]
    return frozenset(name for name in biases if not reader.read(name).any())


def _with_adapters(reader: SafetensorsReader, note: str | None) -> str | None:
    if not reader.adapters:
        return note
    said = f"the LoRA adapter {reader.adapters[0]} next to the model is not applied"
    return f"{said}; {note}" if note else said


def _forms(weights: list[QuantizedWeight]) -> str:
    """All forms, the most frequent first, shortened."""
    counts: dict[str, int] = {}
    for weight in weights:
        counts[weight.form] = counts.get(weight.form, 0) + 1
    forms = sorted(counts, key=lambda form: -counts[form])
    return " or ".join(forms[:_SHOWN]) + (" or others" if len(forms) > _SHOWN else "")
