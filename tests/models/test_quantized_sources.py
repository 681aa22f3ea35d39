"""Models that other programs quantized: layouts, what they lack, and what is refused."""

from __future__ import annotations

import json
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from support import quantized_files as packers
from support.command import spqr
from support.model_files import write_hf

from spqr_jax import ModelError
from spqr_jax.blocks import collect
from spqr_jax.checkpoint import CheckpointSource
from spqr_jax.files import Entries
from spqr_jax.models.hf import hf_config, hf_tensors, open_hf
from spqr_jax.models.quantized import dequantize, open_tensors

WEIGHT = np.random.default_rng(0).normal(size=(64, 96)).astype(np.float32)


def opened(directory, tensors, quantization=None, **config):
    """A directory that holds these tensors, opened with this `quantization_config`."""
    directory.mkdir(exist_ok=True)
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, directory / "model.safetensors")
    config |= {} if quantization is None else {"quantization_config": quantization}
    return open_tensors(directory, Entries(config, str(directory / "config.json")))


def module(parts, name="m"):
    return {f"{name}.{part}": tensor for part, tensor in parts.items()}


def hex_words(*rows):
    return np.array([[int(word, 16) for word in row.split()] for row in rows], np.uint32).view(np.int32)


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


# ---- layouts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_what_the_packed_tensors_stand_for(tmp_path, monkeypatch, layout):
    pack, quantization = LAYOUTS[layout]
    parts, dense = pack(WEIGHT)
    reader = opened(tmp_path, module(parts) | {"m.bias": np.ones(64, np.float32)}, quantization)
    assert reader.shapes() == {"m.weight": (64, 96), "m.bias": (64,)}
    read = reader.read("m.weight", np.float32)
    np.testing.assert_array_equal(read, dense)
    assert np.linalg.norm(read - WEIGHT) < 0.36 * np.linalg.norm(WEIGHT)
    assert reader.quantized_by.startswith(quantization["quant_method"])
    assert "they are dequantized" in reader.note
    assert "otherwise" not in reader.note
    monkeypatch.setattr(dequantize, "_WEIGHTS_AT_ONCE", 1)  # then it is done in two steps
    half = reader.read("m.weight", ml_dtypes.bfloat16)
    np.testing.assert_array_equal(half, dense.astype(ml_dtypes.bfloat16))


