"""Large arrays of a checkpoint: written in chunks, read in bands of rows, and left on disk where rows are enough."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from support.problems import TINY

from spqr_jax import CheckpointError, SpQRConfig, load, perplexity, quantize, save
from spqr_jax._compat import orbax_v1
from spqr_jax.checkpoint import CheckpointSource, chunks, content_digest, reading, stored
from spqr_jax.checkpoint.description import orbax_context
from spqr_jax.evaluate.fidelity import compare
from spqr_jax.models import dense as dense_models
from spqr_jax.models.weights import random_decoder
from spqr_jax.stream import outer as parts

KIB = 1024
WIDE = dataclasses.replace(TINY, vocab_size=4000)  # matrices of 1000 KiB outside of the blocks
WINDOWS = np.random.default_rng(0).integers(0, 4000, (2, 32)).astype(np.int32)


@pytest.fixture(scope="module")
def models():
    """Dense embeddings, of which one is the output head, too."""
    dense = random_decoder(WIDE, seed=0)
    packed_head = quantize(dense, None, dataclasses.replace(SpQRConfig.rtn(3), head_bits=8))
    tied = quantize(random_decoder(dataclasses.replace(WIDE, tied_head=True), seed=0), None, SpQRConfig.rtn(3))
    return {"dense": dense, "packed head": packed_head, "tied": tied}


@pytest.fixture
def small_sizes(monkeypatch):
    """What is large for this module's models."""
    monkeypatch.setattr(chunks, "_CHUNK_BYTES", 32 * KIB)
    monkeypatch.setattr(stored, "_BAND_BYTES", 128 * KIB)
    monkeypatch.setattr(reading, "_READ_AT_ONCE", 200 * KIB)
    monkeypatch.setattr(reading, "_HELD_BYTES", 400 * KIB)


@pytest.fixture
def one_chunk(monkeypatch):
    """Checkpoints are written as by older versions."""
    monkeypatch.setattr(chunks, "_CHUNK_BYTES", 1 << 40)


