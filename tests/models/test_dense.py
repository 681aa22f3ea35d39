"""Pieces of packed matrices made dense: the same numbers as the whole matrix."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.problems import TINY, correlated_problem

from spqr_jax import SpQRConfig, quantize_weight
from spqr_jax.models import dense
from spqr_jax.models.attention import positions
from spqr_jax.models.decoder import embed
from spqr_jax.models.dense import dense_rows, embedding_rows, row_pieces
from spqr_jax.models.weights import random_decoder
from spqr_jax.solver import accumulate_hessian, empty_hessian

CONFIGS = {
    "two levels, outliers, order": SpQRConfig(bits=3, outlier_threshold=0.1, order="activation"),
    "one level": SpQRConfig.gptq(4, 16),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_pieces_are_the_whole(name, monkeypatch):
    w, x = correlated_problem(150, 64)
    array = quantize_weight(w, accumulate_hessian(empty_hessian(64), x), CONFIGS[name])
    assert (array.nnz > 100) == ("outliers" in name)
    monkeypatch.setattr(dense, "PIECE_WEIGHTS", 50 * 64)
    pieces = row_pieces([array, w])
    assert pieces == [(0, 48), (48, 48), (96, 48), (144, 6)]
    parts = [dense_rows(array, first, count, jnp.float32) for first, count in pieces]
    np.testing.assert_array_equal(np.concatenate(parts), array.to_dense())
    assert dense_rows(array, 48, 48, jnp.bfloat16).dtype == jnp.bfloat16
    plain = [dense_rows(w, first, count, jnp.bfloat16) for first, count in pieces]
    np.testing.assert_array_equal(np.concatenate(plain), w)


def test_a_dense_matrix_is_one_piece():
    w = np.zeros((10**4, 10**3), np.float32)
    assert row_pieces([w]) == [(0, 10**4)]
    assert dense_rows(w, 0, 10**4, jnp.float32) is w


def test_a_packed_embedding_is_never_dense_as_a_whole(monkeypatch):
    config = dataclasses.replace(TINY, vocab_size=1000, embedding_scale=3.0)
    outer = random_decoder(config, seed=0).outer
    packed = quantize_weight(outer.embed_tokens, None, SpQRConfig.rtn(4))
    tokens = np.random.default_rng(0).integers(0, 1000, (2, 3, 10)).astype(np.int32)
    tokens[0, 0, :2] = 0, 999
    where = positions(config, 10, np.zeros(3, np.int32), np.int32(0))
    whole = dataclasses.replace(outer, embed_tokens=packed.to_dense())
    expected = [embed(config, whole, jnp.asarray(batch), where) for batch in tokens]
    del whole
    monkeypatch.setattr(dense, "PIECE_WEIGHTS", 100 * config.hidden_size)
    largest = []
    real = dense.dense_rows
    monkeypatch.setattr(dense, "dense_rows", lambda *given: largest.append(real(*given)) or largest[-1])
    tables = embedding_rows(dataclasses.replace(outer, embed_tokens=packed), list(tokens))
    assert len(largest) > 10
    assert max(len(rows) for rows in largest) == 96
    ids = jnp.arange(30, dtype=jnp.int32).reshape(3, 10)
    for table, rows in zip(tables, expected, strict=True):
        np.testing.assert_array_equal(embed(config, table, ids, where), rows)
    assert all(isinstance(rows, jax.Array) for rows in largest)
