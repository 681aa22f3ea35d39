"""Hugging Face's SpQR format bit by bit, exports as others read them, model cards and uploads."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from support.arrays import random_array
from typer.testing import CliRunner

from spqr_jax import CheckpointError, ModelError, SpQRConfig, SpQRError, forward, quantize
from spqr_jax.checkpoint import save
from spqr_jax.cli.app import app
from spqr_jax.formats.card import model_card
from spqr_jax.formats.directory import HFDirectory
from spqr_jax.formats.export import export_dense, export_hf_spqr
from spqr_jax.formats.hf_spqr import dequantize_words, pack_words, unpack_words, why_unsupported
from spqr_jax.formats.hf_spqr_source import HFSpQRSource, is_hf_spqr
from spqr_jax.models.hf import open_hf
from spqr_jax.quantized import is_quantized
from spqr_jax.resolve import load_model, open_model
from spqr_jax.stream.blocks import TreeSource, collect

SHAPES = [(16, 16), (64, 128), (48, 80), (32, 272)]


def a_matrix(shape, outliers=0.01, seed=0):
    return random_array(shape, bits=3, group_size=16, outliers=outliers, seed=seed)


def dequantized_by_hand(matrix):
    """From the format's description, integer by integer; CSR only."""
    out, inner = matrix.shape
    groups, half = inner // 16, np.float16
    dense = np.zeros((out, inner), np.float16)
    words = [int(word) & 0xFFFF_FFFF_FFFF_FFFF for word in matrix.dense_weights]
    for row in range(out):
        first, last = int(matrix.row_offsets[row]), int(matrix.row_offsets[row + 1])
        extra = {}
        for entry in matrix.col_vals[first:last]:
            bits = int(entry) & 0xFFFF_FFFF
            extra[bits & 0xFFFF] = np.uint16(bits >> 16).view(np.float16)
        for group in range(groups):
            tile = ((row // 16) * groups + group) * 16
            second = 0
            for byte in range(8):
                second |= (words[tile + 2 * byte] >> 54 & 0xFF) << 8 * byte
            ss, zs, sz, zz = (np.uint16(second >> 16 * i & 0xFFFF).view(np.float16) for i in range(4))
            word = words[tile + row % 16]
            s = half(ss * half(half(word & 7) - sz))
            z = half(zs * half(half(word >> 3 & 7) - zz))
            for j in range(16):
                w = half(s * half(half(word >> (6 + 3 * j) & 7) - z))
                column = 16 * group + j
                dense[row, column] = half(np.float32(w) + np.float32(extra.get(column, 0)))
    return dense


# ---- one matrix -------------------------------------------------------------------------


@pytest.mark.parametrize("outliers", [0.0, 0.01, 0.2])
@pytest.mark.parametrize("shape", SHAPES)
def test_words_mean_what_their_description_says(shape, outliers):
    matrix = pack_words(a_matrix(shape, outliers))
    np.testing.assert_array_equal(dequantize_words(matrix).view(np.uint16), dequantized_by_hand(matrix).view(np.uint16))


@given(st.sampled_from(SHAPES), st.floats(0, 0.3), st.integers(0, 1000))
def test_unpacking_undoes_packing(shape, outliers, seed):
    array = a_matrix(shape, outliers, seed).trimmed()
    again = unpack_words(pack_words(array))
    assert dataclasses.astuple(jax.tree.map(lambda a: 0, again)) == dataclasses.astuple(
        jax.tree.map(lambda a: 0, array)
    )
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(array), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_kernels_arithmetic_is_ours_but_for_roundings():
    """Three operations of float16, relative to the largest product in each; outliers add one."""
    array = a_matrix((64, 128))
    perm = np.asarray(array.perm)
    ours, theirs = np.asarray(array.to_dense())[:, perm], dequantize_words(pack_words(array)).astype(np.float32)
    scale, zero = (np.repeat(np.abs(np.asarray(part)), 16, axis=1) for part in array.statistics())
    allowed = 2.0**-11 * (4 * scale * (7 + 2 * zero) + np.abs(ours)) + 1e-6
    assert np.all(np.abs(ours - theirs) <= allowed)
    assert np.any(ours != theirs)


def by_blocks(matrix):
    """The same outliers with an offset a block of 16 rows (PTCSR), short rows filled up with zeros."""
    counts = np.diff(matrix.row_offsets)
    offsets, entries = [0], []
    for block in range(0, len(counts), 16):
        depth = counts[block : block + 16].max()
        laid = np.zeros((depth, 16), np.int32)
        for lane in range(16):
            first = matrix.row_offsets[block + lane]
            laid[: counts[block + lane], lane] = matrix.col_vals[first : first + counts[block + lane]]
        entries.append(laid.ravel())
        offsets.append(offsets[-1] + laid.size)
    return dataclasses.replace(
        matrix, row_offsets=np.array(offsets, np.int32), col_vals=np.concatenate(entries).astype(np.int32)
    )


@pytest.mark.parametrize("outliers", [0.0, 0.02, 0.2])
def test_both_layouts_of_outliers_are_read(outliers):
    matrix = pack_words(a_matrix((64, 128), outliers))
    for a, b in zip(
        jax.tree.leaves(unpack_words(by_blocks(matrix))), jax.tree.leaves(unpack_words(matrix)), strict=True
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"bits": 4}, "codes have 4 bits.*--bits 3"),
        ({"group_size": 32}, "tiles are 16 x 32.*--format dense"),
        ({"shape": (24, 64)}, "are not multiples of 16"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(changes, says):
    options = {"shape": (32, 64), "bits": 3, "group_size": 16, "outliers": 0.01} | changes
    array = random_array(options.pop("shape"), **options)
    with pytest.raises(SpQRError, match=says):
        pack_words(array)


def test_too_many_columns_are_refused():
    assert "more than 32768" in why_unsupported(dataclasses.replace(a_matrix((16, 16)), shape=(16, 32784)))


def damage(matrix, **changes):
    return dataclasses.replace(matrix, **{name: change(getattr(matrix, name)) for name, change in changes.items()})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"dense_weights": lambda a: a ^ np.arange(len(a)) % 2 << 54}, "statistics in dense_weights are inconsistent"),
        ({"dense_weights": lambda a: a[:-1]}, "dense_weights must be int64"),
        ({"row_offsets": lambda a: a[::-1]}, "must rise from 0"),
        ({"row_offsets": lambda a: a[:-3]}, "must have 65 or 5 entries"),
        ({"col_vals": lambda a: a | 0xFFFF}, "outlier columns go up to"),
        ({"in_perm": lambda a: a * 0}, "perm is not a permutation"),
    ],
)
def test_damaged_tensors_are_refused(changes, says):
    with pytest.raises(SpQRError, match=says):
        unpack_words(damage(pack_words(a_matrix((64, 128))), **changes))


