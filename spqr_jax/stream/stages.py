"""A block's stages on one chunk of text, as compiled programs: on to the next stage, or what its matrices read.

A stage is run twice per chunk of calibration text: once with a `linear` that
records its inputs (everything behind them is dead code, which XLA removes), and
once for real, with weights already quantized. Together that is one forward pass
of the block plus the Hessians.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spqr_jax.models.attention import Positions, positions
from spqr_jax.models.config import BlockKind, DecoderConfig
from spqr_jax.models.decoder import STAGES, Block, Linear, Outer, State, logits, plain_linear
from spqr_jax.models.tiles import NO_EXPERT, Tiles, counted_rows, each_tile, padded
from spqr_jax.models.weights import abstract_block
from spqr_jax.product_jit import product_jit
from spqr_jax.solver import Hessian, accumulate_hessian, accumulate_in_stack, cross_gram, empty_hessian

EXPERT_HESSIAN_BYTES = 2**30
"""Hessians of experts that are summed in one pass over the text. With more, the text is gone through again."""


class PairInput(NamedTuple):
    """What the experts of a stage read.

    Attributes:
      names: for each expert, of its weights that read it.
      rows: [pairs, in], the pairs of a token and an expert, expert by expert.
      tiles: which rows each expert reads.
    """

    names: tuple[tuple[str, ...], ...]
    rows: jax.Array
    tiles: Tiles


class InputRecorder:
    """A `linear` that notes what each weight is given and returns zeros.

    Weights that are given the very same array share a Hessian: `groups` holds
    their names together, `inputs` the array once. `pairs` holds what experts are
    given, once for all of a stage.
    """

    def __init__(self) -> None:
        self.groups: list[list[str]] = []
        self.inputs: list[jax.Array] = []
        self.pairs: list[PairInput] = []

    def __call__(self, name: str, w: Any, x: jax.Array) -> jax.Array:
        for names, seen in zip(self.groups, self.inputs, strict=True):
            if seen is x:
                names.append(name)
                break
        else:
            self.groups.append([name])
            self.inputs.append(x)
        return jnp.zeros((*x.shape[:-1], w.shape[0]), x.dtype)

    def experts(self, block: Block, names: tuple[tuple[str, ...], ...], x: jax.Array, tiles: Tiles) -> list[jax.Array]:
        """Notes what experts are given, as `multiply_tiles` is called."""
        self.pairs.append(PairInput(names, x, tiles))
        return [jnp.zeros((len(x), block[name].shape[0]), x.dtype) for name in names[0]]


Group = tuple[tuple[str, ...], int]
"""Names of weights that read one input, and that input's width."""


@lru_cache(maxsize=64)
def stage_groups(config: DecoderConfig, kind: BlockKind, stage: int) -> tuple[Group, ...]:
    """Names of a stage's weights that read one input, and that input's width, in a block of this kind."""
    recorder = InputRecorder()

    def trace(block: Block) -> None:
        tokens = jnp.zeros((1, 2), jnp.int32)
        where = positions(config, 2, jnp.zeros(1, jnp.int32), jnp.int32(0))
        state = State(jnp.zeros((*tokens.shape, config.hidden_size)))
        for index, run in enumerate(STAGES):
            state = run(config, block, state, where, recorder if index == stage else plain_linear)

    jax.eval_shape(trace, abstract_block(config, kind))
    alone = [(tuple(names), x.shape[-1]) for names, x in zip(recorder.groups, recorder.inputs, strict=True)]
    return (*alone, *((names, given.rows.shape[-1]) for given in recorder.pairs for names in given.names))


class Part(NamedTuple):
    """Weights of a stage whose Hessians are summed in one pass over the text.

    Attributes:
      groups: of `stage_groups`.
      experts: whose inputs these are, int32 [n], with -1 behind the last expert; empty where the stage has no experts.
    """

    groups: tuple[Group, ...]
    experts: np.ndarray

    def empty_sums(self) -> tuple[Hessian, ...]:
        """A Hessian for each group; experts' Hessians are stacked in one."""
        if not len(self.experts):
            return tuple(empty_hessian(width) for _, width in self.groups)
        number, width = len(self.experts), self.groups[0][1]
        return (Hessian(jnp.zeros((number, width, width)), jnp.zeros(number)),)

    def split(self, sums: Sequence[Any]) -> Iterator[Any]:
        """What belongs to each group, of `empty_sums` or of other arrays in the same places."""
        if not len(self.experts):
            yield from sums
            return
        for index in range(len(self.groups)):
            yield jax.tree.map(partial(_at, index=jnp.int32(index)), sums[0])