ONES = np.ones((1, 8), np.float16)
BY_HAND = {
    # codes 1..8 of eight inputs lie in one word, the first lowest; zeros 3, stored as 2; the scale of output 1 is 2
    "gptq": (
        {"qweight": hex_words("87654321 " * 8), "qzeros": hex_words("22222222"),
         "scales": np.array([[1, 2, 1, 1, 1, 1, 1, 1]], np.float16), "g_idx": np.zeros(8, np.int32)},
        GPTQ | {"group_size": 8},
        [[-2, -1, 0, 1, 2, 3, 4, 5], [-4, -2, 0, 2, 4, 6, 8, 10]],
    ),
    # code 10 is 5 (binary 101): bits 01 end the first word, 1 begins the second; code 21 is 6 (110): 0, then 11
    "gptq of 3 bits": (
        {"qweight": hex_words(*[f"{word} " * 32 for word in ("40000000", "00000001", "00000003")]),
         "qzeros": hex_words("0 0 0"), "scales": np.ones((1, 32), np.float16), "g_idx": np.zeros(32, np.int32)},
        GPTQ | {"bits": 3, "group_size": 32},
        [[-1] * 10 + [4] + [-1] * 10 + [5] + [-1] * 10],
    ),
    # a word of codes has outputs 0, 2, 4, 6, 1, 3, 5, 7, the first lowest: output i has the code i, and the zero 1
    "awq": (
        {"qweight": hex_words("75316420", "75316420"), "qzeros": hex_words("11111111"), "scales": ONES / 2},
        AWQ | {"group_size": 2},
        [[-0.5, -0.5], [0, 0], [0.5, 0.5], [1, 1], [1.5, 1.5], [2, 2], [2.5, 2.5], [3, 3]],
    ),
    # codes 0..7 stand for -8..-1, and the padding after six inputs is cut off; the second row has 15, 14, ...
    "compressed": (
        {"weight_packed": hex_words("00543210", "00ABCDEF"), "weight_shape": np.array([2, 6]),
         "weight_scale": np.array([[1, 2], [3, 4]], np.float32)},
        scheme(strategy="group", group_size=3),
        [[-8, -7, -6, -10, -8, -6], [21, 18, 15, 16, 12, 8]],
    ),
    # zeros are packed along the outputs: 9 and 8 of the first group, 0 and 15 of the second
    "compressed with zeros": (
        {"weight_packed": hex_words("000000FF", "000000FF"), "weight_shape": np.array([2, 2]),
         "weight_scale": np.ones((2, 2), np.float32), "weight_zero_point": hex_words("00000089 000000F0")},
        scheme(strategy="group", group_size=1, symmetric=False),
        [[6, 15], [7, 0]],
    ),
    # 0x38 is 1, 0x40 is 2, 0xB8 is -1, 0x7E is 448; a scale for each 2 x 2
    "fp8": (
        {"weight": np.array([[0x38, 0x40, 0x38], [0xB8, 0x38, 0x38], [0x7E, 0x38, 0x40]], np.uint8).view(
            ml_dtypes.float8_e4m3fn), "weight_scale_inv": np.array([[2, 3], [0.5, 5]], np.float32)},
        FP8 | {"weight_block_size": [2, 2]},
        [[2, 4, 3], [-2, 2, 3], [224, 0.5, 10]],
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", BY_HAND)
def test_layouts_by_hand(tmp_path, layout):
    parts, quantization, expected = BY_HAND[layout]
    read = opened(tmp_path, module(parts), quantization).read("m.weight", np.float32)
    np.testing.assert_array_equal(read[: len(expected)], np.array(expected, np.float32))


def test_a_zero_of_zero_borrows_in_the_first_format(tmp_path):
    """GPTQModel takes 0x11111111 from a word of zeros: 0x00000030 becomes 0xEEEEEF1F, and gives 0, 3, 0, ... again."""
    parts = {"qweight": hex_words("FFFFFFFF " * 8), "qzeros": hex_words("EEEEEF1F"), "scales": ONES}
    read = opened(tmp_path, module(parts), GPTQ | {"group_size": 8}).read("m.weight", np.float32)
    assert read[:, 0].tolist() == [15, 12, 15, 15, 15, 15, 15, 15]


def test_gpt2_has_its_inputs_first(tmp_path):
    parts, dense = packers.gptq(WEIGHT)
    reader = opened(tmp_path, module(parts), GPTQ, model_type="gpt2")
    assert reader.shapes() == {"m.weight": (96, 64)}
    np.testing.assert_array_equal(reader.read("m.weight", np.float32), dense.T)


def test_a_group_size_that_is_not_told_is_that_of_the_tensors(tmp_path):
    told = {name: value for name, value in GPTQ.items() if name != "group_size"}
    for size in (16, 96):
        parts, dense = packers.gptq(WEIGHT, size=size)
        reader = opened(tmp_path, module(parts), told)
        np.testing.assert_array_equal(reader.read("m.weight", np.float32), dense)
        assert "otherwise" not in reader.note


@pytest.mark.parametrize("order", [np.zeros(96, np.int32), None])
def test_neighbours_are_groups_without_an_order(tmp_path, order):
    parts, dense = packers.gptq(WEIGHT)
    del parts["g_idx"]
    parts |= {} if order is None else {"g_idx": order}
    np.testing.assert_array_equal(opened(tmp_path, module(parts), GPTQ).read("m.weight", np.float32), dense)
    with pytest.raises(ModelError, match="desc_act"):
        opened(tmp_path, module(parts), GPTQ | {"desc_act": True}).read("m.weight", np.float32)


def test_scales_of_activations_and_biases_of_zeros_are_no_part_of_the_model(tmp_path):
    parts, _ = packers.float8(WEIGHT)
    more = {"m.input_scale": np.ones(1, np.float32), "attn.k_scale": np.ones(1, np.float32), "m.bias": np.zeros(64)}
    reader = opened(tmp_path, module(parts) | more, FP8)
    assert set(reader.shapes()) == {"m.weight", "m.bias"}
    assert reader.spare == {"m.bias"}


# ---- where the method is told -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "told", "layout"),
    [
        ("quantize_config.json", {"bits": 4, "group_size": 16, "desc_act": False}, "gptq of 4 bits"),
        ("quant_config.json", {"w_bit": 4, "q_group_size": 16, "version": "GEMM"}, "awq"),
        ("hf_quant_config.json", {"quantization": {"quant_algo": "FP8"}}, "modelopt"),
    ],
)
def test_a_file_beside_names_the_method(tmp_path, file, told, layout):
    parts, dense = LAYOUTS[layout][0](WEIGHT)
    (tmp_path / file).write_text(json.dumps(told))
    reader = opened(tmp_path, module(parts))
    np.testing.assert_array_equal(reader.read("m.weight", np.float32), dense)
    assert reader.quantized_by.startswith(LAYOUTS[layout][1]["quant_method"])


def test_old_and_nested_entries_name_the_method(tmp_path):
    parts, dense = packers.compressed(WEIGHT, symmetric=True)
    told = scheme(**GROUPS)
    del told["quant_method"]
    for config in ({"compression_config": told}, {"text_config": {"compression_config": told}}):
        reader = opened(tmp_path, module(parts), **config)
        np.testing.assert_array_equal(reader.read("m.weight", np.float32), dense)


def test_float8_with_scales_needs_no_description(tmp_path):
    parts, dense = packers.float8(WEIGHT, (128, 128))
    reader = opened(tmp_path, module(parts))
    np.testing.assert_array_equal(reader.read("m.weight", np.float32), dense)
    assert "fp8" in reader.note


@pytest.mark.parametrize("quantization", [None, GPTQ, {"quant_method": "awq"}])
def test_float8_without_scales_is_the_numbers_that_it_holds(tmp_path, quantization):
    weight = WEIGHT.astype(ml_dtypes.float8_e4m3fn)
    reader = opened(tmp_path, {"m.weight": weight}, quantization)
    np.testing.assert_array_equal(reader.read("m.weight", np.float32), weight.astype(np.float32))
    assert "1 tensors are float8 without scales, such as m.weight" in reader.note


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors", "bitsandbytes", "fp8"])
def test_dense_weights_beside_an_entry_that_is_left_over_are_read(tmp_path, method):
    reader = opened(tmp_path, {"m.weight": WEIGHT}, {"quant_method": method})
    np.testing.assert_array_equal(reader.read("m.weight", np.float32), WEIGHT)
    assert reader.quantized_by is None
    assert f"names the quantization {method}, and no tensor has its form" in reader.note


def test_a_cache_alone_may_be_quantized(tmp_path):
    quantization = {"quant_method": "modelopt", "quant_algo": None, "kv_cache_quant_algo": "FP8"}
    reader = opened(tmp_path, {"m.weight": WEIGHT, "k_proj.k_scale": np.ones(1, np.float32)}, quantization)
    assert set(reader.shapes()) == {"m.weight"}


def test_a_dense_model_says_nothing(tmp_path):
    reader = opened(tmp_path, {"m.weight": WEIGHT}, quantization_config=None)
    assert (reader.note, reader.quantized_by) == (None, None)
    save_file({"a": WEIGHT}, tmp_path / "adapter_model.safetensors")
    assert "a LoRA adapter: it is not applied" in opened(tmp_path, {"m.weight": WEIGHT}).note


# ---- tensors that differ from what is told -------------------------------------------------------


@pytest.mark.parametrize(
    ("told", "kept"),
    [({"bits": 8}, "4 bits, groups of 16"), ({"group_size": 32}, "groups of 16"), ({"group_size": -1}, "groups of 16")],
)
def test_the_tensors_count_and_it_is_said(tmp_path, told, kept):
    parts, dense = packers.gptq(WEIGHT)
    reader = opened(tmp_path, module(parts), GPTQ | told)
    np.testing.assert_array_equal(reader.read("m.weight", np.float32), dense)
    assert "config.json describes 1 of them otherwise (m): the tensors count" in reader.note
    assert kept in reader.quantized_by


def test_modules_of_other_widths_are_read(tmp_path):
    four, dense4 = packers.gptq(WEIGHT)
    eight, dense8 = packers.gptq(WEIGHT, bits=8, size=32)
    overrides = {"dynamic": {"+:lm_head": {"bits": 8, "group_size": 32}}}
    tensors = module(four, "a") | module(eight, "lm_head") | {"b.weight": WEIGHT}
    reader = opened(tmp_path, tensors, GPTQ | overrides | {"lm_head": True})
    for name, dense in (("a", dense4), ("lm_head", dense8), ("b", WEIGHT)):
        np.testing.assert_array_equal(reader.read(f"{name}.weight", np.float32), dense)
    assert reader.quantized_by == "gptq, 4 bits, groups of 16 or 8 bits, groups of 32"
    assert "otherwise" not in reader.note


def test_schemes_hold_for_their_targets(tmp_path):
    four, dense4 = packers.compressed(WEIGHT, symmetric=True)
    eight, dense8 = packers.compressed(WEIGHT, bits=8, size=32)
    quantization = scheme(**GROUPS)
    weights = {"num_bits": 8, "symmetric": False, "strategy": "group", "group_size": 32}
    quantization["config_groups"]["group_1"] = {"targets": ["re:.*down_proj"], "weights": weights}
    reader = opened(tmp_path, module(four, "x.up_proj") | module(eight, "x.down_proj"), quantization)
    np.testing.assert_array_equal(reader.read("x.up_proj.weight", np.float32), dense4)
    np.testing.assert_array_equal(reader.read("x.down_proj.weight", np.float32), dense8)


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
    ("awq", lambda parts: parts | {"scales": parts["scales"][:5], "qzeros": parts["qzeros"][:5]}, "divide its 96"),
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
    ("compressed int8", without("weight_scale"), "m.weight, of the type I8, is of a model that is quantized"),
]