def test_no_weight_has_two_outliers():
    matrix = pack_words(a_matrix((16, 16), 0.0))
    twice = dataclasses.replace(
        matrix, row_offsets=np.array([0] + [2] * 16, np.int32), col_vals=np.array([0x3C000001] * 2, np.int32)
    )
    with pytest.raises(SpQRError, match="two outliers"):
        unpack_words(twice)


# ---- directories ------------------------------------------------------------------------

THREE_BITS = SpQRConfig(outlier_threshold=0.5, head_bits=8, rules=())


@pytest.fixture(scope="module")
def quantized(tiny_model, tiny_batches):
    return quantize(tiny_model, tiny_batches, THREE_BITS)


@pytest.fixture(scope="module")
def exported(quantized, tmp_path_factory):
    path = tmp_path_factory.mktemp("exports") / "spqr"
    with HFDirectory(path) as out:
        export_hf_spqr(TreeSource(quantized), out)
    return path


def test_exports_are_read_back_bit_for_bit(quantized, exported):
    opened = open_model(str(exported), "float32")
    assert opened.quantized
    assert is_hf_spqr(exported)
    again = collect(opened.source)
    assert again.config == quantized.config
    for block, expected in zip(again.layers, quantized.layers, strict=True):
        for name, weight in expected.items():
            pair = [w.trimmed() if is_quantized(w) else w for w in (block[name], weight)]
            for a, b in zip(*map(jax.tree.leaves, pair), strict=True):
                np.testing.assert_array_equal(a, b if weight.ndim == 2 else b.astype(np.float16).astype(np.float32))
    tokens = jnp.arange(40)[None]
    np.testing.assert_allclose(forward(again, tokens), forward(quantized, tokens), atol=0.02)  # norms, head in float16


def test_hub_ids_may_name_such_a_model(exported, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: str(exported))
    opened = open_model("someone/tiny", "float32")
    assert opened.quantized
    assert isinstance(opened.source, HFSpQRSource)