@jax.jit
def _at(stack: jax.Array, index: jax.Array) -> jax.Array:
    return lax.dynamic_index_in_dim(stack, index, keepdims=False)


def stage_parts(
    config: DecoderConfig, kind: BlockKind, stage: int, most_bytes: int = EXPERT_HESSIAN_BYTES
) -> list[Part]:
    """Cuts a stage's groups into parts: experts by ranges of equal size whose Hessians fit into `most_bytes`."""
    groups = stage_groups(config, kind, stage)
    if not (kind.sparse and groups[0][0][0].startswith("experts.")):
        return [Part(groups, np.zeros(0, np.int32))]
    fitting = max(1, most_bytes // (4 * groups[0][1] ** 2))
    size = -(-len(groups) // -(-len(groups) // fitting))
    parts = []
    for first in range(0, len(groups), size):
        experts = np.arange(first, first + size, dtype=np.int32)
        parts.append(Part(groups[first : first + size], np.where(experts < len(groups), experts, NO_EXPERT)))
    return parts


@product_jit(static_argnums=(0, 1, 7), donate_argnums=5)
def accumulate_stage(
    config: DecoderConfig,
    stage: int,
    block: Block,
    state: State,
    where: Positions,
    sums: tuple[Hessian, ...],
    experts: np.ndarray,
    linear: Linear = plain_linear,
) -> tuple[Hessian, ...]:
    """Adds one chunk of text to the Hessians of a `Part`.

    The sum of an expert does not depend on which other experts are in the part.

    Args:
      config: of the model.
      stage: of the block.
      block: the block.
      state: of the chunk, before the stage.
      where: its tokens stand.
      sums: as `Part.empty_sums` gives them.
      experts: of the part.
      linear: what takes the text through the stages. With `rounded_linear` the inputs are rounded to bfloat16, as they
        are where the weights read them.
    """
    recorder = recorded(config, stage, block, state, where, linear)
    if recorder.pairs:
        return (accumulate_experts(sums[0], recorder.pairs[0], experts),)
    return tuple(accumulate_hessian(h, x) for h, x in zip(sums, recorder.inputs, strict=True))


def recorded(
    config: DecoderConfig, stage: int, block: Block, state: State, where: Positions, linear: Linear = plain_linear
) -> InputRecorder:
    """What the weights of a stage read, inside a program; in bfloat16 if `linear` is `rounded_linear`."""
    recorder = InputRecorder()
    STAGES[stage](config, block, _as_wide_as_the_stream(state), where, recorder)
    if linear is rounded_linear:
        recorder.inputs = [x.astype(jnp.bfloat16) for x in recorder.inputs]
    return recorder


def accumulate_experts(sums: Hessian, given: PairInput, experts: jax.Array | np.ndarray) -> Hessian:
    """Adds what experts read to their stacked Hessians, to be traced."""
    tiles, rows = given.tiles.only(experts), padded(given.rows.astype(jnp.float32), given.tiles)

    def step(tile: jax.Array, sums: Hessian) -> Hessian:
        return accumulate_in_stack(sums, tiles.expert[tile], counted_rows(rows, tiles, tile))

    result: Hessian = each_tile(tiles, step, sums)
    return result


def rounded_linear(name: str, w: Any, x: jax.Array) -> jax.Array:
    """A `linear` that rounds its factors to bfloat16 and sums in float32.

    A processor with instructions for it is twice as fast. What a weight reads is then off by
    less than 1%, at random; quantized weights before it change it by more.
    """
    return _rounded_product(jnp.asarray(w), x)


def _rounded(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
    """Sum of products of bfloat16 factors over one axis each, in float32."""
    a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    return lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())), preferred_element_type=jnp.float32)


@jax.custom_vjp
def _rounded_product(w: jax.Array, x: jax.Array) -> jax.Array:
    return _rounded(x, w, x.ndim - 1, 1).astype(x.dtype)


