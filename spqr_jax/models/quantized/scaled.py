"""Weights that lie as they are, in float8 or int8, with scales beside them.

- `fp8` of DeepSeek and Qwen3: weight [out, in], `weight_scale_inv` [ceil(out/b), ceil(in/b)], which multiplies,
  whatever its name; transformers' `integrations/finegrained_fp8.py` (`FP8Linear`, `Fp8Dequantize`).
- `fp8` of AutoFP8 and vLLM's `fp8.py`: `weight_scale`, one for the tensor or one a row.
- `fbgemm_fp8`: `weight_scale` [out, 1]; transformers' `integrations/fbgemm_fp8.py`.
- `modelopt`: FP8 with one `weight_scale`, or one a row; vLLM's `modelopt.py`.
- compressed-tensors' `naive-`, `int-` and `float-quantized`: `compressors/naive_quantized/base.py` there.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from spqr_jax.files.safetensors_file import SafetensorsReader
from spqr_jax.models.quantized.dequantize import Grid, dequantize
from spqr_jax.models.quantized.method import Description
from spqr_jax.models.quantized.module import FLOAT8, FLOATS, Module, QuantizedModules, QuantizedWeight, find_modules

SCALE_KINDS = (*FLOATS, "F8_E8M0")
SCALES = ("weight_scale_inv", "weight_scale")
PARTS = ("weight", *SCALES)
BLOCK = (128, 128)
"""Where `weight_block_size` is absent, as transformers' FineGrainedFP8Config."""

_KINDS = {"I8": "int8"} | {kind: f"float8 {kind[3:].lower()}" for kind in FLOAT8}
"""Types in words."""

_MODELOPT = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN")


def find_fp8(reader: SafetensorsReader, description: Description, inputs_first: bool) -> QuantizedModules:
    """Modules with float8 weights: `fp8`, `fbgemm_fp8` and `modelopt`.

    Raises:
      ModelError: scales that are missing or do not fit, or a kind of modelopt that is no float8.
    """
    entries = description.entries
    if description.key == "modelopt" and (kind := entries.text("quant_algo", "FP8").upper()) not in _MODELOPT:
        raise description.refused(kind)
    block = entries.integers("weight_block_size", least=1)
    if block and len(block) != 2:
        entries.refuse("weight_block_size", "two sizes: rows and columns")
    modules = find_modules(reader, description.method, PARTS, SCALES)
    for tensor, kind in reader.kinds().items():  # a float8 weight without a scale is one that lacks it
        name, _, part = tensor.rpartition(".")
        if part == "weight" and kind in FLOAT8 and name not in modules:
            modules[name] = Module(reader, name, description.method, ["weight"])
    weights = {
        name: scaled_weight(module, FLOAT8, (block[0], block[1]) if block else None) for name, module in modules.items()
    }
    return modules, weights


def scaled_weight(module: Module, kinds: tuple[str, ...], block: tuple[int, int] | None) -> QuantizedWeight:
    """One module.

    Args:
      module: with a weight and scales.
      kinds: types that the weight may have.
      block: rows and columns that share a scale, as its configuration has it; None where it has none.
    """
    rows, inputs = shape = module.matrix("weight", "its weight", kinds)
    if all(part in module for part in SCALES):
        raise module.problem(f"has both {' and '.join(SCALES)}, expected only one of them")
    part = SCALES[0] if SCALES[0] in module else SCALES[1]
    (height, width), form = scale_block(module, part, shape, block)
    if "weight_zero_point" in module:
        module.check("weight_zero_point", module.shape(part, "its scales", SCALE_KINDS), ("I8",))

    def read(dtype: Any) -> np.ndarray:
        codes, zeros = module.read("weight"), None
        scales = module.read(part).reshape(-(-rows // height), -1)
        if "weight_zero_point" in module:
            zeros = module.read("weight_zero_point").reshape(scales.shape)
        grid = Grid(scales, height, np.arange(inputs) // width, zeros)
        return dequantize(lambda first, last: codes[first:last], grid, shape, dtype)

    return QuantizedWeight(shape, read, f"{_KINDS[module.kind('weight')]}, {form}")


def scale_block(
    module: Module, part: str, shape: tuple[int, int], block: tuple[int, int] | None
) -> tuple[tuple[int, int], str]:
    """Rows and columns that share a scale, by the shape that the scales have; and the same in words.

    Args:
      module: with the scales.
      part: the scales.
      shape: [out, in] of the weight.
      block: as its configuration has it.
    """
    rows, inputs = shape
    height, width = block or BLOCK
    blocks = (-(-rows // height), -(-inputs // width))
    whole, of_a_row = (shape, "one scale per tensor"), ((1, inputs), "one scale per row")
    in_blocks = ((height, width), f"groups of {width}" if height == 1 else f"blocks of {height} x {width}")
    forms = {(): whole, (1,): whole} | ({} if block else {(1, 1): whole})
    forms |= {blocks: in_blocks, (rows,): of_a_row, (rows, 1): of_a_row}
    scales = module.shape(part, f"its scales, {blocks}", SCALE_KINDS)
    if scales not in forms:
        raise module.unfit(
            part,
            f"{blocks} for {in_blocks[1]}, {(rows, 1)} for one scale per row, or a single scale for the weight {shape}",
        )
    return forms[scales]
