"""Hessians of a stage on all devices of a mesh: programs that add one wave of chunks, and what their sums hold.

The Hessian of an ordinary weight lies in panels (`spqr_jax.solver.panel_hessian`). Hessians of experts lie whole, the
experts by turns: device d of D has those whose place in the part is d modulo D.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding

import spqr_jax.devices as devices
from spqr_jax.models.config import BlockKind, DecoderConfig
from spqr_jax.models.tiles import NO_EXPERT
from spqr_jax.solver import Hessian, PanelHessian
from spqr_jax.solver.panel_hessian import (
    add_cross_panels,
    add_panels,
    counted_inputs,
    cross_matrix,
    empty_panels,
)
from spqr_jax.stream.mesh_blocks import BlockLayout
from spqr_jax.stream.stages import (
    PairInput,
    Part,
    accumulate_experts,
    experts_drift,
    recorded,
    stage_parts,
)

Sums = tuple[Any, Any]
"""Of a part: lists of panels and of tokens, or stacks of experts' sums, f32 [devices * n, in, in], and tokens."""


def mine(tree: Any) -> Any:
    """This device's part, without the axis of the devices."""
    return jax.tree.map(lambda leaf: leaf[0], tree)


def mesh_parts(mesh: Mesh, config: DecoderConfig, kind: BlockKind, stage: int, bytes_each: int) -> list[Part]:
    """`stage_parts`, where each device may hold so many bytes of experts' Hessians."""
    return stage_parts(config, kind, stage, bytes_each * devices.size(mesh))


def experts_of_devices(mesh: Mesh, part: Part) -> jax.Array:
    """Experts of a part that each device sums: int32 [devices, n], with `NO_EXPERT`; n is 0 without experts."""
    count = devices.size(mesh)
    experts = np.pad(part.experts, (0, -len(part.experts) % count), constant_values=NO_EXPERT)
    by_device = experts.reshape(-1, count).T
    return devices.put_parts(mesh, lambda device: by_device[device])


def empty_sums(mesh: Mesh, part: Part) -> Sums:
    """Sums of no text."""
    if not len(part.experts):
        empty = [empty_panels(mesh, width) for _, width in part.groups]
        return [hessian.panels for hessian in empty], [hessian.tokens for hessian in empty]
    number, width = -(-len(part.experts) // devices.size(mesh)), part.groups[0][1]
    stacks: Sums = _zero_stacks(mesh, number * devices.size(mesh), width)()
    return stacks


@lru_cache(maxsize=64)
def _zero_stacks(mesh: Mesh, number: int, width: int) -> Any:
    cut = NamedSharding(mesh, devices.cut_along(mesh))
    return jax.jit(lambda: (jnp.zeros((number, width, width)), jnp.zeros(number)), out_shardings=cut)


def hessian_at(mesh: Mesh, part: Part, sums: Sums, index: int) -> Hessian | PanelHessian:
    """The Hessian of one group of a part; an expert's on this process's first device. Every process must call it."""
    if not len(part.experts):
        panels, tokens = sums
        return PanelHessian(panels[index], tokens[index], mesh)
    return Hessian(*_expert(mesh, part, sums, index))


def drift_at(mesh: Mesh, part: Part, hessian: Any, sums: Any, index: int) -> jax.Array:
    """(2/n) Σ (aim - x) xᵀ [in, in] of one group, on this process's first device. Every process must call it."""
    if not len(part.experts):
        return cross_matrix(hessian, sums[index])
    total: jax.Array = _expert(mesh, part, sums, index)
    return 2.0 / jnp.maximum(hessian.tokens, 1.0) * total


def _expert(mesh: Mesh, part: Part, stacks: Any, index: int) -> Any:
    count = devices.size(mesh)
    place = index % count * -(-len(part.experts) // count) + index // count
    whole = _picked(mesh)(stacks, np.int32(place))
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), whole)


@lru_cache
def _picked(mesh: Mesh) -> Any:
    def pick(stacks: Any, place: jax.Array) -> Any:
        return jax.tree.map(lambda stack: lax.dynamic_index_in_dim(stack, place, keepdims=False), stacks)

    return jax.jit(pick, out_shardings=NamedSharding(mesh, devices.EVERYWHERE))


# ---- programs -----------------------------------------------------------------------------


