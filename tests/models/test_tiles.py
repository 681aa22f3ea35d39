"""Tokens sorted by expert and cut into tiles."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spqr_jax.models.products import plain_linear
from spqr_jax.models.tiles import NO_EXPERT, Tiles, gathered, multiply_tiles, scattered, tile_rows, tiles_of
from spqr_jax.models.weights import Block
from spqr_jax.solver import Hessian, accumulate_in_stack

EXPERTS, CHOICES = 6, 2

cut = jax.jit(tiles_of, static_argnums=(1, 2))
only = jax.jit(Tiles.only)


def routes(kind):
    """int32 [tokens, choices], different experts for each token."""
    rng = np.random.default_rng(3)
    if kind == "one expert":
        return np.full((50, 1), 4, np.int32)
    if kind == "one token":
        return np.array([[5, 2]], np.int32)
    experts = 4 if kind == "two experts without tokens" else EXPERTS
    return np.argsort(rng.random((75, experts)), axis=1)[:, :CHOICES].astype(np.int32)


ROUTES = pytest.mark.parametrize("kind", ["any", "one expert", "one token", "two experts without tokens"])


def covered(tiles, which):
    """The experts' pairs as the tiles in use read them, in order."""
    pairs = [[] for _ in which]
    ends = tiles.first + tiles.counts
    for tile in range(tiles.number):
        expert, begin = tiles.expert[tile], tiles.begin[tile]
        pairs[expert] += tiles.order[begin : min(begin + tiles.rows, ends[expert])].tolist()
    return pairs


@ROUTES
@pytest.mark.parametrize("which", [range(EXPERTS), [4, NO_EXPERT, 0]])
def test_tiles_cover_each_expert_s_pairs_once_and_in_order(kind, which):
    chosen = routes(kind)
    tiles = jax.device_get(only(cut(chosen, EXPERTS, 8), np.array(which, np.int32)))
    want = [np.flatnonzero(chosen.reshape(-1) == expert).tolist() for expert in which]
    assert covered(tiles, which) == want
    assert tiles.number == sum(-(-len(pairs) // 8) for pairs in want) <= len(tiles.expert)


@ROUTES
def test_pairs_are_sorted_and_put_back(kind):
    chosen = routes(kind)
    tiles, flat = cut(chosen, EXPERTS, 8), chosen.reshape(-1, 1)
    ordered = jax.jit(gathered)(flat, tiles)
    assert np.all(np.diff(np.asarray(ordered)[:, 0]) >= 0)
    np.testing.assert_array_equal(jax.jit(scattered)(ordered, tiles), flat)


def block_of_experts(width, out):
    rng = np.random.default_rng(1)
    return Block({f"experts.{e}.w": rng.standard_normal((out, width)).astype(np.float32) for e in range(EXPERTS)})


NAMES = tuple((f"experts.{expert}.w",) for expert in range(EXPERTS))


@ROUTES
def test_products_are_those_of_each_pair_s_expert(kind):
    """Ragged tiles, experts without tokens, all tokens at one expert."""
    chosen, block = routes(kind).reshape(-1), block_of_experts(12, 7)
    x = np.random.default_rng(2).standard_normal((len(chosen), 12)).astype(np.float32)
    want = np.stack([block[f"experts.{expert}.w"] @ row for expert, row in zip(chosen, x, strict=True)])

    def run(block, x):
        tiles = tiles_of(jnp.asarray(chosen), EXPERTS, rows=8)
        (results,) = multiply_tiles(plain_linear, block, NAMES, gathered(x, tiles), tiles)
        return scattered(results, tiles)

    np.testing.assert_allclose(jax.jit(run)(block, x), want, atol=1e-5)
    probe = np.random.default_rng(4).standard_normal(want.shape).astype(np.float32)
    by_block, by_x = jax.jit(jax.grad(lambda block, x: jnp.vdot(probe, run(block, x)), argnums=(0, 1)))(block, x)
    by_pair = [block[f"experts.{expert}.w"].T @ g for expert, g in zip(chosen, probe, strict=True)]
    np.testing.assert_allclose(by_x, np.stack(by_pair), atol=1e-5)
    for expert in range(EXPERTS):
        here = chosen == expert
        np.testing.assert_allclose(by_block[f"experts.{expert}.w"], probe[here].T @ x[here], atol=1e-4)


@pytest.mark.parametrize(("experts", "choices"), [(16, 2), (16, 4), (128, 8)])
def test_work_is_in_proportion_to_active_experts(experts, choices):
    """Counted while it runs: rows that are multiplied, against tokens times experts that are active."""
    tokens, multiplied = 512, []

    def counting(name, w, x):
        jax.debug.callback(lambda: multiplied.append(len(x)))
        return x @ w.T

    rng = np.random.default_rng(0)
    chosen = np.argsort(rng.random((tokens, experts)), axis=1)[:, :choices].astype(np.int32)
    names = tuple((f"experts.{expert}.w",) for expert in range(experts))
    block = Block({name: np.ones((4, 4), np.float32) for (name,) in names})

    def run(x):
        tiles = tiles_of(jnp.asarray(chosen), experts)
        return multiply_tiles(counting, block, names, x, tiles)

    jax.block_until_ready(jax.jit(run)(np.ones((tokens * choices, 4), np.float32)))
    jax.effects_barrier()
    active = tokens * choices
    assert active <= sum(multiplied) <= 1.5 * active


def test_rows_of_a_tile_follow_the_pairs_of_an_expert():
    assert [tile_rows(*sizes) for sizes in [(2048, 16), (8192, 128), (2, 8), (1 << 20, 8)]] == [64, 32, 16, 256]


def test_a_stack_of_hessians_gets_rows_at_one_place_and_counts_no_padding():
    x = np.random.default_rng(0).standard_normal((10, 12)).astype(np.float32)
    x[6:] = 0.0
    start = Hessian(np.ones((3, 12, 12), np.float32), np.ones(3, np.float32))
    total = jax.jit(accumulate_in_stack)(start, np.int32(1), x)
    np.testing.assert_array_equal(total.tokens, [1, 7, 1])
    np.testing.assert_array_equal(total.gram[::2], start.gram[::2])
    np.testing.assert_allclose(np.triu(total.gram[1]), np.triu(1 + x.T @ x), rtol=1e-5, atol=1e-5)