def test_transformers_accepts_the_configuration(exported):
    import transformers

    config = transformers.AutoConfig.from_pretrained(exported)
    spqr = transformers.SpQRConfig(
        **{name: value for name, value in config.quantization_config.items() if name != "quant_method"}
    )
    tensors = load_file(exported / "model.safetensors")
    for name, length in spqr.shapes.items():
        assert tensors[name.removesuffix(".shape")].shape == (length,)
    quantized = {name.removesuffix(".dense_weights") for name in tensors if name.endswith(".dense_weights")}
    assert len(quantized) == 14
    from transformers.quantizers.quantizers_utils import should_convert_module

    torch = pytest.importorskip("torch", reason="which linear layers a model has is asked of transformers' own")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert {name for name in linear if should_convert_module(name, spqr.modules_to_not_convert)} == quantized


def test_mixed_widths_and_biases_are_refused(tiny_model, tiny_batches, tmp_path, quantized):
    from spqr_jax import Decoder
    from spqr_jax.models.weights import Block

    mixed = quantize(tiny_model, tiny_batches, SpQRConfig(rules=(spqr_rule("layers.1.o_proj", 4),)))
    with pytest.raises(SpQRError, match=r"layers.1.o_proj: its codes have 4 bits"), HFDirectory(tmp_path / "m") as out:
        export_hf_spqr(TreeSource(mixed), out)
    config = dataclasses.replace(quantized.config, qkv_bias=True, o_bias=True)
    biases = {f"{name}_proj_bias": jnp.zeros(quantized.layers[0][f"{name}_proj"].shape[0]) for name in "qkvo"}
    layers = tuple(Block({**block, **biases}, block.kind) for block in quantized.layers)
    with pytest.raises(SpQRError, match="q_proj: it has a bias"), HFDirectory(tmp_path / "m") as out:
        export_hf_spqr(TreeSource(Decoder(quantized.outer, layers, config)), out)
    with pytest.raises(SpQRError, match="no weight of this model is quantized"), HFDirectory(tmp_path / "m") as out:
        export_hf_spqr(TreeSource(tiny_model), out)
    assert list(tmp_path.iterdir()) == []  # nothing half-written


def spqr_rule(pattern, bits):
    from spqr_jax import LayerRule

    return LayerRule(pattern, bits=bits)


def test_missing_and_unexpected_tensors_are_named(exported, tmp_path):
    tensors = load_file(exported / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.in_perm"]
    tensors["model.layers.7.extra"] = np.zeros(3, np.float16)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((exported / "config.json").read_text())
    with pytest.raises(ModelError) as caught:
        HFSpQRSource(tmp_path, jnp.float32)
    for word in ("missing tensor model.layers.1.mlp.up_proj.in_perm", "unexpected tensor model.layers.7.extra"):
        assert word in str(caught.value)


def test_another_variant_of_the_format_is_refused(exported, tmp_path):
    config = json.loads((exported / "config.json").read_text())
    config["quantization_config"]["beta1"] = 32
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="tiles of 16 x 16"):
        HFSpQRSource(tmp_path, jnp.float32)


def test_dense_exports_are_the_dequantized_model(quantized, tmp_path):
    with HFDirectory(tmp_path / "m", shard_bytes=40_000) as out:
        export_dense(TreeSource(quantized), out, np.float32)
    assert len(list((tmp_path / "m").glob("model-0000*-of-0000*.safetensors"))) > 1
    dense = collect(open_hf(tmp_path / "m", jnp.float32))
    for name in ("q_proj", "down_proj"):
        np.testing.assert_array_equal(dense.layers[1][name], quantized.layers[1][name].to_dense())
    np.testing.assert_array_equal(dense.outer.lm_head, quantized.outer.lm_head.to_dense())


def test_values_beyond_float16_are_refused(tiny_model, tmp_path):
    layers = (tiny_model.layers[0].replace({"o_proj": tiny_model.layers[0].o_proj * 1e6}), tiny_model.layers[1])
    with (
        pytest.raises(SpQRError, match=r"layers.0.o_proj has values up to .* beyond float16"),
        HFDirectory(tmp_path / "m") as out,
    ):
        export_dense(TreeSource(dataclasses.replace(tiny_model, layers=layers)), out)


