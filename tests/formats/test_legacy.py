"""Folders of the original: read as its own loader reads them, and nothing in them is run."""

from __future__ import annotations

import copy
import json
import os
import pickle
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
from support.arrays import random_array
from typer.testing import CliRunner

from spqr_jax import CheckpointError, ModelError, SpQRArray, SpQRError
from spqr_jax.checkpoint import CheckpointSource
from spqr_jax.cli.app import app
from spqr_jax.formats.legacy import LegacySource, array_from_saved
from spqr_jax.formats.torch_file import _sparse_tensor, read_torch_file
from spqr_jax.models.families import FAMILIES
from spqr_jax.models.hf import hf_config, hf_tensors
from spqr_jax.packing import unpack_codes

torch = pytest.importorskip("torch", reason="torch is not installed (extra `parity`): it writes the files to be read")


def as_saved(array, dtype=None):
    """What the original's engine would have saved of a matrix; outliers are whole weights."""
    out, inner = array.shape
    dtype = dtype or torch.float16
    codes = unpack_codes(np.asarray(array.codes), array.bits)[:, :inner]
    saved = {"quant_weights": torch.from_numpy(codes.astype(np.int8))}
    names = ("quant_layer_scale", "quant_layer_zeros", "quant_layer_scale_qq_scale", "quant_layer_scale_qq_zero",
             "quant_layer_zero_qq_scale", "quant_layer_zero_qq_zero")  # fmt: skip
    saved |= {name: [] for name in names}
    stats = np.asarray(array.tile_stats)
    for group in range(stats.shape[1]):
        if array.quantized_stats:
            for name, words, width in (
                ("scale", array.scale_codes, array.scale_bits),
                ("zeros", array.zero_codes, array.zero_bits),
            ):
                level = unpack_codes(np.asarray(words), width)[group].reshape(-1, 16).astype(np.int8)
                saved[f"quant_layer_{name}"].append(torch.from_numpy(level))
            for index, name in enumerate(names[2:]):
                saved[name].append(torch.from_numpy(stats[:, group, index : index + 1].copy()).to(dtype))
        else:
            saved["quant_layer_scale"].append(torch.from_numpy(stats[:, group, :1].copy()))
            saved["quant_layer_zeros"].append(torch.from_numpy(stats[:, group, 1:].copy()))
    whole = np.zeros((out, inner), np.float32)
    dense = np.asarray(array.to_dense())[:, np.asarray(array.perm)]
    rows, cols = np.asarray(array.rows)[: array.nnz], np.asarray(array.outlier_cols)[: array.nnz].astype(int)
    whole[rows, cols] = dense[rows, cols]
    return saved | {
        "outliers_matrix": torch.from_numpy(whole).to_sparse(),
        "perm": torch.from_numpy(np.asarray(array.perm).astype(np.int64)),
        "weight_shape": torch.Size((out, inner)),
        "groupsize": array.group_size,
        "blocksize": 128,
        "keep_last_columns": 0,
        "save_float_dtype": dtype,
        "sublayer_name": "some.module",
    }


def by_the_originals_loader(saved):
    """Group after group of columns; a weight whose outlier is not zero is that outlier."""
    dense = np.zeros(saved["weight_shape"], np.float32)
    for group, (scale, zero) in enumerate(zip(saved["quant_layer_scale"], saved["quant_layer_zeros"], strict=True)):
        if saved["quant_layer_scale_qq_scale"]:
            scale = saved["quant_layer_scale_qq_scale"][group].float() * (
                scale - saved["quant_layer_scale_qq_zero"][group].float()
            )
            zero = saved["quant_layer_zero_qq_scale"][group].float() * (
                zero - saved["quant_layer_zero_qq_zero"][group].float()
            )
        columns = slice(group * saved["groupsize"], (group + 1) * saved["groupsize"])
        codes = saved["quant_weights"][:, columns].float()
        dense[:, columns] = scale.float().reshape(-1, 1) * (codes - zero.float().reshape(-1, 1))
    outliers = saved["outliers_matrix"].to_dense().numpy()
    return np.where(outliers == 0, dense, outliers)[:, np.argsort(saved["perm"].numpy())]


