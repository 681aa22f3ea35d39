"""What tells two models apart, wherever they come from."""

from __future__ import annotations

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import pytest
from support.family_files import write_gguf
from support.model_files import write_hf

from spqr_jax import save
from spqr_jax.checkpoint import CheckpointSource
from spqr_jax.resolve import open_model
from spqr_jax.stream.blocks import TreeSource


@pytest.fixture(scope="module")
def changed(tiny_model):
    """The model with one other number."""
    norm = tiny_model.outer.final_norm.at[3].add(0.5)
    return dataclasses.replace(tiny_model, outer=dataclasses.replace(tiny_model.outer, final_norm=norm))


def test_trees(tiny_model, changed):
    copy = jax.tree.map(jnp.array, tiny_model)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tiny_model)
    identity = TreeSource(tiny_model).identity()
    assert identity == TreeSource(copy).identity()
    assert len({identity, TreeSource(changed).identity(), TreeSource(half).identity()}) == 3


def test_directories_of_hugging_face(tmp_path, tiny_model, changed):
    folder = write_hf(tmp_path / "model", tiny_model)
    identity = open_model(str(folder)).source.identity()
    (folder / "tokenizer_config.json").write_text("{}")  # it does not change the weights
    assert open_model(str(shutil.copytree(folder, tmp_path / "copy"))).source.identity() == identity
    others = [
        open_model(str(folder), "bfloat16").source,
        open_model(str(write_hf(tmp_path / "changed", changed))).source,
        open_model(str(write_hf(tmp_path / "shards", tiny_model, shards=2))).source,
    ]
    assert len({identity, *(source.identity() for source in others)}) == 4


def test_gguf_files(tmp_path, tiny_model, changed):
    paths = [tmp_path / name for name in ("one.gguf", "changed.gguf")]
    for path, model in zip(paths, (tiny_model, changed), strict=True):
        write_gguf(path, model)
    (tmp_path / "copy").mkdir()
    shutil.copy(paths[0], tmp_path / "copy" / "one.gguf")
    one, other, copy = (open_model(str(path)).source.identity() for path in (*paths, tmp_path / "copy" / "one.gguf"))
    assert one == copy != other


def test_checkpoints(tmp_path, tiny_model, changed):
    for name, model in {"one": tiny_model, "again": tiny_model, "other": changed}.items():
        save(tmp_path / name, model)
    one, again, other = (CheckpointSource(tmp_path / name).identity() for name in ("one", "again", "other"))
    assert one == again != other
