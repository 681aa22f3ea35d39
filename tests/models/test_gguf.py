"""GGUF files as people have them: in parts, by any name, edited by hand, damaged."""

from __future__ import annotations

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.family_files import write_gguf

from spqr_jax import ModelError
from spqr_jax.models.gguf import GGUFFile, open_gguf
from spqr_jax.resolve import open_model
from spqr_jax.stream.blocks import collect


def same(a, b):
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(left, right)


def split(folder, model, name="m", no=(0, 1), count=2, total=None):
    """Two parts as gguf-split cuts them: the header in the first, the second block's tensors in the other."""
    first, second = (folder / f"{name}-{index + 1:05d}-of-{count:05d}.gguf" for index in range(2))
    keys = {"split.count": count, "split.tensors.count": total}
    write_gguf(first, model, keys=keys | {"split.no": no[0]}, part=lambda tensor: "blk.1." not in tensor)
    only_split = dict.fromkeys(("context_length", "embedding_length", "block_count"))
    write_gguf(second, model, keys=keys | only_split | {"split.no": no[1]}, part=lambda tensor: "blk.1." in tensor)
    return first, second


def test_any_part_stands_for_the_whole_model(tmp_path, tiny_model):
    for part in split(tmp_path, tiny_model):
        same(collect(open_model(str(part), "float32").source), tiny_model)
    same(collect(open_model(str(tmp_path), "float32").source), tiny_model)  # the folder, too


def test_parts_that_do_not_belong_together_are_refused(tmp_path, tiny_model):
    first, second = split(tmp_path, tiny_model)
    renamed = tmp_path / "model.gguf"
    shutil.copy(first, renamed)
    with pytest.raises(ModelError, match=r"one of 2 parts .* NAME-00001-of-00002"):
        GGUFFile(renamed)
    shutil.copy(first, second)
    with pytest.raises(ModelError, match="part 1 of 2, but its name says 2 of 2"):
        GGUFFile(first)
    second.unlink()
    with pytest.raises(ModelError, match=r"missing in its folder: m-00002-of-00002.gguf"):
        GGUFFile(first)
    with pytest.raises(ModelError, match="hold 21 tensors, expected 22"):
        GGUFFile(split(tmp_path, tiny_model, "short", total=22)[0])


def test_a_file_is_known_by_its_first_bytes(tmp_path, tiny_model):
    for name in ("sha256-9999d473417a8e17", "M.GGUF", "model.bin", "ein Modell [neu].gguf.tmp"):
        same(collect(open_model(str(write_gguf(tmp_path / name, tiny_model)), "float32").source), tiny_model)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "an empty file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "git lfs pull"),
        (b"PK\x03\x04....", "a zip archive"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"\x10\0\0\0\0\0\0\0{\"a\": {}}       ", "a safetensors file: give the directory"),
        (b"lmgg\x01\0\0\0", "older than GGUF"),
        (b"hello", "a file of an unknown type"),
    ],
)  # fmt: skip
def test_other_files_are_told_apart(tmp_path, content, says):
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ModelError, match=says):
        open_model(str(tmp_path / "m.gguf"))


def test_a_folder_of_several_models_asks_which(tmp_path, tiny_model):
    write_gguf(tmp_path / "a.gguf", tiny_model)
    write_gguf(tmp_path / "mmproj-a.gguf", tiny_model)
    same(collect(open_model(str(tmp_path), "float32").source), tiny_model)
    write_gguf(tmp_path / "b.gguf", tiny_model)
    with pytest.raises(ModelError, match=r"several GGUF models: a\.gguf, b\.gguf"):
        open_model(str(tmp_path))


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"attention.head_count_kv": [2, 1]}, r"head_count_kv is \[2, 1\], expected one number, or the same number"),
        ({"feed_forward_length": [96, 96, 96]}, "feed_forward_length"),
        ({"block_count": 2.5}, "block_count is 2.5, expected a whole number"),
        ({"block_count": 0}, "block_count is 0"),
        ({"block_count": 4000}, "holds 21 tensors, fewer than the 4000 blocks"),
        ({"embedding_length": "64"}, "embedding_length is '64'"),
        ({"attention.head_count": None}, "lacks llama.attention.head_count"),
        ({"attention.layer_norm_rms_epsilon": None}, "lacks llama.attention.layer_norm_rms_epsilon"),
        ({"context_length": True}, "context_length is True"),
        ({"attention.value_length": 32}, "value_length is 32, expected the key length, 16"),
        ({"expert_count": 3.0e9}, "expert_count is 3000000000.0"),
        ({"tokenizer.ggml.eos_token_id": "two"}, "eos_token_id is 'two'"),
    ],
)
def test_headers_edited_by_hand_are_refused_in_one_message(tmp_path, tiny_model, keys, says):
    with pytest.raises(ModelError, match=says) as caught:
        open_gguf(GGUFFile(write_gguf(tmp_path / "m.gguf", tiny_model, keys=keys)), jnp.float32)
    assert str(tmp_path / "m.gguf") in str(caught.value)


def test_the_same_number_for_every_block_is_that_number(tmp_path, tiny_model):
    config = tiny_model.config
    keys = {"attention.head_count_kv": [config.num_kv_heads] * 2, "feed_forward_length": [config.intermediate_size] * 2}
    path = write_gguf(tmp_path / "m.gguf", tiny_model, keys=keys)
    same(collect(open_gguf(GGUFFile(path), jnp.float32)), tiny_model)


def test_damaged_files_are_refused_in_one_message(tmp_path, tiny_model):
    whole = write_gguf(tmp_path / "m.gguf", tiny_model).read_bytes()
    damaged = {
        "ends early": whole[:-100],
        "ends in its header": whole[:100],
        "too many entries": whole[:16] + b"\xff" * 8 + whole[24:],
        "big-endian": whole[:4] + b"\0\0\0\3" + whole[8:],
        "the first version": whole[:4] + b"\1\0\0\0" + whole[8:],
    }
    for name, content in damaged.items():
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(content)
        with pytest.raises(ModelError, match=f"{name}.gguf cannot be read as GGUF"):
            GGUFFile(path)