@pytest.mark.parametrize("stats_bits", [3, None])
def test_a_matrix_is_what_the_original_reads(tmp_path, stats_bits):
    array = random_array((48, 80), bits=3, group_size=16, stats_bits=stats_bits, outliers=0.03)
    saved = as_saved(array)
    torch.save(saved, tmp_path / "w")
    loaded = array_from_saved(read_torch_file(tmp_path / "w"), 3, stats_bits or 16)
    np.testing.assert_allclose(loaded.to_dense(), by_the_originals_loader(saved), rtol=2e-3, atol=2e-3)
    np.testing.assert_array_equal(loaded.codes, array.codes)
    assert loaded.nnz == array.nnz


def test_outliers_may_be_added_instead(tmp_path):
    saved = as_saved(random_array((32, 32), outliers=0.05))
    torch.save(saved, tmp_path / "w")
    added = array_from_saved(read_torch_file(tmp_path / "w"), 3, 3, "added")
    values = saved["outliers_matrix"].coalesce().values().numpy()
    np.testing.assert_array_equal(np.asarray(added.outlier_values), values.astype(np.float16))


def write_folder(folder, model, arrays):
    """A folder of the original's for a model, some of whose matrices are quantized."""
    rest = {}
    for tensor, row in FAMILIES["llama"].table.expand(model.config).items():
        path = row.paths[0]
        if path not in arrays:
            rest[tensor] = torch.nn.Parameter(torch.from_numpy(hf_tensors(model)[tensor]))
            continue
        layer = path.split(".")[1]
        (folder / layer).mkdir(parents=True, exist_ok=True)
        module = tensor.removesuffix(".weight").partition(f".{layer}.")[2]
        torch.save(as_saved(arrays[path]), folder / layer / module)
    torch.save(rest, folder / "not_quantized_weights.pt")
    arguments = {"wbits": 3, "groupsize": 16, "qq_scale_bits": 3, "qq_zero_bits": 3, "qq_groupsize": 16}
    arguments |= {"outlier_threshold": 0.2, "percdamp": 1.0, "permutation_order": "act_order", "model_path": "x"}
    torch.save(arguments, folder / "args.pt")


@pytest.fixture
def folder(tmp_path, tiny_model):
    arrays = {
        f"layers.{index}.{name}": random_array(weight.shape, outliers=0.02, seed=index)
        for index, block in enumerate(tiny_model.layers)
        for name, weight in block.items()
        if weight.ndim == 2
    }
    (tmp_path / "saved").mkdir()
    write_folder(tmp_path / "saved", tiny_model, arrays)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(hf_config(tiny_model.config)))
    return tmp_path


