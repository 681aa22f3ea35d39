"""Models prepared for generation: weights in a backend's layout, layers in loops.

Where the backend reads stacks of matrices, blocks of one structure are stacked and run in one loop: the compiled
program has one copy of their code, however many layers there are. Elsewhere the blocks run one after the other.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spqr_jax.models.attention import KVCache, Positions
from spqr_jax.models.config import BlockKind, DecoderConfig
from spqr_jax.models.decoder import State, run_block, sum_of_squares
from spqr_jax.models.weights import Block, Decoder, Outer, Weight, joint_name, same_input_names
from spqr_jax.products import (
    Implementation,
    PreparedMatrix,
    backend_named,
    default_implementation,
    prepare,
    prepare_for,
)
from spqr_jax.products.pallas import PallasBackend, stack_matrices
from spqr_jax.quantized import is_quantized, quantized_leaves


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockStack:
    """Consecutive blocks of one structure.

    Attributes:
      block: their weights: dense leaves with the layers in front, quantized matrices as stacks.
      local: bool [layers], which blocks are local.
      layers: how many blocks there are.
    """

    block: Block
    local: Any
    layers: int = dataclasses.field(metadata={"static": True})

    def at(self, index: jax.Array) -> Block:
        """Block number `index` (int32 scalar, may be traced). Quantized weights are not copied."""

        def of_layer(leaf: Any) -> Any:
            if is_quantized(leaf):
                return leaf.at(index)
            return lax.dynamic_index_in_dim(leaf, index, keepdims=False)

        return jax.tree.map(of_layer, self.block, is_leaf=is_quantized)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ReadyDecoder:
    """A model prepared for generation by `make_ready`, a pytree.

    Attributes:
      outer: the weights outside of the blocks, prepared.
      parts: the blocks in order, alone or in stacks.
      config: of the model; static.
    """

    outer: Outer
    parts: tuple[Block | BlockStack, ...]
    config: DecoderConfig = dataclasses.field(metadata={"static": True})

    @property
    def layers(self) -> Iterator[Block]:
        """The blocks one by one, as `Decoder.layers` has them."""
        for part in self.parts:
            if isinstance(part, Block):
                yield part
                continue
            for index in range(part.layers):
                block = part.at(jnp.int32(index))
                yield Block(dict(block), BlockKind(bool(part.local[index]), block.kind.sparse))


def make_ready(
    params: Decoder, implementation: Implementation | None = None, *, int8_activations: bool = False
) -> ReadyDecoder:
    """Prepares a model for generation.

    Args:
      params: the model, dense or quantized.
      implementation: as in `prepare`.
      int8_activations: as in `prepare`.

    Raises:
      SpQRError: as `prepare`.
    """
    dtype = params.outer.final_norm.dtype
    outer = prepare(params.outer, dtype, implementation, int8_activations=int8_activations)
    backend = backend_named(implementation or default_implementation())
    quantized = quantized_leaves(params.layers)
    if backend.stacks and quantized and not any(isinstance(weight, PreparedMatrix) for weight in quantized):
        return ReadyDecoder(outer, stack_blocks(params, backend), params.config)
    layers = prepare(params.layers, dtype, implementation, int8_activations=int8_activations)
    return ReadyDecoder(outer, layers, params.config)


# ---- stacking -----------------------------------------------------------------------------------


def stack_blocks(params: Decoder, backend: PallasBackend) -> tuple[BlockStack, ...]:
    """The blocks in stacks of consecutive ones with one structure, prepared for a backend, whatever the device."""
    dtype = params.outer.final_norm.dtype
    runs = itertools.groupby(params.layers, lambda block: _structure(block, backend))
    return tuple(_stack(list(run), params.config, backend, dtype) for _, run in runs)


def _structure(block: Block, backend: PallasBackend) -> Any:
    """What blocks of one stack have in common: names, shapes, and which weights are packed. Bits may differ."""

    def of_weight(weight: Weight) -> Any:
        if is_quantized(weight):
            return weight.shape, not backend.why_not(weight, None), weight.perm is None
        return weight.shape, np.dtype(weight.dtype)

    return block.kind.sparse, tuple((name, of_weight(weight)) for name, weight in block.items())


def _stack(run: Sequence[Block], config: DecoderConfig, backend: PallasBackend, dtype: Any) -> BlockStack:
    """Blocks of one structure as a stack, weight by weight, so that few copies exist at a time."""
    kinds = {block.kind for block in run}
    local = kinds.pop().local if len(kinds) == 1 else None
    kind = BlockKind(local, run[0].kind.sparse)
    joint = _joint_weights(run, config, kind, backend)
    partners = {name for names in joint for name in names}
    weights: dict[str, Weight] = {}
    for name in run[0]:
        if name not in partners:
            weights[name] = _stack_weight([block[name] for block in run], backend, dtype)
        for names in joint:
            if name == names[0]:
                joined = [backend.join([block[partner] for partner in names]) for block in run]
                weights[joint_name(names)] = stack_matrices(joined)
    local_blocks = jax.device_put(np.array([bool(block.kind.local) for block in run]))
    return BlockStack(Block(weights, kind), local_blocks, len(run))


def _joint_weights(
    run: Sequence[Block], config: DecoderConfig, kind: BlockKind, backend: PallasBackend
) -> list[tuple[str, ...]]:
    """The matrices that are joined: packed, as in the first block so in all, and with one input order in each block."""

    def packed(names: tuple[str, ...]) -> bool:
        weights = [run[0][name] for name in names]
        return all(is_quantized(weight) and not backend.why_not(weight, None) for weight in weights)

    def one_order(block: Block, names: tuple[str, ...]) -> bool:
        orders = [None if (perm := block[name].perm) is None else np.asarray(perm) for name in names]
        if orders[0] is None:
            return all(order is None for order in orders)
        return all(order is not None and np.array_equal(order, orders[0]) for order in orders)

    groups = same_input_names(config, kind)
    return [names for names in groups if packed(names) and all(one_order(block, names) for block in run)]


def _stack_weight(weights: Sequence[Weight], backend: PallasBackend, dtype: Any) -> Any:
    """One weight of all blocks; a format that the backend does not read becomes dense, with `prepare`'s warning."""
    if is_quantized(weights[0]) and not backend.why_not(weights[0], None):
        return stack_matrices([backend.prepare(weight) for weight in weights])
    return jnp.stack([prepare_for(backend, weight, dtype) for weight in weights])