# ---- the command ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(quantized, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoints") / "m"
    provenance = {
        "model": "someone/tiny",
        "method": "spqr",
        "calibration": {"data": "pydoc", "windows": 3, "seqlen": 32, "seed": 0},
        "command": "spqr quantize someone/tiny --out m",
    }
    save(path, quantized, THREE_BITS, provenance=provenance)
    return path


@pytest.mark.parametrize("form", ["dense", "hf-spqr"])
def test_export_writes_a_model_with_its_card(checkpoint, quantized, tmp_path, form):
    measured = tmp_path / "p.json"
    measured.write_text(
        json.dumps({"data": "wikitext2", "windows": 10, "seqlen": 2048, "perplexity": 12.3456, "stderr": 0.25})
    )
    command = [
        "export",
        str(checkpoint),
        "--out",
        str(tmp_path / "out"),
        "--format",
        form,
        "--perplexity",
        str(measured),
    ]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    params, _ = load_model(str(tmp_path / "out"), "float32")
    tokens = jnp.arange(40)[None]
    np.testing.assert_allclose(forward(params, tokens), forward(quantized, tokens), atol=0.02)
    card = (tmp_path / "out" / "README.md").read_text()
    for word in ("base_model: someone/tiny", "12.3456", "spqr quantize someone/tiny --out m", "3 windows of 32 tokens"):
        assert word in card
    stored = 8 * sum(a.stored_bytes for b in quantized.layers for a in b.values() if a.ndim == 2)
    assert (
        f"{stored / sum(a.size for b in quantized.layers for a in b.values() if a.ndim == 2):.3f} (matrices of" in card
    )
    again = CliRunner().invoke(app, command)
    assert isinstance(again.exception, CheckpointError)
    assert "exists already" in str(again.exception)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--format", "onnx"], "must be one of dense, hf-spqr"),
        (["--format", "hf-spqr", "--dtype", "float32"], "hf-spqr: float16 only"),
        (["--perplexity", "no-such-file.json"], "no-such-file.json does not exist"),
    ],
)
def test_bad_export_options(checkpoint, tmp_path, options, says):
    result = CliRunner().invoke(app, ["export", str(checkpoint), "--out", str(tmp_path / "out"), *options])
    assert isinstance(result.exception, SpQRError)
    assert says in str(result.exception)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("calibration", ["wikitext2", {"data": "wikitext2"}, 5, ["a"]])
def test_a_card_shows_a_calibration_that_others_described(calibration):
    facts = {"ideal_bits": 3.0, "stored_bits": 3.5, "outlier_percent": 1.0, "head_bits": None, "bytes": 1}
    summary = facts | {"dense_bytes": 8, "quantization": {}, "provenance": {"calibration": calibration, "command": 5}}
    assert f"| Calibration | {calibration} |" in model_card("x", "dense", summary, [], "llama")


def test_a_card_says_what_was_not_measured(quantized):
    summary = dict.fromkeys(("ideal_bits", "stored_bits", "outlier_percent", "bytes", "dense_bytes"), 1.0)
    card = model_card("x", "dense", summary | {"head_bits": None, "provenance": {}, "quantization": {}})
    assert "Perplexity was not measured" in card


def test_pushing_uploads_what_was_written(checkpoint, tmp_path, monkeypatch):
    import huggingface_hub

    calls = []

    class Hub:
        def create_repo(self, *args, **options):
            calls.append(("create", args, options))

        def upload_folder(self, **options):
            calls.append(("upload", sorted(p.name for p in options["folder_path"].iterdir()), options["repo_id"]))
            return "https://example/you/tiny"

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    command = ["export", str(checkpoint), "--out", str(tmp_path / "out"), "--push", "you/tiny", "--private"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert calls[0] == ("create", ("you/tiny",), {"exist_ok": True, "private": True})
    kind, files, repository = calls[1]
    assert (kind, repository) == ("upload", "you/tiny")
    assert {"README.md", "config.json", "model.safetensors"} <= set(files)


def test_a_failed_upload_keeps_the_files(checkpoint, tmp_path, monkeypatch):
    import huggingface_hub

    def refuse(self, *args, **options):
        raise RuntimeError("no token")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    command = ["export", str(checkpoint), "--out", str(tmp_path / "out"), "--push", "you/tiny"]
    result = CliRunner().invoke(app, command)
    assert "no token" in str(result.exception)
    assert "hf upload you/tiny" in str(result.exception)
    assert (tmp_path / "out" / "config.json").is_file()
