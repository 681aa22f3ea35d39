"""Which files of a directory are the model, and what is said of those that are none."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from spqr_jax import ModelError
from spqr_jax.files import safetensors_file
from spqr_jax.files.safetensors_file import SafetensorsReader, refuse_adapter

MODEL = {"a": np.arange(6, dtype=np.float32).reshape(2, 3)}
STRAY = {"b": np.ones(2, np.float32)}
INDEX = "model.safetensors.index.json"


def write(directory, **files):
    """Files by name, `.` as `__`: tensors, or anything that JSON holds, or bytes."""
    for name, content in files.items():
        path = directory / name.replace("__", ".")
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif path.suffix == ".safetensors":
            save_file(content, path)
        else:
            path.write_text(json.dumps(content))
    return directory


def names(directory):
    return set(SafetensorsReader(directory).shapes())


# ---- which files -------------------------------------------------------------------------------


@pytest.mark.parametrize("stray", ["consolidated", "adapter_model", "model-q4", "model-00001-of-00002", "optimizer"])
def test_model_safetensors_is_the_model_whatever_lies_beside(tmp_path, stray):
    write(tmp_path, model__safetensors=MODEL, **{f"{stray}__safetensors": STRAY}, pytorch_model__bin=b"x")
    assert names(tmp_path) == {"a"}
    index = {"weight_map": {"b": f"{stray}.safetensors"}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert names(tmp_path) == {"a"}


def test_an_index_names_the_files(tmp_path):
    write(tmp_path, x__safetensors=MODEL, y__safetensors=STRAY | MODEL, z__safetensors={"c": np.ones(1)})
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}))
    assert names(tmp_path) == {"a", "b"}
    np.testing.assert_array_equal(SafetensorsReader(tmp_path).read("a"), MODEL["a"])


def test_links_are_followed_as_the_hub_has_them(tmp_path):
    (tmp_path / "blobs").mkdir()
    save_file(MODEL, tmp_path / "blobs" / "123")
    (tmp_path / "snapshot").mkdir()
    os.symlink("../blobs/123", tmp_path / "snapshot" / "model.safetensors")
    assert names(tmp_path / "snapshot") == {"a"}
    (tmp_path / "blobs" / "123").unlink()
    with pytest.raises(ModelError, match="a link to a missing file"):
        names(tmp_path / "snapshot")


def test_a_file_that_the_configuration_asks_for_is_read(tmp_path):
    write(tmp_path, model__safetensors=MODEL, other__safetensors=STRAY)
    assert set(SafetensorsReader(tmp_path, "other.safetensors").shapes()) == {"b"}
    for name in ("../m.safetensors", "gone.safetensors"):
        with pytest.raises(ModelError, match=r"expected a file in this directory|is missing"):
            SafetensorsReader(tmp_path, name)


def test_without_usual_names_every_file_counts_but_adapters(tmp_path):
    write(
        tmp_path, gptq_model__safetensors=MODEL, part2__safetensors=STRAY, adapter_model__safetensors={"x": np.ones(1)}
    )
    write(tmp_path, consolidated__safetensors={"tok_embeddings.weight": np.ones(1)})
    assert names(tmp_path) == {"a", "b"}


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, r"has no \*.safetensors file.*such as pickles"),
        ({"pytorch_model__bin": b"x"}, "only pytorch_model.bin. Pickle files are not read"),
        ({"adapter_model__safetensors": MODEL, "adapter_config__json": {}}, "a LoRA adapter, not a model: merge it"),
        (
            {"consolidated__safetensors": MODEL},
            "only in consolidated.safetensors, which uses Mistral's own tensor names",
        ),
        ({"model-q4__gguf": b"GGUF"}, "but model-q4.gguf: give that file"),
        (
            {"model-00001-of-00003__safetensors": MODEL},
            "of 3 weight files, these are missing: model-00002-of-00003.safetensors, model",
        ),
        ({"x__safetensors": MODEL, "y__safetensors": MODEL}, "tensor a is in both x.safetensors and y.safetensors"),
    ],
)
def test_directories_without_a_model_say_what_they_hold(tmp_path, files, says):
    write(tmp_path, **files)
    with pytest.raises(ModelError, match=says):
        SafetensorsReader(tmp_path)


def test_an_adapter_alone_is_told_before_its_missing_configuration(tmp_path):
    refuse_adapter(tmp_path)
    write(tmp_path, adapter_model__safetensors=MODEL, adapter_config__json={})
    with pytest.raises(ModelError, match="a LoRA adapter, not a model"):
        refuse_adapter(tmp_path)


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ([], "holds .*expected a JSON object"),
        ({}, "lacks weight_map"),
        ({"weight_map": ["x"]}, "weight_map is .*expected an object"),
        ({"weight_map": {}}, "weight_map"),
        ({"weight_map": {"a": 7}}, r"weight_map\.a is 7, expected a string"),
        ({"weight_map": {"a": "../x.safetensors"}}, r"weight_map\.a is '\.\./x.*in the same directory"),
        ({"weight_map": {"a": "/etc/passwd"}}, "in the same directory"),
        ({"weight_map": {"a": "C:\\x.safetensors"}}, "in the same directory"),
        ({"weight_map": {"a": ""}}, "in the same directory"),
        (
            {"weight_map": {"a": "x.safetensors", "q": "x.safetensors"}},
            r"names 1 tensors that are not in its files \(q\)",
        ),
        ({"weight_map": {"a": "gone.safetensors"}}, "names files that are missing: gone.safetensors"),
    ],
)
def test_an_index_is_not_trusted(tmp_path, index, says):
    write(tmp_path, x__safetensors=MODEL)
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelError, match=says):
        SafetensorsReader(tmp_path)


# ---- one file ----------------------------------------------------------------------------------


def with_header(header, numbers=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + numbers


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty: fetch the file again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a Git LFS pointer.*git lfs pull"),
        (b"<html>not found</html>" * 9, "cannot be read as safetensors"),
        (b"\xff" * 64, "cannot be read as safetensors"),
        (with_header(b"{"), "cannot be read as safetensors"),
        (with_header(b"\xff\xfe{}"), "cannot be read as safetensors"),
        (with_header([]), "cannot be read as safetensors"),
        (with_header({"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)), "F99"),
        (with_header({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}, bytes(4)), "safetensors"),
        (with_header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}), "fetch the file again"),
        (with_header({"a": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}, bytes(8)), "a has the type C64"),
        (with_header({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, bytes(1)), "a has the type F4"),
    ],
)
def test_damaged_files_are_one_message(tmp_path, content, says):
    write(tmp_path, model__safetensors=content)
    with pytest.raises(ModelError, match=says) as caught:
        SafetensorsReader(tmp_path)
    assert "model.safetensors" in str(caught.value)


@pytest.mark.parametrize("what", ["open", "listdir"])
def test_what_must_not_be_read_is_one_message(tmp_path, monkeypatch, what):
    write(tmp_path, model__safetensors=MODEL)

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(*((type(tmp_path), "open") if what == "open" else (safetensors_file.os, "listdir")), refuse)
    with pytest.raises(ModelError, match="cannot be read: Permission denied"):
        SafetensorsReader(tmp_path)


def test_a_directory_in_place_of_the_file_is_one_message(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(ModelError, match="cannot be read"):
        SafetensorsReader(tmp_path)


def test_a_file_that_shrinks_later_is_one_message(tmp_path):
    write(tmp_path, model__safetensors=MODEL)
    reader = SafetensorsReader(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 90)
    with pytest.raises(ModelError, match="became shorter"):
        reader.read("a")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be read"):
        reader.read("a")


TYPES = [np.float32, np.float16, np.float64, ml_dtypes.bfloat16, np.int8, np.uint8, np.int32, np.int64, np.bool_,
         ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float8_e8m0fnu]  # fmt: skip


def test_types_are_read_as_they_are(tmp_path):
    values = {np.dtype(kind).name: np.array([[1, 0], [1, 1]]).astype(kind) for kind in TYPES}
    values |= {"number": np.array(2.0, np.float32), "nothing": np.zeros((0, 3), np.float32)}
    save_file(values, tmp_path / "model.safetensors")
    reader = SafetensorsReader(tmp_path)
    for name, value in values.items():
        read = reader.read(name)
        assert (read.dtype, read.shape, reader.shapes()[name]) == (value.dtype, value.shape, value.shape)
        assert read.tobytes() == value.tobytes()
        assert read.flags.writeable
    assert reader.read("float8_e5m2", np.float32).tolist() == [[1, 0], [1, 1]]
    assert reader.kinds()["float8_e4m3fn"] == "F8_E4M3"


def test_nothing_of_a_file_stays_mapped(tmp_path):
    write(tmp_path, model__safetensors=MODEL)
    reader = SafetensorsReader(tmp_path)
    kept = reader.read("a")
    maps = Path("/proc/self/maps")  # Linux has it
    assert not maps.exists() or str(tmp_path) not in maps.read_text()
    np.testing.assert_array_equal(kept, MODEL["a"])