def _inputs(config: DecoderConfig, stage: int, block: Any, state: Any, where: Any) -> list[jax.Array]:
    """What drift is a difference of: never rounded."""
    return [x.astype(jnp.float32) for x in recorded(config, stage, block, mine(state), where).inputs]


def _counted_pairs(given: PairInput, counts: jax.Array) -> tuple[Any, Any]:
    """Rows and tiles of what experts read; no tiles of a chunk that does not count."""
    number = jnp.where(counts, given.tiles.counts, 0)
    return given.rows.astype(jnp.float32), dataclasses.replace(given.tiles, counts=number)


@lru_cache(maxsize=64)
def hessian_program(
    mesh: Mesh, config: DecoderConfig, layout: BlockLayout, stage: int, linear: Any, of_experts: bool
) -> Any:
    """(block, wave's state, where, counts, sums, experts of the devices) -> sums with one wave more."""

    def dense(block: Any, state: Any, where: Any, counts: jax.Array, sums: Sums, which: jax.Array) -> Sums:
        read = recorded(config, stage, layout.shapes(block), mine(state), where, linear).inputs
        inputs = [counted_inputs(x, counts[0]) for x in read]
        pairs = [add_panels(mesh, panels, tokens, x) for panels, tokens, x in zip(*sums, inputs, strict=True)]
        return [panels for panels, _ in pairs], [tokens for _, tokens in pairs]

    def experts(block: Any, state: Any, where: Any, counts: jax.Array, sums: Sums, which: jax.Array) -> Sums:
        given = recorded(config, stage, layout.shapes(block), mine(state), where, linear).pairs[0]

        pairs = _counted_pairs(given, counts[0])

        def add(sums: Hessian, sender: jax.Array) -> tuple[Hessian, None]:
            sent = devices.sent_by(mesh, sender, pairs)
            return accumulate_experts(sums, PairInput(given.names, *sent), which[0]), None

        total, _ = lax.scan(add, Hessian(*sums), jnp.arange(devices.size(mesh)))
        return total.gram, total.tokens

    cut, whole = devices.cut_along(mesh), devices.EVERYWHERE
    specs = (cut, cut) if of_experts else (cut, whole)
    in_specs = (layout.specs(mesh), cut, whole, cut, specs, cut)
    return devices.mesh_jit(mesh, experts if of_experts else dense, in_specs, specs, donate_argnums=4)


@lru_cache(maxsize=64)
def drift_program(mesh: Mesh, config: DecoderConfig, layout: BlockLayout, stage: int, of_experts: bool) -> Any:
    """(block, dense block, wave's state, dense state, where, counts, sums, experts) -> sums with one wave more."""

    def dense(
        block: Any, original: Any, state: Any, aim: Any, where: Any, counts: Any, sums: Any, which: jax.Array
    ) -> Any:
        drifted = [counted_inputs(x, counts[0]) for x in _inputs(config, stage, layout.shapes(block), state, where)]
        read = _inputs(config, stage, layout.shapes(original), aim, where)
        aims = [counted_inputs(x, counts[0]) for x in read]
        return [add_cross_panels(mesh, *each) for each in zip(sums, drifted, aims, strict=True)]

    def experts(
        block: Any, original: Any, state: Any, aim: Any, where: Any, counts: Any, sums: Any, which: jax.Array
    ) -> Any:
        drifted = recorded(config, stage, layout.shapes(block), mine(state), where).pairs[0]
        aims = recorded(config, stage, layout.shapes(original), mine(aim), where).pairs[0]

        both = _counted_pairs(drifted, counts[0]), _counted_pairs(aims, counts[0])

        def add(sums: jax.Array, sender: jax.Array) -> tuple[jax.Array, None]:
            x, given = (PairInput(drifted.names, *pairs) for pairs in devices.sent_by(mesh, sender, both))
            return experts_drift(sums, x, given, config.experts_per_token, which[0]), None

        return lax.scan(add, sums, jnp.arange(devices.size(mesh)))[0]

    cut, whole = devices.cut_along(mesh), devices.EVERYWHERE
    in_specs = (layout.specs(mesh), layout.specs(mesh), cut, cut, whole, cut, cut, cut)
    return devices.mesh_jit(mesh, experts if of_experts else dense, in_specs, cut, donate_argnums=6)
