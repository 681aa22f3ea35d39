"""Pieces of weights: what they dequantize to, products that add up, and what cannot be cut."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from support.arrays import random_array
from support.command import spqr
from support.problems import TINY
from support.shared_models import in_ranges

from spqr_jax import ModelError, SpQRConfig, SpQRError, linear, quantize, shard
from spqr_jax.models.decoder import random_decoder
from spqr_jax.parallel import parse_mesh
from spqr_jax.parallel.cut import Split, cut, join, with_equal_lists
from spqr_jax.parallel.plan import block_splits, local_config
from spqr_jax.parallel.sharded import pieces_of

FORMATS = [{}, {"stats_bits": None}, {"group_size": None}, {"group_size": 64}, {"tile": 8}, {"bits": 4, "outliers": 0}]
SPLITS = [
    Split(0, 32, (0, 32, 64, 96)),
    Split(0, 64, (0, 0, 64, 64)),  # two devices with the same heads of keys and values
    Split(0, 48, (0, 48, 96)),  # a vocabulary that ends within the last piece
    Split(1, 32, (0, 32, 64, 96)),
]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_pieces_are_valid_and_come_together_again(form, split):
    array = in_ranges(random_array((128, 128), **form), 4)
    pieces = [cut(array, split, device) for device in range(len(split.starts))]
    pieces = with_equal_lists(pieces, max(piece.nnz for piece in pieces))
    assert len({jax.tree.structure(piece) for piece in pieces}) == 1
    for piece in pieces:
        piece.validate()
    joined = join(pieces, split, array.shape, array.group_size)
    assert jax.tree.structure(joined) == jax.tree.structure(array)
    for leaf, other in zip(jax.tree.leaves(joined), jax.tree.leaves(array), strict=True):
        assert leaf.dtype == other.dtype
        np.testing.assert_array_equal(leaf, other)


def test_products_of_columns_add_up():
    array = in_ranges(random_array((64, 128)), 4)
    x = np.random.default_rng(0).standard_normal((3, 128)).astype(np.float32)
    split = Split(1, 32, (0, 32, 64, 96))
    parts = [linear(cut(array, split, d), x[:, 32 * d : 32 * d + 32]) for d in range(4)]
    np.testing.assert_allclose(sum(parts), linear(array, x), rtol=0, atol=1e-5 * np.abs(parts).max())


def test_inputs_ordered_together_cannot_be_cut():
    with pytest.raises(SpQRError, match=r"--input-shards 2 or a multiple of it .* or with --order identity"):
        cut(random_array((64, 128)), Split(1, 64, (0, 64)), 0)
    cut(random_array((64, 128), permuted=False), Split(1, 64, (0, 64)), 0)


def test_pieces_are_whole_tiles_and_groups():
    with pytest.raises(SpQRError, match=r"24 rows of 48 are not whole tiles of 16.*stats_bits=16"):
        cut(random_array((48, 32)), Split(0, 24, (0, 24)), 0)
    with pytest.raises(SpQRError, match=r"48 inputs of 96 are not whole groups of 32.*smaller group_size"):
        cut(random_array((32, 96), group_size=32, permuted=False), Split(1, 48, (0, 48)), 0)


def test_heads_and_widths_are_shared_evenly():
    with pytest.raises(ModelError, match="3 devices cannot share 4 query heads evenly: use 1 or 2 or 4 devices"):
        local_config(TINY, 3)
    six = dataclasses.replace(TINY, num_heads=12, num_kv_heads=4)
    with pytest.raises(ModelError, match="6 devices cannot share 4 key-value heads"):
        local_config(six, 6)
    small = local_config(TINY, 4)
    assert (small.num_heads, small.num_kv_heads, small.intermediate_size) == (1, 1, 24)
    assert block_splits(TINY, TINY.kind(0), 4)["k_proj"] == Split(0, 16, (0, 0, 16, 16))


def test_a_mesh_needs_the_axis(tiny_model):
    mesh = parse_mesh("model=1")
    shard(tiny_model, mesh)
    with pytest.raises(SpQRError, match="the mesh has no axis 'model', only 'data'"):
        shard(tiny_model, jax.sharding.Mesh(mesh.devices, ("data",)))


def test_a_weight_that_cannot_be_shared_is_named():
    with pytest.raises(SpQRError, match="2 devices cannot share o_proj: its inputs are ordered"):
        pieces_of("o_proj", random_array((64, 128)), Split(1, 64, (0, 64)), 2)


def test_shards_that_do_not_fit_a_model_are_refused_before_calibration(tiny_batches):
    with pytest.raises(SpQRError, match=r"down_proj: input_shards=4 cuts 96 inputs .* may be 1, 2, 3, 6"):
        quantize(random_decoder(TINY, 0), tiny_batches, SpQRConfig(input_shards=4))


def test_the_command_line_says_which_mesh_it_wants(tmp_path):
    odd = spqr("generate", "demo", "--prompt", "x", "--mesh", "data=2", cwd=tmp_path)
    assert odd.returncode == 2
    assert "--mesh must be model=N" in odd.stderr
    many = spqr("generate", "demo", "--prompt", "x", "--mesh", "model=4096", cwd=tmp_path)
    assert many.returncode == 2
    assert "needs 4096 devices, but JAX has" in many.stderr