def test_a_folder_becomes_a_checkpoint(folder, tiny_model):
    command = ["import", str(folder / "saved"), "--base", str(folder / "base"), "--out", str(folder / "out")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    source = CheckpointSource(folder / "out")
    assert source.config == tiny_model.config
    assert (source.quantization.bits, source.quantization.order) == (3, "activation")
    block = source.block(1)
    saved = torch.load(folder / "saved" / "1" / "mlp.down_proj", weights_only=True)
    assert isinstance(block.down_proj, SpQRArray)
    np.testing.assert_allclose(block.down_proj.to_dense(), by_the_originals_loader(saved), rtol=2e-3, atol=2e-3)
    np.testing.assert_array_equal(block.attention_norm, tiny_model.layers[1].attention_norm)
    np.testing.assert_array_equal(source.outer().embed_tokens, tiny_model.outer.embed_tokens)


def test_as_a_model_it_points_to_the_import(folder):
    from spqr_jax.resolve import open_model

    with pytest.raises(ModelError, match="spqr import"):
        open_model(str(folder / "saved"))


def test_what_is_missing_is_named(folder):
    (folder / "saved" / "1" / "mlp.up_proj").unlink()
    source = LegacySource(folder / "saved", folder / "base", jnp.float32)
    with pytest.raises(ModelError, match=r"mlp\.up_proj does not exist"):
        source.block(1)
    torch.save({"other": torch.zeros(1)}, folder / "saved" / "not_quantized_weights.pt")
    with pytest.raises(ModelError, match=r"not_quantized_weights\.pt lacks model\.embed_tokens\.weight"):
        LegacySource(folder / "saved", folder / "base", jnp.float32).outer()
    (folder / "saved" / "args.pt").unlink()
    with pytest.raises(ModelError, match="was not written by the original SpQR"):
        LegacySource(folder / "saved", folder / "base", jnp.float32)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"perm": None}, "perm is None, expected a tensor"),
        ({"perm": np.arange(64) + 2**16}, "perm must lie in 0..63"),
        ({"keep_last_columns": 4}, "keep_last_columns"),
        ({"weight_shape": (48, 64)}, "quant_weights is a tensor of type int8"),
        ({"weight_shape": "3264"}, "weight_shape is '3264'"),
        ({"quant_weights": np.full((32, 64), 9, np.int8)}, "ranges from 9 to 9"),
        ({"groupsize": 2**30}, "groupsize is"),
        ({"quant_layer_scale": [np.zeros((2, 16))] * 3}, "a list of 4 tensors"),
        ({"quant_layer_scale": [np.zeros((3, 16))] * 4}, "have .48, 32. rows, but"),
        ({"quant_layer_zeros": [np.full((2, 16), np.nan)] * 4}, "must fit in 3 bits"),
        ({"quant_layer_scale_qq_zero": [np.zeros((5, 1))] * 4}, "tiles, which do not fit 32 rows"),
        ({"quant_layer_scale_qq_scale": [np.full((2, 1), 1e9)] * 4}, "not finite"),
        ({"outliers_matrix": 3}, "the outliers are 3, but the matrix"),
    ],
)
def test_bad_matrices_are_refused(tmp_path, change, says):
    torch.save(as_saved(random_array((32, 64))), tmp_path / "w")
    with pytest.raises(SpQRError, match=says):
        array_from_saved(read_torch_file(tmp_path / "w") | change, 3, 3)


# ---- what a pickle might try ------------------------------------------------------------


def write_archive(path, data, storage=b""):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", data)
        archive.writestr("x/data/0", storage)
        archive.writestr("x/byteorder", "little")


class Runs:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


class HasState:
    def __init__(self):
        self.x = 1


ATTACKS = {
    "a command": pickle.dumps(Runs(os.system, "touch harmed"), 2),
    "the same by protocol 4": pickle.dumps(Runs(os.system, "touch harmed"), 4),
    "evaluation": pickle.dumps(Runs(eval, "open('harmed', 'w')"), 2),
    "an attribute of what is allowed": b"\x80\x04\x8c\x0btorch._utils\x8c\x18_rebuild_tensor_v2.__globals__\x93.",
    "an object": pickle.dumps(HasState(), 2),
    "state set on an array": b"\x80\x02]q\x00}q\x01b.",
    "an extension": b"\x80\x02\x82\x01.",
    "a storage that is none": b"\x80\x02X\x04\x00\x00\x00evilQ.",
    "a place in the memo that needs gigabytes": b"\x80\x02]r\xff\xff\xff\x7f0h\x00.",
    "a key that takes for ever to hash": b"\x80\x02})q\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"Ns.",
    "a tuple too deep to hash": b"\x80\x02})" + b"\x85" * 300_000 + b"Ns.",
    "items for a function": b"\x80\x02ccollections\nOrderedDict\n]a.",
    "a call of a number": b"\x80\x02K\x05)R.",
    "arguments of other types": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(NNNNtR.",
    "a text as sizes": b"\x80\x02ctorch\nSize\nX\x02\x00\x00\x0012\x85R.",
}


@pytest.mark.parametrize("data", ATTACKS.values(), ids=ATTACKS.keys())
def test_nothing_is_run(tmp_path, monkeypatch, data):
    monkeypatch.chdir(tmp_path)
    write_archive(tmp_path / "w", data)
    with pytest.raises(CheckpointError, match="w is refused"):
        read_torch_file(tmp_path / "w")
    assert not (tmp_path / "harmed").exists()


def test_tensors_stay_within_their_storage(tmp_path):
    torch.save({"a": torch.arange(6.0)}, tmp_path / "good")
    with zipfile.ZipFile(tmp_path / "good") as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "bad", "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content[:8] if name.endswith("/data/0") else content)
    np.testing.assert_array_equal(read_torch_file(tmp_path / "good")["a"], np.arange(6.0))
    with pytest.raises(CheckpointError, match="beyond its storage"):
        read_torch_file(tmp_path / "bad")


def test_tensors_take_no_more_memory_than_their_storage(tmp_path):
    torch.save({"a": torch.zeros(1).expand(1 << 20, 1 << 20)}, tmp_path / "w")
    with pytest.raises(CheckpointError, match="1099511627776 elements in a storage of 1"):
        read_torch_file(tmp_path / "w")


def test_an_archive_that_unfolds_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "w", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"\x80\x02N.")
        archive.writestr("x/data/0", bytes(1 << 24))
    with pytest.raises(CheckpointError, match="compressed"):
        read_torch_file(tmp_path / "w")


