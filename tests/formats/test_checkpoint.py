from __future__ import annotations

import dataclasses
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spqr_jax import CheckpointError, SpQRArray, SpQRConfig, load, quantize, save
from spqr_jax.checkpoint import CheckpointFolder, CheckpointSink, CheckpointSource, content_digest
from spqr_jax.checkpoint.reading import read_header, read_weights
from spqr_jax.quantized import is_quantized


@pytest.fixture(scope="module")
def quantized(tiny_model, tiny_batches):
    return quantize(tiny_model, tiny_batches, SpQRConfig())


def test_blocks_that_are_read_stack(saved, quantized):
    """The blocks of one model have one structure, whatever their outliers are; a checkpoint holds no unused entries."""
    blocks = load(saved).layers
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)
    assert stacked.q_proj.codes.shape == (len(blocks), *blocks[0].q_proj.codes.shape)
    assert len({block.q_proj.nnz for block in blocks}) > 1
    for block, expected in zip(blocks, quantized.layers, strict=True):
        np.testing.assert_array_equal(block.q_proj.trimmed().outlier_cols, expected.q_proj.trimmed().outlier_cols)


@pytest.fixture(scope="module")
def saved(quantized, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "model"
    save(path, quantized, SpQRConfig(), provenance={"model": "tiny"})
    return path


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def test_round_trip_is_bit_exact(saved, quantized):
    loaded = load(saved)
    assert jax.tree.structure(loaded) == jax.tree.structure(quantized)
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(quantized), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_bfloat16_and_dense_models_too(tiny_model, tmp_path):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tiny_model)
    save(tmp_path / "m", half)
    loaded = load(tmp_path / "m")
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(half), strict=True):
        assert a.dtype == b.dtype == jnp.bfloat16
        np.testing.assert_array_equal(a, b)
    assert CheckpointSource(tmp_path / "m").quantization is None


def test_it_tells_where_it_comes_from(saved):
    source = CheckpointSource(saved)
    assert source.quantization == SpQRConfig()
    assert source.provenance == {"model": "tiny"}


def test_nothing_is_pickled_and_files_are_few(saved):
    files = [path for path in saved.rglob("*") if path.is_file()]
    assert not [path for path in files if path.suffix in (".pkl", ".pickle", ".pt", ".bin")]
    assert len(files) < 150


def header_file(directory):
    found = [
        path for path in (directory / "config").rglob("*") if path.is_file() and b"format_version" in path.read_bytes()
    ]
    assert len(found) == 1
    return found[0]


def edit_header(directory, change):
    path = header_file(directory)
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_another_version_is_refused(copy):
    edit_header(copy / "model", lambda values: values.update(format_version=99))
    with pytest.raises(CheckpointError, match="format version 99, but this program reads version 1"):
        load(copy)


def test_a_changed_checksum_names_the_leaf(copy):
    def change(values):
        values["weights"]["q_proj"]["leaves"]["codes"]["sha256"] = "0" * 64

    edit_header(copy / "layers" / "00001", change)
    with pytest.raises(CheckpointError, match=r"00001.*q_proj\.codes.*checksum"):
        load(copy)


