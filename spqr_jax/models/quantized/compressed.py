"""compressed-tensors, what llm-compressor writes: packed integers, and integers or float8 as they are.

`pack-quantized` (its `compressors/pack_quantized`): `weight_packed` int32 [out, ceil(in * bits
/ 32)], codes one after the other from the lowest bit, each plus half its range; `weight_shape`
[2]; `weight_scale` [out, groups], [out, 1] or one; for asymmetric ones `weight_zero_point`,
packed along the outputs, int32 [ceil(out * bits / 32), groups]; `weight_g_idx` [in], the group
of each input, where groups were made in another order. The others are in `scaled.py`.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from spqr_jax.files import Entries
from spqr_jax.files.safetensors_file import SafetensorsReader
from spqr_jax.models.quantized.dequantize import Grid, dequantize, unpack
from spqr_jax.models.quantized.method import Description
from spqr_jax.models.quantized.module import FLOAT8, WORDS, Module, QuantizedModules, QuantizedWeight, find_modules
from spqr_jax.models.quantized.scaled import SCALE_KINDS, scale_block, scaled_weight

FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
PACKED_BITS = (2, 4, 8)
PARTS = ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")

_INTEGERS = ("I32", "I64")


def find_compressed(reader: SafetensorsReader, description: Description, inputs_first: bool) -> QuantizedModules:
    """Modules in compressed-tensors' formats.

    Raises:
      ModelError: a format, sparsity or transform that is not read, or parts that are missing or do not fit.
    """
    entries = description.entries
    modules = find_modules(reader, description.method, PARTS, PARTS[1:])
    sparsity = entries.nested("sparsity_config").text("format", "dense")
    if sparsity != "dense":
        raise description.refused(f"sparsity {sparsity}")
    if entries.raw("transform_config"):
        raise description.refused("transform_config")
    if not modules:
        return {}, {}
    groups = entries.nested("config_groups")
    schemes = [groups.nested(name) for name in groups]
    layouts = [scheme.maybe_text("format") or entries.text("format", FORMATS[0]) for scheme in schemes]
    if others := [layout for layout in layouts if layout not in FORMATS]:
        raise description.refused(f"format {others[0]}")
    weights = {}
    for name, module in modules.items():
        scheme = _scheme_of(module, schemes).nested("weights")
        block = _block(scheme)
        _check_order(module, scheme)
        packed = "weight_packed" in module
        weights[name] = _packed_weight(module, scheme, block) if packed else _plain_weight(module, scheme, block)
    return modules, weights


def _scheme_of(module: Module, schemes: list[Entries]) -> Entries:
    """The scheme whose targets have the module by name or pattern, else the one for a class of modules, `Linear`."""
    for scheme in schemes:
        for target in scheme.texts("targets"):
            if target == module.name or (target.startswith("re:") and _matches(scheme, target[3:], module.name)):
                return scheme
    for scheme in schemes:
        if any(target[:1].isupper() for target in scheme.texts("targets")):  # the name of a class
            return scheme
    raise module.problem("is not named by any target in config_groups")


def _matches(scheme: Entries, pattern: str, name: str) -> bool:
    try:
        return re.match(pattern, name) is not None
    except re.error as error:
        scheme.refuse("targets", f"names and valid regular expressions ({error})", pattern)
        raise


def _block(scheme: Entries) -> tuple[int, int] | None:
    """Rows and columns that share a scale; None where there are no blocks."""
    if size := scheme.maybe_integer("group_size", least=-1):
        return None if size == -1 else (1, size)
    block = scheme.integers("block_structure", least=1)
    if block and len(block) != 2:
        scheme.refuse("block_structure", "two sizes: rows and columns")
    return (block[0], block[1]) if block else None


def _check_order(module: Module, scheme: Entries) -> None:
    """What the scheme asks for must be there."""
    if scheme.raw("actorder") in (True, "group", "dynamic") and "weight_g_idx" not in module:
        raise module.problem(f"lacks {module.name}.weight_g_idx (the group of each input), which actorder requires")
    if not scheme.flag("symmetric", True) and "weight_zero_point" not in module:
        raise module.problem(f"lacks {module.name}.weight_zero_point, which an asymmetric scheme requires")


def _plain_weight(module: Module, scheme: Entries, block: tuple[int, int] | None) -> QuantizedWeight:
    if "weight_g_idx" in module:
        raise module.problem("has weight_g_idx for a weight that is not packed, which is not supported")
    kinds = FLOAT8 if scheme.text("type", "int") == "float" else ("I8",)
    return scaled_weight(module, kinds, block)


def _packed_weight(module: Module, scheme: Entries, block: tuple[int, int] | None) -> QuantizedWeight:
    rows, words = module.matrix("weight_packed", "packed codes, (outputs, inputs in 32-bit words)", WORDS)
    module.check("weight_shape", (2,), _INTEGERS)
    outputs, inputs = map(int, module.read("weight_shape"))
    shape = (outputs, inputs)
    bits = scheme.integer("num_bits", 8, least=1, most=8)
    fitting = [width for width in PACKED_BITS if words == -(-inputs * width // 32)]
    bits = bits if bits in fitting else next(iter(fitting), 0)
    if outputs != rows or not bits:
        raise module.unfit("weight_packed", f"({outputs}, words for {inputs} codes of 2, 4 or 8 bits)")
    (height, width), form = scale_block(module, "weight_scale", shape, block)
    grid = (-(-rows // height), -(-inputs // width))
    packed_zeros = "weight_zero_point" in module and module.kind("weight_zero_point") in WORDS
    if packed_zeros:
        module.check("weight_zero_point", (-(-grid[0] * bits // 32), grid[1]), WORDS)
    elif "weight_zero_point" in module:
        module.check("weight_zero_point", module.shape("weight_scale", "its scales", SCALE_KINDS), ("I8",))
    if "weight_g_idx" in module:
        module.check("weight_g_idx", (inputs,), _INTEGERS)

    def read(dtype: Any) -> np.ndarray:
        codes, half = module.read("weight_packed"), 1 << (bits - 1)
        zeros = np.full(grid, half, np.float32)
        if packed_zeros:
            zeros = unpack(module.read("weight_zero_point").T, bits)[:, : grid[0]].T.astype(np.float32)
        elif "weight_zero_point" in module:
            zeros += module.read("weight_zero_point").reshape(grid)
        columns = module.groups_of_inputs("weight_g_idx", inputs, width, grid[1])
        scales = Grid(module.read("weight_scale").reshape(grid), height, columns, zeros)
        return dequantize(lambda first, last: unpack(codes[first:last], bits)[:, :inputs], scales, shape, dtype)

    described = bits == scheme.integer("num_bits", 8)
    return QuantizedWeight(shape, read, f"{bits} bits, {form}", described)