def bytes_read() -> int:
    """Bytes that this process has read from files so far."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["rchar"])


@pytest.mark.parametrize(
    ("shape", "itemsize", "chunk"),
    [
        ((151936, 896), 4, (128, 896)),
        ((4096, 4096), 2, (1024, 1024)),
        ((896, 2432), 2, (896, 608)),
        ((50257, 768), 4, (1733, 768)),  # 29 x 1733 rows: larger chunks than asked for
    ],
)
def test_chunks_are_large_enough(shape, itemsize, chunk):
    asked = chunks.chunk_bytes(shape, itemsize)
    assert chunks._chunk_shape(shape, asked // itemsize) == chunk


@pytest.mark.parametrize("shape", [(32003, 4096), (151937,), (4096, 128)])
def test_arrays_stay_whole(shape):
    """A prime number of rows would become a chunk for each row; the others are small."""
    assert chunks.chunk_bytes(shape, 4) is None


def test_chunks_on_disk_are_those_asked_for(tmp_path, models, small_sizes):
    save(tmp_path / "m", models["dense"])
    source = CheckpointSource(tmp_path / "m")
    embedding = source.lean_outer().embed_tokens
    assert embedding.is_cut
    assert embedding.band == 500  # four chunks of 125 rows of 64 numbers: at most 128 KiB
    with orbax_context():
        described = orbax_v1().checkpointables_metadata(tmp_path / "m" / "model").metadata["params"]
    chunk = described["embed_tokens"]["values"].storage_metadata.chunk_shape
    assert tuple(chunk) == chunks._chunk_shape((4000, 64), 32 * KIB // 4) == (125, 64)


@pytest.mark.parametrize("name", ["dense", "packed head", "tied"])
def test_chunks_change_no_content(tmp_path, models, small_sizes, name, monkeypatch):
    save(tmp_path / "chunks", models[name])
    monkeypatch.setattr(chunks, "_CHUNK_BYTES", 1 << 40)
    save(tmp_path / "whole", models[name])
    assert content_digest(tmp_path / "chunks") == content_digest(tmp_path / "whole")
    for path in ("chunks", "whole"):
        loaded = load(tmp_path / path)
        for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(models[name]), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


def test_rows_are_read_alone(tmp_path, models, small_sizes):
    save(tmp_path / "m", models["dense"])
    head, expected = CheckpointSource(tmp_path / "m").lean_outer().lm_head, np.asarray(models["dense"].outer.lm_head)
    np.testing.assert_array_equal(np.concatenate([band for _, band in head.walk()]), expected)
    before = bytes_read()
    np.testing.assert_array_equal(head.rows(490, 20), expected[490:510])  # of two bands
    assert bytes_read() - before < expected.nbytes / 3


@pytest.mark.parametrize("name", ["dense", "packed head", "tied"])
def test_measuring_leaves_large_matrices_on_disk(tmp_path, models, small_sizes, name):
    save(tmp_path / "m", models[name])
    source, model = CheckpointSource(tmp_path / "m"), models[name]
    lean = parts.lean_outer(source)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(lean) if isinstance(leaf, jax.Array))
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(model.outer))
    assert held <= whole - 4 * 4000 * 64
    assert source.outer_memory().held == pytest.approx(held, rel=1e-3)  # room for outliers
    losses = perplexity(source, WINDOWS).window_losses
    np.testing.assert_allclose(losses, perplexity(model, WINDOWS).window_losses, rtol=1e-6)


def test_models_on_disk_are_compared(tmp_path, models, small_sizes, monkeypatch):
    """The output heads are read by pieces of the same rows: one is packed, one is on disk."""
    monkeypatch.setattr(dense_models, "PIECE_WEIGHTS", 1500 * WIDE.hidden_size)
    for name in ("dense", "packed head"):
        save(tmp_path / name, models[name])
    dense, packed = (CheckpointSource(tmp_path / name) for name in ("dense", "packed head"))
    expected = compare(models["dense"], models["packed head"], WINDOWS)
    np.testing.assert_allclose(compare(dense, packed, WINDOWS).window_kl, expected.window_kl, rtol=1e-4)


def test_older_checkpoints_are_read_as_well(tmp_path, models, small_sizes, one_chunk):
    """A matrix of one chunk stays on disk where it is the embedding only."""
    for name in ("packed head", "tied"):
        model = models[name]
        save(tmp_path / name, model)
        source = CheckpointSource(tmp_path / name)
        lean = source.lean_outer()
        assert isinstance(lean.embed_tokens, parts.StoredMatrix) == (name != "tied")
        assert not isinstance(lean.lm_head, parts.StoredMatrix)
        losses = perplexity(source, WINDOWS).window_losses
        np.testing.assert_allclose(losses, perplexity(model, WINDOWS).window_losses, rtol=1e-6)


def flip_a_bit(directory: Path) -> None:
    files = [path for path in (directory / "params").rglob("*") if path.is_file() and path.parent.name == "d"]
    file = max(files, key=os.path.getsize)
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 1
    file.write_bytes(bytes(data))


@pytest.mark.parametrize("measure", [load, lambda path: perplexity(CheckpointSource(path), WINDOWS)])
def test_one_flipped_bit_is_found(tmp_path, models, small_sizes, measure):
    save(tmp_path / "m", models["dense"])
    flip_a_bit(tmp_path / "m" / "model")
    with pytest.raises(CheckpointError, match=r"model: leaf (embed_tokens|lm_head)\.values"):
        measure(tmp_path / "m")


def test_a_file_that_changes_is_noticed(tmp_path, models, small_sizes):
    """Rows are verified again when they are read later."""
    save(tmp_path / "m", models["dense"])
    head = CheckpointSource(tmp_path / "m").lean_outer().lm_head
    head.rows(0, 10)
    other = dataclasses.replace(models["dense"].outer, lm_head=models["dense"].outer.lm_head + 1)
    save(tmp_path / "m", dataclasses.replace(models["dense"], outer=other), overwrite=True)
    with pytest.raises(CheckpointError, match=r"leaf lm_head\.values"):
        head.rows(0, 10)


def test_jax_takes_an_array_over_without_a_copy(tmp_path, models, small_sizes):
    save(tmp_path / "m", models["dense"])
    values = CheckpointSource(tmp_path / "m").lean_outer().lm_head.read()
    assert jax.device_put(values).unsafe_buffer_pointer() == values.ctypes.data