def test_members_that_share_their_bytes_are_refused(tmp_path):
    """Central directories may name one place a thousand times."""
    write_archive(tmp_path / "w", b"\x80\x02N.", bytes(1 << 20))
    with zipfile.ZipFile(tmp_path / "w", "a") as archive:
        for index in range(100):
            again = copy.copy(archive.getinfo("x/data/0"))
            again.filename = f"x/data/{index + 1}"
            archive.filelist.append(again)
        archive._didModify = True
    with pytest.raises(CheckpointError, match="claim more bytes"):
        read_torch_file(tmp_path / "w")


def test_sparse_tensors_are_checked():
    rows, columns, values = np.array([0, 1, 2]), np.array([0, 1]), np.ones(2, np.float32)
    shape = (2, 2)
    assert _sparse_tensor("torch.sparse_csr", (rows, columns, values, shape)).indices.tolist() == [[0, 1], [0, 1]]
    for layout, data in [
        ("torch.sparse_csr", (np.array([0, 2**60, 2]), columns, values, shape)),
        ("torch.sparse_csr", (np.array([0, 1, 9]), columns, values, shape)),
        ("torch.sparse_csr", (rows, columns, values, "22")),
        ("torch.sparse_coo", (np.zeros((3, 2), int), values, shape)),
        ("torch.sparse_coo", (np.zeros((2, 2)), values, shape)),
        ("torch.sparse_bsr", (rows, columns, values, shape)),
        (["torch.sparse_coo"], (rows, columns, values, shape)),
    ]:
        with pytest.raises(CheckpointError, match="sparse tensor"):
            _sparse_tensor(layout, data)


def test_views_types_and_sparse_tensors_are_read(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    dense = torch.zeros(3, 5)
    dense[1, 2] = 7.0
    torch.save(
        {
            "view": base[1:, ::2].T,
            "half": torch.tensor([1.5, -2.0]).half(),
            "brain": torch.tensor([3.0]).bfloat16(),
            "coo": dense.to_sparse(),
            "csr": dense.to_sparse_csr(),
            "none": [None, True, 2**70, "text", 0.5],
            "empty": torch.zeros(0, 3),
        },
        tmp_path / "w",
    )
    found = read_torch_file(tmp_path / "w")
    np.testing.assert_array_equal(found["view"], base[1:, ::2].T.numpy())
    assert (found["half"].dtype, found["brain"].dtype) == (np.float16, jnp.bfloat16)
    for kind in ("coo", "csr"):
        assert found[kind].indices.tolist() == [[1], [2]]
        assert (found[kind].values.tolist(), found[kind].shape) == ([7.0], (3, 5))
    assert found["none"] == [None, True, 2**70, "text", 0.5]
    assert found["empty"].shape == (0, 3)


def test_damaged_files_say_so(tmp_path):
    (tmp_path / "w").write_bytes(b"no zip at all")
    with pytest.raises(CheckpointError, match="zip format"):
        read_torch_file(tmp_path / "w")
    write_archive(tmp_path / "w", pickle.dumps({"a": 1}, 2)[:-3])
    with pytest.raises(CheckpointError):
        read_torch_file(tmp_path / "w")
