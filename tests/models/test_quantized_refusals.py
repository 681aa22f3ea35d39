"""Quantized models that do not fit their description, and methods that are not read: one message each."""

from __future__ import annotations

import numpy as np
import pytest
from support import quantized_files as packers
from support.command import spqr
from support.model_files import write_hf
from support.quantized_layouts import AWQ, FP8, GPTQ, LAYOUTS, WEIGHT, module, opened, scheme

from spqr_jax import ModelError
from spqr_jax.models.hf import hf_config

# ---- what does not fit ---------------------------------------------------------------------------


def without(part):
    return lambda parts: {name: tensor for name, tensor in parts.items() if name != part}


def changed(part, change):
    return lambda parts: parts | {part: change(parts[part])}


def cut(part):
    return changed(part, lambda tensor: tensor[:-1])


DAMAGE = [
    ("gptq of 4 bits", without("scales"), r"lacks m\.scales"),
    ("gptq of 4 bits", without("qzeros"), r"lacks m\.qzeros"),
    ("gptq of 4 bits", without("qweight"), r"lacks m\.qweight"),
    ("gptq of 4 bits", cut("scales"), r"has scales of shape \(5, 64\), expected \(6, 64\)"),
    ("gptq of 4 bits", cut("g_idx"), r"has g_idx of shape \(95,\), expected \(96,\)"),
    ("gptq of 4 bits", changed("qzeros", lambda t: t[:, :3]), "has qzeros of shape"),
    ("gptq of 4 bits", changed("qweight", lambda t: t.astype(np.int64)), "has qweight of the type I64, expected I32"),
    ("gptq of 4 bits", changed("qweight", lambda t: t[0]), r"has qweight of shape \(64,\), expected a matrix"),
    ("gptq of 4 bits", changed("scales", lambda t: t.astype(np.int32)), "has scales of the type I32, expected F16"),
    ("gptq in an order", changed("g_idx", lambda t: t + 1), "has groups 1 to 6 in g_idx, expected 0 to 5"),
    ("gptq in an order", changed("g_idx", lambda t: t - 2), "has groups -2 to 3 in g_idx|has no order"),
    ("gptq in an order", without("g_idx"), r"lacks m\.g_idx"),
    ("awq", without("qzeros"), r"lacks m\.qzeros"),
    ("awq", lambda parts: parts | {"scales": parts["scales"][:5], "qzeros": parts["qzeros"][:5]}, "divides its 96"),
    ("awq", changed("scales", lambda t: t[:, :8]), r"has scales of shape \(6, 8\), expected \(6, 64\)"),
    ("fp8", without("weight_scale_inv"), r"lacks m\.weight_scale"),
    ("fp8", without("weight"), r"lacks m\.weight "),
    ("fp8", cut("weight_scale_inv"), r"of shape \(1, 3\), expected \(2, 3\) for blocks of 32 x 32"),
    ("fp8", changed("weight_scale_inv", lambda t: np.ones((1, 1), np.float32)), r"of shape \(1, 1\)"),
    ("fp8", changed("weight", lambda t: t.astype(np.float16)), "has weight of the type F16, expected F8_E4M3"),
    ("fp8", changed("weight", lambda t: t[None]), r"has weight of shape \(1, 64, 96\), expected a matrix"),
    ("fp8", lambda parts: parts | {"weight_scale": np.ones(1, np.float32)}, "has both"),
    ("modelopt", changed("weight_scale", lambda t: np.ones(3, np.float32)), r"has weight_scale of shape \(3,\)"),
    ("compressed, symmetric", without("weight_shape"), r"lacks m\.weight_shape"),
    ("compressed, symmetric", without("weight_packed"), r"lacks m\.weight "),
    ("compressed, symmetric", changed("weight_shape", lambda t: t - 40), "has weight_packed of shape"),
    ("compressed, symmetric", changed("weight_scale", lambda t: t[:, :5]), "for groups of 16"),
    ("compressed, asymmetric", without("weight_zero_point"), r"lacks m\.weight_zero_point"),
    ("compressed, asymmetric", cut("weight_zero_point"), r"expected \(8, 6\)"),
    ("compressed in an order", without("weight_g_idx"), r"lacks m\.weight_g_idx"),
    ("compressed int8", without("weight_scale"), "m.weight, of type I8, belongs to a model that is already quantized"),
]