@pytest.mark.parametrize(("field", "value"), [("dtype", "float32"), ("shape", [1, 2])])
def test_types_and_shapes_are_compared_before_reading(copy, field, value):
    def change(values):
        values["weights"]["up_proj"]["leaves"]["tile_stats"][field] = value

    edit_header(copy / "layers" / "00000", change)
    with pytest.raises(CheckpointError, match=r"up_proj\..*tile_stats"):
        load(copy)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("bits", 4, r"codes\.shape is \[96, 12\], expected \[96, 16\]"),
        ("bits", "4", r"up_proj\.bits is '4', expected a whole number"),
        ("nnz", 0, r"outlier_cols\.shape"),
        ("group_size", 2**40, "group_size is"),
        ("shape", [64, 32], "expected"),
        ("shape", 5, "expected"),
        ("kind", "huh", "kind is 'huh', expected 'spqr' or 'dense'"),
        ("leaves", ["codes"], "leaves is"),
        ("leaves", {"codes": {"dtype": "V1000000", "shape": [1], "sha256": "0"}}, "dtype is 'V1000000'"),
    ],
)
def test_an_edited_description_is_refused(copy, key, value, says):
    edit_header(copy / "layers" / "00000", lambda values: values["weights"]["up_proj"].update({key: value}))
    with pytest.raises(CheckpointError, match=says):
        load(copy)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("provenance", 5, "provenance is 5"),
        ("layer_stats", {"lm_head": 1.0}, r"layer_stats\.lm_head is 1.0"),
        ("layer_stats", {"\ud800": {"output_error": "small"}}, "output_error is 'small'"),
        ("model", None, "lacks vocab_size"),
        ("model", {"vocab_size": [1]}, "lacks hidden_size|vocab_size is"),
        ("quantization", {"bits": 3.5}, "bits is 3.5"),
        ("quantization", {"rules": [{"pattern": "(("}]}, "not a regular expression"),
        ("format_version", 99, "format version 99"),
    ],
)
def test_an_edited_configuration_is_refused(copy, key, value, says):
    edit_header(copy / "model", lambda values: values.update({key: value}))
    with pytest.raises(CheckpointError, match=says) as caught:
        CheckpointSource(copy)
    assert str(copy) in str(caught.value)
    str(caught.value).encode()  # it can be printed


def test_arrays_far_larger_than_their_files_are_not_read(copy):
    """A description that is consistent in itself, of 64 GB in a few files."""
    size = 1 << 17

    def change(values):
        values["weights"]["lm_head"]["shape"] = [size, size]
        values["weights"]["lm_head"]["leaves"]["values"]["shape"] = [size, size]

    edit_header(copy / "model", change)
    header = read_header(copy / "model")
    expected = {"embed_tokens": (256, 64), "final_norm": (64,), "lm_head": (size, size)}
    with pytest.raises(CheckpointError, match=r"68719.* bytes"):
        read_weights(copy / "model", header, expected)


@pytest.mark.parametrize(
    ("key", "value"),
    [("model", "x"), ("model", {}), ("quantization", 7), ("provenance", ["x"]), ("layer_stats", [1]),
     ("layer_stats", {"lm_head": 3}), ("layer_stats", {"lm_head": {"output_error": "small"}}), ("weights", "none")],
)  # fmt: skip
def test_a_description_that_is_nonsense_is_refused(copy, key, value):
    edit_header(copy / "model", lambda values: values.update({key: value}))
    with pytest.raises(CheckpointError, match="model: "):
        load(copy)


def test_provenance_is_a_dictionary_from_the_start(tmp_path, quantized):
    with pytest.raises(CheckpointError, match="provenance must be a dictionary, got list"):
        save(tmp_path / "m", quantized, provenance=["tiny"])
    assert list(tmp_path.iterdir()) == []


def data_files(directory):
    return sorted(
        (p for p in (directory / "params").rglob("*") if p.is_file() and "/d/" in str(p)), key=os.path.getsize
    )


def test_truncated_data_is_refused(copy):
    for file in data_files(copy / "layers" / "00001"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=r"00001.*truncated.*leaf \w+\.\w+"):
        load(copy)


def test_one_flipped_bit_is_found(copy):
    file = data_files(copy / "layers" / "00001")[-1]
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="00001"):
        load(copy)


def test_missing_and_swapped_blocks_are_refused(copy):
    os.rename(copy / "layers" / "00001", copy / "layers" / "gone")
    with pytest.raises(CheckpointError, match=r"00001 is missing"):
        load(copy)
    os.rename(copy / "layers" / "00000", copy / "layers" / "00001")
    os.rename(copy / "layers" / "gone", copy / "layers" / "00000")
    with pytest.raises(CheckpointError, match="says that it is block 1, expected 0"):
        load(copy)


def test_a_directory_of_something_else_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        load(tmp_path)


def test_existing_directories_are_kept_unless_asked(copy, quantized):
    before = sorted(copy.rglob("*"))
    with pytest.raises(CheckpointError, match="exists already"):
        save(copy, quantized)
    assert sorted(copy.rglob("*")) == before
    save(copy, quantized, provenance={"again": True}, overwrite=True)
    assert CheckpointSource(copy).provenance == {"again": True}
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_write_leaves_nothing(tmp_path, quantized, error):
    def write():
        with CheckpointSink(tmp_path / "m", quantized.config) as sink:
            sink.put_block(0, quantized.layers[0])
            raise error

    with pytest.raises(error):
        write()
    assert list(tmp_path.iterdir()) == []