@pytest.mark.parametrize(("layout", "damage", "says"), DAMAGE)
def test_parts_that_do_not_fit_are_one_message(tmp_path, layout, damage, says):
    pack, quantization = LAYOUTS[layout]
    with pytest.raises(ModelError, match=says) as caught:
        opened(tmp_path, module(damage(pack(WEIGHT)[0])), quantization).read("m.weight", np.float32)
    assert "give the dense model" in str(caught.value)
    assert f"quantized by {quantization['quant_method']}" in str(caught.value).replace("already ", "")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("quantization", "says"),
    [
        ({"quant_method": "hqq"}, "already by hqq, which is not read here: give the dense model"),
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
    assert "give the dense model that it was made from" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("quantization", "says"),
    [
        ("gptq", "quantization_config is 'gptq', expected an object"),
        ({"quant_method": 4}, r"quantization_config\.quant_method is 4, expected a text"),
        ({"modules_to_not_convert": []}, r"lacks quantization_config\.quant_method"),
        (GPTQ | {"bits": "four"}, r"quantization_config\.bits is 'four'"),
        (GPTQ | {"group_size": 0.5}, r"quantization_config\.group_size is 0.5"),
        (FP8 | {"weight_block_size": [32]}, "weight_block_size is .*two sizes"),
        (FP8 | {"weight_block_size": [0, 32]}, "weight_block_size"),
        (scheme() | {"config_groups": []}, "config_groups is .*expected an object"),
        (scheme() | {"config_groups": {"W4A16": ["Linear"]}}, r"config_groups\.W4A16 is .*expected an object"),
        (scheme() | {"config_groups": {}}, "named by none of the targets"),
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
            ModelError, match=r"m\.\w+, of the type \w+, is of a model that is quantized .*nothing says"
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
        with pytest.raises(ModelError, match=f"not as .*config.json says, quantized by {quantization['quant_method']}"):
            opened(tmp_path, tensors | more, quantization)


# ---- whole models --------------------------------------------------------------------------------


def write_quantized(directory, model, pack, quantization, skip=()):
    """A model's directory with its blocks packed; gives the dense weights that they stand for."""
    packed, dense = packers.quantized_tensors(hf_tensors(model), pack, skip)
    write_hf(directory, model, config=hf_config(model.config) | {"quantization_config": quantization}, tensors=packed)
    return dense


@pytest.mark.parametrize("layout", ["gptq in an order", "awq", "fp8", "compressed, asymmetric"])
def test_a_quantized_model_is_the_dense_one_rounded(tmp_path, tiny_model, layout):
    pack, quantization = LAYOUTS[layout]
    if layout == "gptq in an order":  # for every number of inputs
        pack = lambda weight: packers.gptq(weight, order=packers.neighbours(weight.shape[1], 16)[::-1])  # noqa: E731
    dense = write_quantized(tmp_path / "m", tiny_model, pack, quantization, skip=("layers.1.mlp.down_proj",))
    loaded = collect(open_hf(tmp_path / "m", jnp.float32))
    write_hf(tmp_path / "d", tiny_model, tensors=dense)
    for ours, expected in zip(
        jax.tree.leaves(loaded), jax.tree.leaves(collect(open_hf(tmp_path / "d", jnp.float32))), strict=True
    ):
        np.testing.assert_array_equal(ours, expected)
    for ours, before in zip(jax.tree.leaves(loaded), jax.tree.leaves(tiny_model), strict=True):
        assert np.linalg.norm(ours - before) <= 0.15 * np.linalg.norm(before)


def test_scales_that_are_no_numbers_are_named(tmp_path, tiny_model):
    def pack(weight):
        parts, dense = packers.float8(weight)
        parts["weight_scale_inv"][0, 0] = np.inf
        return parts, dense

    write_quantized(tmp_path / "m", tiny_model, pack, FP8)
    with pytest.raises(ModelError, match=r"not finite: model\.layers\.0\.self_attn\.q_proj\.weight"):
        open_hf(tmp_path / "m", jnp.float32).block(0)


def test_biases_that_a_model_lacks_may_be_zeros(tmp_path, tiny_model):
    tensors, _ = packers.quantized_tensors(hf_tensors(tiny_model), packers.gptq)
    config = hf_config(tiny_model.config) | {"quantization_config": GPTQ}
    tensors["model.layers.0.mlp.up_proj.bias"] = np.zeros(96, np.float16)
    open_hf(write_hf(tmp_path / "m", tiny_model, config=config, tensors=tensors), jnp.float32)
    tensors["model.layers.0.mlp.up_proj.bias"] = np.ones(96, np.float16)
    with pytest.raises(ModelError, match=r"unexpected tensor model\.layers\.0\.mlp\.up_proj\.bias"):
        open_hf(write_hf(tmp_path / "m", tiny_model, config=config, tensors=tensors), jnp.float32)


def test_the_command_says_it_first_and_last(tmp_path, tiny_model):
    write_quantized(tmp_path / "m", tiny_model, packers.gptq, GPTQ)
    done = spqr("quantize", "m", "--out", "q", "--method", "rtn", "--bits", "4", "--head-bits", "none", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.strip().splitlines()
    said = "the weights were quantized already (gptq, 4 bits, groups of 16): they are dequantized, what that lost"
    assert said in lines[0]  # when the model is opened
    assert lines[-1].startswith(said)
    kept = CheckpointSource(tmp_path / "q").provenance["source_quantization"]
    assert kept == "gptq, 4 bits, groups of 16"


def test_the_command_refuses_in_one_message(tmp_path, tiny_model):
    write_hf(
        tmp_path / "m",
        tiny_model,
        config=hf_config(tiny_model.config) | {"quantization_config": {"quant_method": "hqq"}},
    )
    done = spqr("quantize", "m", "--out", "q", "--method", "rtn", cwd=tmp_path)
    assert done.returncode == 2
    assert "quantized already by hqq" in done.stderr
    assert "Traceback" not in done.stderr
