"""Models that other programs quantized: layouts, where the method is told, whole models."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from support import quantized_files as packers
from support.command import spqr
from support.model_files import write_hf
from support.quantized_layouts import AWQ, FP8, GPTQ, GROUPS, LAYOUTS, WEIGHT, module, opened, scheme

from spqr_jax import ModelError
from spqr_jax.checkpoint import CheckpointSource
from spqr_jax.models.hf import hf_config, hf_tensors, open_hf
from spqr_jax.models.quantized import dequantize
from spqr_jax.resolve import load_model
from spqr_jax.stream.blocks import collect

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


def hex_words(*rows):
    return np.array([[int(word, 16) for word in row.split()] for row in rows], np.uint32).view(np.int32)


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
    assert f"names the quantization {method}, but no tensor is in that format" in reader.note


def test_a_cache_alone_may_be_quantized(tmp_path):
    quantization = {"quant_method": "modelopt", "quant_algo": None, "kv_cache_quant_algo": "FP8"}
    reader = opened(tmp_path, {"m.weight": WEIGHT, "k_proj.k_scale": np.ones(1, np.float32)}, quantization)
    assert set(reader.shapes()) == {"m.weight"}


def test_a_dense_model_says_nothing(tmp_path):
    reader = opened(tmp_path, {"m.weight": WEIGHT}, quantization_config=None)
    assert (reader.note, reader.quantized_by) == (None, None)
    save_file({"a": WEIGHT}, tmp_path / "adapter_model.safetensors")
    assert (
        "the LoRA adapter adapter_model.safetensors next to the model is not applied"
        in opened(tmp_path, {"m.weight": WEIGHT}).note
    )


# ---- tensors that differ from what is told -------------------------------------------------------


@pytest.mark.parametrize(
    ("told", "kept"),
    [({"bits": 8}, "4 bits, groups of 16"), ({"group_size": 32}, "groups of 16"), ({"group_size": -1}, "groups of 16")],
)
def test_the_tensors_count_and_it_is_said(tmp_path, told, kept):
    parts, dense = packers.gptq(WEIGHT)
    reader = opened(tmp_path, module(parts), GPTQ | told)
    np.testing.assert_array_equal(reader.read("m.weight", np.float32), dense)
    assert "config.json describes 1 of them differently (m): the tensors are used as they are" in reader.note
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


# ---- whole models --------------------------------------------------------------------------------


def write_quantized(directory, model, pack, quantization, skip=()):
    """A model's directory with its matrices packed; gives the dense weights that they stand for."""
    packed, dense = packers.quantized_tensors(hf_tensors(model), pack, skip)
    write_hf(directory, model, config=hf_config(model.config) | {"quantization_config": quantization}, tensors=packed)
    return dense


@pytest.mark.parametrize("layout", ["gptq in an order", "awq", "fp8", "compressed, asymmetric"])
def test_a_quantized_model_is_the_dense_one_rounded(tmp_path, tiny_model, layout):
    """With its output head, and but for one matrix."""
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
    with pytest.raises(ModelError, match=r"layers\.0\.self_attn\.q_proj\.weight.* not finite"):
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
    said = (
        "the weights are already quantized (gptq, 4 bits, groups of 16): they are dequantized, but the lost precision"
    )
    assert said in lines[0]  # when the model is opened
    assert lines[-2].startswith(said)  # the last line names the next command
    kept = CheckpointSource(tmp_path / "q").provenance["source_quantization"]
    assert kept == "gptq, 4 bits, groups of 16"


def test_python_users_are_warned_that_a_model_was_quantized_already(tmp_path, tiny_model):
    write_quantized(tmp_path / "m", tiny_model, packers.float8, FP8)
    with pytest.warns(UserWarning, match=r"already quantized \(fp8"):
        load_model(str(tmp_path / "m"), "float32")
