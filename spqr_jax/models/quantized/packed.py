"""Codes packed into 32-bit words, inputs first: GPTQ, AWQ, and AutoRound, which writes either.

GPTQ (AutoGPTQ's `nn_modules/qlinear/qlinear_cuda.py`, GPTQModel's `utils/model_dequant.py`):
`qweight` int32 [in * bits / 32, out] and `qzeros` int32 [groups, out * bits / 32], codes
one after the other from the lowest bit, one of 3 bits may go on in the next word; `scales`
[groups, out]; `g_idx` int32 [in], the group of each input. The format `gptq` holds each
zero less one, `gptq_v2` as it is.

AWQ, version `gemm` (AutoAWQ's `modules/linear/gemm.py`, `utils/packing_utils.py`): `qweight`
int32 [in, out / 8], `qzeros` int32 [groups, out / 8], `scales` [groups, out]; of eight
outputs in a word, the lowest bits are number 0, then 2, 4, 6, 1, 3, 5, 7.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from spqr_jax.files import Entries
from spqr_jax.files.safetensors_file import SafetensorsReader
from spqr_jax.models.quantized.dequantize import Grid, dequantize, unpack
from spqr_jax.models.quantized.method import Description
from spqr_jax.models.quantized.module import FLOATS, WORDS, Module, QuantizedModules, QuantizedWeight, find_modules

PARTS = ("qweight", "qzeros", "scales", "g_idx")
GPTQ_BITS = (2, 3, 4, 8)
GROUP_SIZE = 128
"""Where the configuration names none: AutoGPTQ's, AutoAWQ's and transformers' default."""

_AWQ_PLACES = np.array([0, 4, 1, 5, 2, 6, 3, 7])
"""Output of a word -> its place among the word's fields, from the lowest bits."""

_ROUNDS = {"gptq": "gptq", "auto-gptq": "gptq", "auto": "gptq", "awq": "awq", "auto-awq": "awq",
           "gptqmodel": "gptq-v2", "exllamav2": "gptq-v2", "": "gptq-v2"}  # fmt: skip
"""AutoRound's packing formats, after `auto_round:` -> layout (its `inference/backend.py`, `convert_model.py`)."""


def find_gptq(reader: SafetensorsReader, description: Description, inputs_first: bool) -> QuantizedModules:
    """Modules that GPTQ quantized.

    Args:
      reader: of all tensors.
      description: of the method.
      inputs_first: the model's dense weights are [in, out], as GPT-2's.

    Raises:
      ModelError: another format than `gptq` and `gptq_v2`, or parts that are missing or do not fit.
    """
    entries = description.entries
    if entries.maybe_flag("is_marlin_format"):
        raise description.refused("format marlin")
    layout = (entries.maybe_text("checkpoint_format") or entries.text("format", "gptq")).lower().replace("_", "-")
    if layout not in ("gptq", "gptq-v2"):
        raise description.refused(f"format {layout}")
    return _find(reader, description, partial(_gptq_weight, layout == "gptq", inputs_first))


def find_awq(reader: SafetensorsReader, description: Description, inputs_first: bool) -> QuantizedModules:
    """Modules that AWQ quantized.

    Raises:
      ModelError: another version than `gemm`, or parts that are missing or do not fit.
    """
    entries = description.entries
    version = (entries.maybe_text("version") or entries.text("format", "gemm")).lower()
    if version != "gemm" or entries.maybe_text("backend") == "llm-awq":
        raise description.refused(f"version {version if version != 'gemm' else 'llm-awq'}")
    return _find(reader, description, _awq_weight)


def find_auto_round(reader: SafetensorsReader, description: Description, inputs_first: bool) -> QuantizedModules:
    """Modules that AutoRound quantized and packed as GPTQ or AWQ.

    Raises:
      ModelError: another packing, or parts that are missing or do not fit.
    """
    entries = description.entries
    packing = entries.maybe_text("packing_format") or entries.text("backend", "auto")
    layout = _ROUNDS.get(packing.lower().replace("_", "-").removeprefix("auto-round").lstrip(":").partition(":")[0])
    if layout is None:
        raise description.refused(f"packing {packing}")
    if (kind := entries.text("data_type", "int")) != "int" or entries.integer("act_bits", 16) < 16:
        raise description.refused(f"data type {kind}" if kind != "int" else "quantized activations")
    if turned := [name for name in ("rotation_config", "hadamard_config", "transform_config") if entries.raw(name)]:
        raise description.refused(turned[0])
    if layout == "awq":
        return _find(reader, description, _awq_weight)
    return _find(reader, description, partial(_gptq_weight, layout == "gptq", inputs_first))


def _find(reader: SafetensorsReader, description: Description, weight: Any) -> QuantizedModules:
    modules = find_modules(reader, description.method, PARTS, PARTS)
    return modules, {name: weight(module, description.entries) for name, module in modules.items()}


# ---- GPTQ --------------------------------------------------------------------------------------


