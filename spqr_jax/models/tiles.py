"""Tokens sorted by expert and cut into tiles: each expert multiplies its own tokens only.

A token is sent to k experts. Its k *pairs* (token, choice) are sorted by expert, and each
expert's pairs are cut into tiles of a fixed number of rows. The loop over tiles is as long as
the text demands; the compiled program depends on shapes only.

A tile may reach beyond its expert's last pair. A product's tile then writes rows that belong to
the next experts. These come later in the loop and write them again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero

from spqr_jax.models.products import Linear, products
from spqr_jax.models.weights import Block, joint_name

NO_EXPERT = -1
"""In a list of experts: an expert without tokens."""
_FEWEST_ROWS, _MOST_ROWS = 16, 256  # of a tile


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tiles:
    """Which pairs each expert reads.

    Attributes:
      order: int32 [pairs], the pairs expert by expert. Pair p is choice p % k of token p // k.
      place: int32 [pairs], where each pair stands in `order`.
      chosen: int32 [pairs], the expert of each pair.
      first: int32 [experts], where each expert's pairs begin in `order`.
      counts: int32 [experts], pairs of each expert.
      expert: int32 [most tiles], the expert of each tile: an index into `first` and `counts`.
      begin: int32 [most tiles], where each tile begins in `order`.
      number: int32 scalar, tiles in use.
      rows: rows of a tile; static.
    """

    order: jax.Array
    place: jax.Array
    chosen: jax.Array
    first: jax.Array
    counts: jax.Array
    expert: jax.Array
    begin: jax.Array
    number: jax.Array
    rows: int = dataclasses.field(metadata={"static": True})

    def only(self, which: jax.Array | np.ndarray) -> Tiles:
        """The tiles of some experts, int32 [n], perhaps with `NO_EXPERT`. `expert` then counts within `which`."""
        counts = jnp.where(which == NO_EXPERT, 0, jnp.take(self.counts, which, mode="clip"))
        first = jnp.take(self.first, which, mode="clip")
        return dataclasses.replace(self, **_cut(first, counts, len(self.order), self.rows))

    def of_expert(self, tile: jax.Array) -> jax.Array:
        """Which rows of a tile belong to its expert, bool [rows]."""
        expert, begin = self.expert[tile], self.begin[tile]
        return begin + jnp.arange(self.rows) < self.first[expert] + self.counts[expert]


def tile_rows(pairs: int, experts: int) -> int:
    """Rows of a tile: a power of two, about half of the pairs that an expert gets on average."""
    half = max(1, pairs // (2 * experts))
    return min(max(_FEWEST_ROWS, 1 << (half.bit_length() - 1)), _MOST_ROWS)


def tiles_of(chosen: jax.Array, experts: int, rows: int | None = None) -> Tiles:
    """Sorts pairs by expert and cuts them.

    Args:
      chosen: int32 [..., k], the experts of each token.
      experts: how many there are.
      rows: of a tile; None for `tile_rows`.
    """
    chosen = chosen.reshape(-1).astype(jnp.int32)
    order = jnp.argsort(chosen, stable=True).astype(jnp.int32)
    pairs = len(chosen)
    place = jnp.zeros(pairs, jnp.int32).at[order].set(jnp.arange(pairs, dtype=jnp.int32), unique_indices=True)
    counts = jnp.sum(chosen[:, None] == jnp.arange(experts), axis=0, dtype=jnp.int32)
    first = jnp.cumsum(counts, dtype=jnp.int32) - counts
    rows = rows or tile_rows(pairs, experts)
    return Tiles(order, place, chosen, **_cut(first, counts, pairs, rows), rows=rows)


def _cut(first: jax.Array, counts: jax.Array, pairs: int, rows: int) -> dict[str, Any]:
    """Fields of `Tiles`, for experts whose pairs begin at `first`."""
    number = (counts + (rows - 1)) // rows
    ends = jnp.cumsum(number, dtype=jnp.int32)
    tile = jnp.arange(pairs // rows + min(len(counts), pairs), dtype=jnp.int32)
    expert = jnp.minimum(jnp.sum(tile[:, None] >= ends, axis=1, dtype=jnp.int32), len(counts) - 1)
    begin = first[expert] + (tile - (ends - number)[expert]) * rows
    return {"first": first, "counts": counts, "expert": expert, "begin": begin, "number": ends[-1]}


def gathered(x: jax.Array, tiles: Tiles) -> jax.Array:
    """What each pair holds, expert by expert: [pairs, ...] -> [pairs, ...]."""
    return x.at[tiles.order].get(unique_indices=True, mode="clip")


def scattered(x: jax.Array, tiles: Tiles) -> jax.Array:
    """The inverse of `gathered`."""
    return x.at[tiles.place].get(unique_indices=True, mode="clip")


def each_tile(tiles: Tiles, step: Callable[[jax.Array, Any], Any], start: Any) -> Any:
    """Folds `step(tile, carry)` over the tiles in use, expert by expert."""
    return lax.fori_loop(0, tiles.number, step, start)


def padded(x: jax.Array, tiles: Tiles) -> jax.Array:
    """Rows of pairs, and as many zero rows behind them as a tile may reach beyond the last pair."""
    return jnp.pad(x, ((0, tiles.rows), (0, 0)))


def rows_of(x: jax.Array, tiles: Tiles, tile: jax.Array) -> jax.Array:
    """A tile's rows of what `padded` gave: [pairs + rows, width] -> [rows, width]."""
    return lax.dynamic_slice_in_dim(x, tiles.begin[tile], tiles.rows)


def counted_rows(x: jax.Array, tiles: Tiles, tile: jax.Array) -> jax.Array:
    """`rows_of` with zeros in place of rows that belong to other experts."""
    return jnp.where(tiles.of_expert(tile)[:, None], rows_of(x, tiles, tile), jnp.zeros((), x.dtype))


