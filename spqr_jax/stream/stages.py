"""A block's stages on one chunk of text, as compiled programs: on to the next stage, or what its matrices read.

A stage is run twice per chunk of calibration text: once with a `linear` that
records its inputs (everything behind them is dead code, which XLA removes), and
once for real, with weights already quantized. Together that is one forward pass
of the block plus the Hessians.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from spqr_jax.models.attention import Positions, positions
from spqr_jax.models.config import BlockKind, DecoderConfig
from spqr_jax.models.decoder import STAGES, Block, Linear, Outer, State, logits, plain_linear
from spqr_jax.models.weights import abstract_block
from spqr_jax.product_jit import product_jit
from spqr_jax.solver import Hessian, accumulate_hessian, cross_gram


class InputRecorder:
    """A `linear` that notes what each weight is given and returns zeros.

    Weights that are given the very same array share a Hessian: `groups` holds
    their names together, `inputs` the array once.
    """

    def __init__(self) -> None:
        self.groups: list[list[str]] = []
        self.inputs: list[jax.Array] = []

    def __call__(self, name: str, w: Any, x: jax.Array) -> jax.Array:
        for names, seen in zip(self.groups, self.inputs, strict=True):
            if seen is x:
                names.append(name)
                break
        else:
            self.groups.append([name])
            self.inputs.append(x)
        return jnp.zeros((*x.shape[:-1], w.shape[0]), x.dtype)


@lru_cache(maxsize=64)
def stage_groups(config: DecoderConfig, kind: BlockKind, stage: int) -> tuple[tuple[tuple[str, ...], int], ...]:
    """Names of a stage's weights that read one input, and that input's width, in a block of this kind."""
    recorder = InputRecorder()

    def trace(block: Block) -> None:
        tokens = jnp.zeros((1, 2), jnp.int32)
        where = positions(config, 2, jnp.zeros(1, jnp.int32), jnp.int32(0))
        state = State(jnp.zeros((*tokens.shape, config.hidden_size)))
        for index, run in enumerate(STAGES):
            state = run(config, block, state, where, recorder if index == stage else plain_linear)

    jax.eval_shape(trace, abstract_block(config, kind))
    return tuple((tuple(names), x.shape[-1]) for names, x in zip(recorder.groups, recorder.inputs, strict=True))


@product_jit(static_argnums=(0, 1), donate_argnums=5)
def accumulate_stage(
    config: DecoderConfig, stage: int, block: Block, state: State, where: Positions, hessians: tuple[Hessian, ...]
) -> tuple[Hessian, ...]:
    recorder = InputRecorder()
    STAGES[stage](config, block, state, where, recorder)
    return tuple(accumulate_hessian(h, x) for h, x in zip(hessians, recorder.inputs, strict=True))


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
) -> tuple[jax.Array, ...]:
    drifted, dense = InputRecorder(), InputRecorder()
    STAGES[stage](config, block, state, where, drifted)
    STAGES[stage](config, original, dense_state, where, dense)
    return tuple(total + cross_gram(aim, x) for total, x, aim in zip(sums, drifted.inputs, dense.inputs, strict=True))


@product_jit(static_argnums=(0, 1, 5))
def run_stage(
    config: DecoderConfig, stage: int, block: Block, state: State, where: Positions, linear: Linear = plain_linear
) -> State:
    """One stage of a block on one chunk."""
    return STAGES[stage](config, block, state, where, linear)


@product_jit(static_argnums=0)
def accumulate_head(config: DecoderConfig, outer: Outer, residual: jax.Array, hessian: Hessian) -> Hessian:
    recorder = InputRecorder()
    logits(config, outer, residual, recorder)
    return accumulate_hessian(hessian, recorder.inputs[0])
