"""A weight in each layout of quantized models, and a directory that holds it."""

from __future__ import annotations

from functools import partial

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from spqr_jax.files import Entries
from spqr_jax.models.quantized import open_tensors
from support import quantized_files as packers

WEIGHT = np.random.default_rng(0).normal(size=(64, 96)).astype(np.float32)


def opened(directory, tensors, quantization=None, **config):
    """A directory that holds these tensors, opened with this `quantization_config`."""
    directory.mkdir(exist_ok=True)
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, directory / "model.safetensors")
    config |= {} if quantization is None else {"quantization_config": quantization}
    return open_tensors(directory, Entries(config, str(directory / "config.json")))


def module(parts, name="m"):
    return {f"{name}.{part}": tensor for part, tensor in parts.items()}


def scheme(bits=4, kind="int", layout="pack-quantized", **weights):
    weights = {"num_bits": bits, "type": kind, "symmetric": True, **weights}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": groups}


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True}
FP8 = {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"}
GROUPS = {"strategy": "group", "group_size": 16}
ORDER = np.random.default_rng(1).permutation(packers.neighbours(96, 16))

LAYOUTS = {
    "gptq of 2 bits": (partial(packers.gptq, bits=2), GPTQ | {"bits": 2}),
    "gptq of 3 bits": (partial(packers.gptq, bits=3), GPTQ | {"bits": 3}),
    "gptq of 4 bits": (packers.gptq, GPTQ),
    "gptq of 8 bits": (partial(packers.gptq, bits=8), GPTQ | {"bits": 8}),
    "gptq v2": (partial(packers.gptq, less_one=False), GPTQ | {"checkpoint_format": "gptq_v2"}),
    "gptq, a scale a row": (partial(packers.gptq, size=96), GPTQ | {"group_size": -1}),
    "gptq in an order": (partial(packers.gptq, order=ORDER), GPTQ | {"desc_act": True}),
    "auto-round as gptq": (
        packers.gptq,
        GPTQ | {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"},
    ),
    "auto-round": (
        partial(packers.gptq, less_one=False),
        GPTQ | {"quant_method": "auto-round", "packing_format": "auto_round", "data_type": "int", "act_bits": 16},
    ),
    "auto-round as awq": (packers.awq, AWQ | {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq"}),
    "awq": (packers.awq, AWQ),
    "fp8": (packers.float8, FP8),
    "fp8, blocks that do not divide": (partial(packers.float8, block=(40, 50)), FP8 | {"weight_block_size": [40, 50]}),
    "fp8, a scale a tensor": (
        partial(packers.float8, block=(64, 96), scale="weight_scale"),
        {"quant_method": "fp8", "activation_scheme": "static"},
    ),
    "fp8 of e5m2": (partial(packers.float8, kind=ml_dtypes.float8_e5m2), FP8),
    "fbgemm_fp8": (
        partial(packers.float8, block=(1, 96), scale="weight_scale"),
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0},
    ),
    "modelopt": (
        partial(packers.float8, block=(64, 96), scale="weight_scale"),
        {"quant_method": "modelopt", "quant_algo": "FP8"},
    ),
    "compressed, symmetric": (partial(packers.compressed, symmetric=True), scheme(**GROUPS)),
    "compressed, asymmetric": (packers.compressed, scheme(**GROUPS, symmetric=False)),
    "compressed of 8 bits": (partial(packers.compressed, bits=8), scheme(8, **GROUPS, symmetric=False)),
    "compressed in an order": (
        partial(packers.compressed, order=ORDER),
        scheme(**GROUPS, symmetric=False, actorder="group"),
    ),
    "compressed, a scale a row": (
        partial(packers.compressed, size=96, symmetric=True),
        scheme(strategy="channel"),
    ),
    "compressed float8": (
        partial(packers.float8, block=(1, 96), scale="weight_scale"),
        scheme(8, "float", "float-quantized", strategy="channel"),
    ),
    "compressed float8 in blocks": (
        partial(packers.float8, scale="weight_scale"),
        scheme(8, "float", "float-quantized", strategy="block", block_structure=[32, 32]),
    ),
    "compressed int8": (packers.int8, scheme(8, layout="int-quantized", strategy="channel")),
}