def _rounded_product_back(given: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The gradient by x is rounded alike; that by w, whose sum over tokens is no faster rounded, is not."""
    w, x = given
    by_w = jnp.matmul(g.reshape(-1, g.shape[-1]).T, x.reshape(-1, x.shape[-1]))
    return by_w.astype(w.dtype), _rounded(g, w, g.ndim - 1, 0).astype(x.dtype)


_rounded_product.defvjp(lambda w, x: (_rounded_product(w, x), (w, x)), _rounded_product_back)


@product_jit(static_argnums=(0, 1), donate_argnums=7)
def accumulate_drift(
    config: DecoderConfig,
    stage: int,
    block: Block,
    original: Block,
    state: State,
    dense_state: State,
    where: Positions,
    sums: tuple[jax.Array, ...],
    experts: np.ndarray,
) -> tuple[jax.Array, ...]:
    """Adds one chunk's (x_dense - x) xᵀ to the sums of a `Part`, f32 [in, in] each; experts' sums are stacked."""
    drifted = recorded(config, stage, block, state, where)
    dense = recorded(config, stage, original, dense_state, where)
    if drifted.pairs:
        return (experts_drift(sums[0], drifted.pairs[0], dense.pairs[0], config.experts_per_token, experts),)
    return tuple(total + cross_gram(aim, x) for total, x, aim in zip(sums, drifted.inputs, dense.inputs, strict=True))


def experts_drift(
    sums: jax.Array, drifted: PairInput, dense: PairInput, choices: int, experts: jax.Array | np.ndarray
) -> jax.Array:
    """What the dense model sends elsewhere is a zero in x_dense."""
    token = drifted.tiles.order // choices
    expert = jnp.take(drifted.tiles.chosen, drifted.tiles.order)
    same = dense.tiles.chosen.reshape(-1, choices)[token] == expert[:, None]
    place = dense.tiles.place[token * choices + jnp.argmax(same, axis=1)]
    aim = jnp.where(jnp.any(same, axis=1, keepdims=True), dense.rows[place], jnp.zeros((), dense.rows.dtype))
    tiles = drifted.tiles.only(experts)
    x, aim = padded(drifted.rows, tiles), padded(aim, tiles)

    def step(tile: jax.Array, sums: jax.Array) -> jax.Array:
        part = cross_gram(counted_rows(aim, tiles, tile), counted_rows(x, tiles, tile))
        total = lax.dynamic_index_in_dim(sums, tiles.expert[tile], keepdims=False) + part
        return lax.dynamic_update_index_in_dim(sums, total, tiles.expert[tile], 0)

    result: jax.Array = each_tile(tiles, step, sums)
    return result


@product_jit(static_argnums=(0, 1, 5))
def run_stage(
    config: DecoderConfig, stage: int, block: Block, state: State, where: Positions, linear: Linear = plain_linear
) -> State:
    """One stage of a block on one chunk."""
    return after_stage(config, stage, block, state, where, linear)


def after_stage(
    config: DecoderConfig, stage: int, block: Block, state: State, where: Positions, linear: Linear
) -> State:
    """`run_stage` inside a program.

    With `rounded_linear`, attention's products are rounded alike, and what the next stage's weights read (`inner`) is
    held in bfloat16: they round it anyway.
    """
    if linear is not rounded_linear:
        return STAGES[stage](config, block, state, where, linear)
    state = STAGES[stage](config, block, _as_wide_as_the_stream(state), where, rounded_throughout)
    if state.inner is not None and state.route is None:
        state = dataclasses.replace(state, inner=state.inner.astype(jnp.bfloat16))
    return state


def _as_wide_as_the_stream(state: State) -> State:
    """`inner` in the residual stream's type. XLA drops the detour where the next product rounds it again."""
    if state.inner is None:
        return state
    return dataclasses.replace(state, inner=state.inner.astype(state.residual.dtype))


def rounded_throughout(name: str, w: Any, x: jax.Array) -> jax.Array:
    """`rounded_linear`, whose queries, keys and values are bfloat16, so that attention multiplies in bfloat16, too."""
    w = jnp.asarray(w)
    y = rounded_linear(name, w, x.astype(w.dtype))
    return y.astype(jnp.bfloat16) if name in _ATTENTION else y


_ATTENTION = ("q_proj", "k_proj", "v_proj")


@product_jit(static_argnums=0)
def accumulate_head(config: DecoderConfig, outer: Outer, residual: jax.Array, hessian: Hessian) -> Hessian:
    recorder = InputRecorder()
    logits(config, outer, residual, recorder)
    return accumulate_hessian(hessian, recorder.inputs[0])