@pytest.mark.parametrize(("layout", "damage", "says"), DAMAGE)
def test_parts_that_do_not_fit_are_one_message(tmp_path, layout, damage, says):
    pack, quantization = LAYOUTS[layout]
    with pytest.raises(ModelError, match=says) as caught:
        opened(tmp_path, module(damage(pack(WEIGHT)[0])), quantization).read("m.weight", np.float32)
    assert "give the original dense model" in str(caught.value)
    assert quantization["quant_method"] in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("quantization", "says"),
    [
        (
            {"quant_method": "hqq"},
            "already quantized with hqq, which spqr-jax cannot read: give the original dense model",
        ),
        ({"quant_method": "aqlm"}, "aqlm"),
        ({"quant_method": "quip"}, "quip"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "bitnet"}, "bitnet"),
        ({"quant_method": "torchao"}, "torchao"),
        ({"load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes"),
        ({"group_size": 64, "bits": 4}, "mlx"),
        ({"quant_method": "something new"}, "something new"),
        (GPTQ | {"checkpoint_format": "marlin"}, "gptq, format marlin"),
        (GPTQ | {"is_marlin_format": True}, "gptq, format marlin"),
        (AWQ | {"version": "GEMV"}, "awq, version gemv"),
        (AWQ | {"backend": "llm-awq"}, "awq, version llm-awq"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt, NVFP4"),
        ({"quant_method": "auto-round", "packing_format": "auto_round:mlx"}, "auto-round, packing auto_round:mlx"),
        ({"quant_method": "auto-round", "data_type": "mx_fp"}, "auto-round, data type mx_fp"),
        (scheme(layout="nvfp4-pack-quantized"), "compressed-tensors, format nvfp4-pack-quantized"),
        (scheme(layout="marlin-24"), "compressed-tensors, format marlin-24"),
        (scheme() | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity sparse-24-bitmask"),
        (scheme() | {"transform_config": {"config_groups": {"R1": {}}}}, "compressed-tensors, transform_config"),
    ],
)
def test_other_methods_are_refused_by_name(tmp_path, quantization, says):
    tensors = {"m.weight_packed": np.zeros((4, 4), np.int32), "n.weight": np.zeros((4, 4), np.uint8)}
    with pytest.raises(ModelError, match=says) as caught:
        opened(tmp_path, tensors, quantization)
    assert "give the original dense model" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("quantization", "says"),
    [
        ("gptq", "quantization_config is 'gptq', expected an object"),
        ({"quant_method": 4}, r"quantization_config\.quant_method is 4, expected a string"),
        ({"modules_to_not_convert": []}, r"lacks quantization_config\.quant_method"),
        (GPTQ | {"bits": "four"}, r"quantization_config\.bits is 'four'"),
        (GPTQ | {"group_size": 0.5}, r"quantization_config\.group_size is 0.5"),
        (FP8 | {"weight_block_size": [32]}, "weight_block_size is .*two sizes"),
        (FP8 | {"weight_block_size": [0, 32]}, "weight_block_size"),
        (scheme() | {"config_groups": []}, "config_groups is .*expected an object"),
        (scheme() | {"config_groups": {"W4A16": ["Linear"]}}, r"config_groups\.W4A16 is .*expected an object"),
        (scheme() | {"config_groups": {}}, "not named by any target in config_groups"),
        (scheme() | {"config_groups": {"a": {"targets": ["re:("]}}}, "regular expressions"),
    ],
)
def test_descriptions_are_not_trusted(tmp_path, quantization, says):
    pack = {"fp8": packers.float8, "compressed-tensors": packers.compressed}
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    parts, _ = pack.get(method, packers.gptq)(WEIGHT)
    with pytest.raises(ModelError, match=says):
        opened(tmp_path, module(parts), quantization)


def test_words_without_a_description_are_refused(tmp_path):
    for tensors in (module(packers.gptq(WEIGHT)[0]), module(packers.int8(WEIGHT)[0]), {"m.weight": WEIGHT.astype(int)}):
        with pytest.raises(
            ModelError, match=r"m\.\w+, of type \w+, belongs to a model that is already quantized, but no .*method"
        ):
            opened(tmp_path, tensors)


@pytest.mark.parametrize("told", ["gptq of 4 bits", "awq", "fp8", "compressed int8"])
def test_tensors_of_another_method_than_the_one_that_is_told_are_refused(tmp_path, told):
    others = {
        "gptq of 4 bits": "fp8",
        "awq": "compressed, symmetric",
        "fp8": "awq",
        "compressed int8": "gptq of 4 bits",
    }
    quantization = LAYOUTS[told][1]
    tensors = module(LAYOUTS[others[told]][0](WEIGHT)[0])
    for more in ({}, module(LAYOUTS[told][0](WEIGHT)[0], "n")):
        with pytest.raises(
            ModelError, match=rf"not in the way that .*config.json describes \({quantization['quant_method']}\)"
        ):
            opened(tmp_path, tensors | more, quantization)


def test_the_command_refuses_in_one_message(tmp_path, tiny_model):
    write_hf(
        tmp_path / "m",
        tiny_model,
        config=hf_config(tiny_model.config) | {"quantization_config": {"quant_method": "hqq"}},
    )
    done = spqr("quantize", "m", "--out", "q", "--method", "rtn", cwd=tmp_path)
    assert done.returncode == 2
    assert "already quantized with hqq" in done.stderr
    assert "Traceback" not in done.stderr