# ---- products of all experts, with their gradients ----------------------------------------


@dataclasses.dataclass(frozen=True)
class _Rule:
    """How experts multiply: what is static of it."""

    linear: Linear
    names: tuple[tuple[str, ...], ...]  # of each expert's matrices, which read one input

    def of(self, weights: Block, expert: int) -> Callable[[jax.Array], tuple[jax.Array, ...]]:
        return lambda x: tuple(products(self.linear, weights, self.names[expert], x))


def multiply_tiles(
    linear: Linear, block: Block, names: Sequence[tuple[str, ...]], x: jax.Array, tiles: Tiles
) -> list[jax.Array]:
    """Products of each expert's matrices with its own pairs, biases added.

    A gradient by x, or by weights, runs over the same tiles. There are no forward-mode and no second derivatives.

    Args:
      linear: applies one weight; a pure function of its arguments.
      block: with all experts' weights.
      names: for each expert, of its matrices that read `x`.
      x: [pairs, in], expert by expert.
      tiles: of all experts.

    Returns:
      [pairs, out] for each of an expert's matrices.
    """
    rule = _Rule(linear, tuple(names))
    return list(_multiplied(rule, tuple(_only(block, own) for own in rule.names), x, tiles))


def _only(block: Block, names: tuple[str, ...]) -> Block:
    """A block with these matrices and their biases."""
    wanted = (*names, *(name + "_bias" for name in names), joint_name(names))
    return Block({name: block[name] for name in wanted if name in block}, block.kind)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiplied(rule: _Rule, weights: tuple[Block, ...], x: jax.Array, tiles: Tiles) -> tuple[jax.Array, ...]:
    branches = [rule.of(own, expert) for expert, own in enumerate(weights)]
    return _mapped(branches, (x,), tiles)


def _mapped(branches: Sequence[Callable[..., Any]], given: Sequence[jax.Array], tiles: Tiles) -> tuple[jax.Array, ...]:
    """Each expert's function of its own rows: several [pairs, width] -> several [pairs, width]."""
    pairs, given = len(given[0]), [padded(x, tiles) for x in given]
    shapes = jax.eval_shape(branches[0], *(x[: tiles.rows] for x in given))

    def step(tile: jax.Array, results: Any) -> Any:
        rows = lax.switch(tiles.expert[tile], branches, *(rows_of(x, tiles, tile) for x in given))
        write = partial(lax.dynamic_update_slice_in_dim, start_index=tiles.begin[tile], axis=0)
        return tuple(map(write, results, rows))

    start = tuple(jnp.zeros((pairs + tiles.rows, *s.shape[1:]), s.dtype) for s in shapes)
    return tuple(result[:pairs] for result in each_tile(tiles, step, start))


def _multiplied_forward(rule: _Rule, weights: Any, x: Any, tiles: Any) -> Any:
    """Each leaf comes with a flag: whether its gradient is asked for."""
    asked = any(leaf.perturbed for leaf in jax.tree.leaves(weights, is_leaf=_is_flagged))
    weights, x, tiles = jax.tree.map(lambda leaf: leaf.value, (weights, x, tiles), is_leaf=_is_flagged)
    return _multiplied(rule, weights, x, tiles), (weights, x, tiles, () if asked else None)


def _is_flagged(leaf: Any) -> bool:
    return hasattr(leaf, "perturbed")


def _multiplied_back(rule: _Rule, kept: Any, gradients: Any) -> tuple[Any, jax.Array, None]:
    weights, x, tiles, asked = kept
    gradients = [jnp.zeros(g.shape, g.dtype) if isinstance(g, SymbolicZero) else g for g in gradients]

    def back(expert: int) -> Callable[..., tuple[jax.Array]]:
        return lambda x, *gradients: jax.vjp(rule.of(weights[expert], expert), x)[1](gradients)

    branches = [back(expert) for expert in range(len(weights))]
    (by_x,) = _mapped(branches, (x, *gradients), tiles)
    if asked is None:
        return None, by_x, None
    parts = [_by_weights(rule, expert, weights[expert], x, gradients, tiles) for expert in range(len(weights))]
    return tuple(parts), by_x, None


def _by_weights(
    rule: _Rule, expert: int, weights: Block, x: jax.Array, gradients: Sequence[jax.Array], tiles: Tiles
) -> Block:
    """The gradient by one expert's weights, summed tile by tile; None for leaves that have none."""
    leaves, tree = jax.tree.flatten(weights)
    real = [index for index, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    x, gradients = padded(x, tiles), [padded(g, tiles) for g in gradients]
    alone = tiles.only(np.array([expert], np.int32))

    def multiplied(values: list[jax.Array], x: jax.Array) -> tuple[jax.Array, ...]:
        changed = list(leaves)
        for index, value in zip(real, values, strict=True):
            changed[index] = value
        return rule.of(jax.tree.unflatten(tree, changed), expert)(x)

    def step(tile: jax.Array, total: list[jax.Array]) -> list[jax.Array]:
        back = jax.vjp(partial(multiplied, x=rows_of(x, alone, tile)), [leaves[index] for index in real])[1]
        (part,) = back(tuple(counted_rows(g, alone, tile) for g in gradients))
        return list(map(jnp.add, total, part))

    total = each_tile(alone, step, [jnp.zeros_like(leaves[index]) for index in real])
    by_leaf: list[Any] = [None] * len(leaves)
    for index, value in zip(real, total, strict=True):
        by_leaf[index] = value
    return jax.tree.unflatten(tree, by_leaf)


_multiplied.defvjp(_multiplied_forward, _multiplied_back, symbolic_zeros=True)