def assert_same_weight(weight, expected):
    """Apart from unused entries at the end of the outliers."""
    if is_quantized(weight):
        weight, expected = weight.trimmed(), expected.trimmed()
    for a, b in zip(jax.tree.leaves(weight), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def test_finished_blocks_are_taken_over(tmp_path, quantized):
    folder = CheckpointFolder(tmp_path / "parts", quantized.config, SpQRConfig())
    folder.record("layers.1.q_proj", {"output_error": 0.5})
    for index in (0, 1):
        folder.put_block(index, quantized.layers[index])
    (tmp_path / "parts" / "layers" / "00002.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "parts" / "tokenizer.json").write_text("cut")
    again = CheckpointFolder(tmp_path / "parts", quantized.config, SpQRConfig())
    again.adopt({"0": folder.digest(0), 1: folder.digest(1)})
    assert again.digests() == folder.digests()
    assert again.layer_stats == {"layers.1.q_proj": {"output_error": 0.5}}
    assert again.missing()[0] == "2" or len(quantized.layers) == 2
    assert [path.name for path in sorted(tmp_path.glob("parts/layers/*"))] == ["00000", "00001"]
    for name, weight in again.block(1).items():
        assert_same_weight(weight, getattr(quantized.layers[1], name))
    again.put_outer(quantized.outer)
    again.adopt({0: folder.digest(0)})
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.glob("parts/*"))] == ["parts/layers"]
    with pytest.raises(CheckpointError, match=r"block 1, is damaged: .*00001 is missing.*; begin again with --restart"):
        again.adopt(folder.digests())


def test_a_finished_block_that_was_damaged_or_changed_is_refused(tmp_path, quantized):
    folder = CheckpointFolder(tmp_path / "parts", quantized.config)
    folder.put_block(0, quantized.layers[0])
    with pytest.raises(CheckpointError, match="block 0, is damaged: it is not the one that the run wrote"):
        folder.adopt({0: "0" * 64})
    largest = max((tmp_path / "parts").rglob("d/*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(bytes(largest.stat().st_size))
    with pytest.raises(CheckpointError, match="block 0, is damaged"):
        folder.adopt(folder.digests())


def test_the_digest_is_of_the_content_alone(tmp_path, quantized, saved, copy):
    save(tmp_path / "again", quantized, SpQRConfig(), provenance={"model": "tiny"})
    digest = content_digest(saved)
    assert digest == content_digest(copy) == content_digest(tmp_path / "again")
    assert digest == content_digest(saved, verify=False)
    save(tmp_path / "other", quantized, SpQRConfig(), provenance={"model": "other"})
    (copy / "tokenizer.json").write_text("{}")
    outer = dataclasses.replace(quantized.outer, final_norm=quantized.outer.final_norm * 2)
    changed = dataclasses.replace(quantized, outer=outer)
    save(tmp_path / "changed", changed, SpQRConfig(), provenance={"model": "tiny"})
    assert len({digest, *map(content_digest, (copy, tmp_path / "other", tmp_path / "changed"))}) == 4


def test_an_incomplete_checkpoint_is_not_finished(tmp_path, quantized):
    with pytest.raises(CheckpointError, match="incomplete"), CheckpointSink(tmp_path / "m", quantized.config) as sink:
        sink.put_block(0, quantized.layers[0])
    assert list(tmp_path.iterdir()) == []


def test_arrays_are_validated_on_load(tmp_path, quantized):
    """Checksums that fit do not make a bad array good."""
    array = quantized.layers[0].q_proj
    assert isinstance(array, SpQRArray)
    cols = np.asarray(array.outlier_cols).copy()
    cols[0] = 60000
    block = quantized.layers[0].replace({"q_proj": dataclasses.replace(array, outlier_cols=jnp.asarray(cols))})
    save(tmp_path / "m", dataclasses.replace(quantized, layers=(block, quantized.layers[1])))
    with pytest.raises(CheckpointError, match=r"q_proj.*outlier_cols are not all in"):
        load(tmp_path / "m")