# ---- running ------------------------------------------------------------------------------------


def empty_cache(params: ReadyDecoder, batch: int, length: int, dtype: Any) -> tuple[KVCache, ...]:
    """A cache of `length` positions for every part of the model."""
    config = params.config
    shape = (batch, config.num_kv_heads, length, config.head_dim)

    def of_part(part: Block | BlockStack) -> KVCache:
        whole = shape if isinstance(part, Block) else (part.layers, *shape)
        return KVCache(jnp.zeros(whole, dtype), jnp.zeros(whole, dtype))

    return tuple(of_part(part) for part in params.parts)


def run_parts(
    params: ReadyDecoder, residual: jax.Array, cache: tuple[KVCache, ...], where: Positions
) -> tuple[jax.Array, tuple[KVCache, ...]]:
    """All blocks: the residual stream [batch, tokens, hidden] and the caches after them."""
    filled = []
    for part, part_cache in zip(params.parts, cache, strict=True):
        run = _run_stack if isinstance(part, BlockStack) else _run_alone
        residual, new_cache = run(params.config, part, residual, part_cache, where)
        filled.append(new_cache)
    return residual, tuple(filled)


def _run_alone(
    config: DecoderConfig, block: Any, residual: jax.Array, cache: KVCache, where: Positions
) -> tuple[jax.Array, KVCache]:
    state = run_block(config, block, State(residual, None, cache), where)
    assert isinstance(state.cache, KVCache)
    return state.residual, state.cache


def _run_stack(
    config: DecoderConfig, stack: Any, residual: jax.Array, cache: KVCache, where: Positions
) -> tuple[jax.Array, KVCache]:
    """A loop over the layers. The caches are updated in place, packed weights are read by the layer's number."""
    known = config.norm == "rms"  # the squares of the stream are summed as the stream is written

    def layer(index: jax.Array, carry: Any) -> Any:
        residual, squares, keys, values = carry
        here = dataclasses.replace(where, local=stack.local[index]) if stack.block.kind.local is None else where
        state = State(residual, None, KVCache(keys, values, index), squares=squares)
        state = run_block(config, stack.at(index), state, here)
        assert isinstance(state.cache, KVCache)
        squares = sum_of_squares(state.residual) if known else None
        return state.residual, squares, state.cache.keys, state.cache.values

    carry = (residual, sum_of_squares(residual) if known else None, cache.keys, cache.values)
    residual, _, keys, values = lax.fori_loop(jnp.int32(0), jnp.int32(stack.layers), layer, carry)
    return residual, KVCache(keys, values)