def _gptq_weight(less_one: bool, inputs_first: bool, module: Module, entries: Entries) -> QuantizedWeight:
    words, outputs = module.matrix("qweight", "packed codes, (inputs in 32-bit words, outputs)", WORDS)
    groups, zero_words = module.matrix("qzeros", "packed zero points, (groups, outputs in 32-bit words)", WORDS)
    module.check("scales", (groups, outputs), FLOATS)
    bits = zero_words * 32 // outputs
    if zero_words * 32 != outputs * bits or bits not in GPTQ_BITS or words * 32 % bits:
        raise module.unfit("qzeros", f"({groups}, words for {outputs} codes of {_listed(GPTQ_BITS)} bits)")
    inputs = words * 32 // bits
    in_order = bool(entries.maybe_flag("desc_act"))
    if "g_idx" in module:
        module.check("g_idx", (inputs,), ("I32", "I64"))
    elif in_order and groups > 1:
        raise module.problem(f"lacks {module.name}.g_idx (the group of each input), which desc_act requires")
    size, fits = _group_size(module, entries, inputs, groups)
    shape = (outputs, inputs)

    def read(dtype: Any) -> np.ndarray:
        codes = module.read("qweight")
        zeros = _plus_one(module.read("qzeros"), bits) if less_one else unpack(module.read("qzeros"), bits)
        columns = module.groups_of_inputs("g_idx", inputs, size, groups, neighbours=not in_order)
        grid = Grid(module.read("scales").T, 1, columns, zeros.T)
        weight = dequantize(lambda first, last: unpack(codes[:, first:last].T, bits), grid, shape, dtype)
        return np.ascontiguousarray(weight.T) if inputs_first else weight

    described = fits and bits == entries.integer("bits", bits)
    return QuantizedWeight(shape[::-1] if inputs_first else shape, read, _form(bits, size, groups), described)


def _plus_one(words: np.ndarray, bits: int) -> np.ndarray:
    """Zeros out of their words, each plus one. It is added to the whole word, since that is how one was taken off: a
    zero of 0 has borrowed from its neighbour (GPTQModel's `convert_gptq_v1_to_v2_format_module`)."""
    if 32 % bits:
        return (unpack(words, bits) + 1) & ((1 << bits) - 1)
    ones = sum(1 << place for place in range(0, 32, bits))
    return unpack(words.view(np.uint32) + np.uint32(ones), bits)


def _group_size(module: Module, entries: Entries, inputs: int, groups: int) -> tuple[int, bool]:
    """Inputs that share scales, and whether the configuration has the same."""
    asked = entries.maybe_integer("group_size", least=-1)
    asked = entries.maybe_integer("q_group_size", least=-1) if asked is None else asked
    if asked is None:
        asked = GROUP_SIZE if -(-inputs // GROUP_SIZE) == groups else inputs // groups
    size = inputs if asked in (-1, 0) else asked
    if -(-inputs // size) == groups:
        return size, True
    if inputs % groups and "g_idx" not in module:
        raise module.unfit("scales", f"({-(-inputs // size)}, outputs) for groups of {size} of its {inputs} inputs")
    return -(-inputs // groups), False


# ---- AWQ ---------------------------------------------------------------------------------------


def _awq_weight(module: Module, entries: Entries) -> QuantizedWeight:
    inputs, words = module.matrix("qweight", "packed codes, (inputs, outputs in words of 8 codes)", WORDS)
    groups, outputs = module.matrix("scales", "its scales, (groups, outputs)", FLOATS)
    module.check("qzeros", (groups, words), WORDS)
    if outputs != 8 * words:
        raise module.unfit("scales", f"({groups}, {8 * words}), since each word of qweight holds 8 codes of 4 bits")
    if inputs % groups:
        raise module.unfit("scales", f"a number of groups that divides its {inputs} inputs")
    size, fits = _group_size(module, entries, inputs, groups)
    bits = entries.integer("bits", entries.integer("w_bit", 4))
    shape = (outputs, inputs)

    def read(dtype: Any) -> np.ndarray:
        codes, zeros = module.read("qweight"), _in_order(unpack(module.read("qzeros"), 4))
        grid = Grid(module.read("scales").T, 1, np.arange(inputs) // size, zeros.T)
        return dequantize(
            lambda first, last: _in_order(unpack(codes[:, first // 8 : -(-last // 8)], 4)).T, grid, shape, dtype
        )

    return QuantizedWeight(shape, read, _form(4, size, groups), fits and bits == 4)


def _in_order(fields: np.ndarray) -> np.ndarray:
    """Fields of words as outputs, along the last axis."""
    return fields.reshape(len(fields), -1, 8)[:, :, _AWQ_PLACES].reshape(fields.shape)


def _form(bits: int, size: int, groups: int) -> str:
    return f"{bits} bits, " + ("one group per row" if groups == 1 else f"groups of {size}")


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers[:-1])) + f" or {numbers[-1]}"
