"""Activations on all devices of a mesh: a wave of chunks at a time, one chunk on each device.

A chunk runs through the program of one device, so it has the bits of one device. The
Hessians are those of `spqr_jax.solver.panel_hessian`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import spqr_jax.devices as devices
from spqr_jax.models.attention import Positions
from spqr_jax.models.config import DecoderConfig
from spqr_jax.models.decoder import Block, Linear, Outer, State, embed, logits, plain_linear
from spqr_jax.solver import Hessian, PanelHessian
from spqr_jax.solver.panel_hessian import add_panels, counted_inputs, empty_panels
from spqr_jax.stream.activations import Activations, checked_batches, places
from spqr_jax.stream.chunk_states import ChunkStates
from spqr_jax.stream.mesh_blocks import BlockLayout, MeshBlocks
from spqr_jax.stream.mesh_sums import (
    drift_at,
    drift_program,
    empty_sums,
    experts_of_devices,
    hessian_at,
    hessian_program,
    mesh_parts,
    mine,
)
from spqr_jax.stream.outer import embedded_rows
from spqr_jax.stream.spill import Spill
from spqr_jax.stream.stages import EXPERT_HESSIAN_BYTES, InputRecorder, Part, after_stage
from spqr_jax.stream.sums import KeepSums, PartSums, SumsPlace


@dataclasses.dataclass(frozen=True)
class _Wave:
    """Chunks of one shape, one for each device.

    Attributes:
      chunks: how many count. The devices after them run copies of the last chunk, which change no sum.
      counts: bool [devices], whether a device's chunk counts.
      where: of each chunk's tokens, on every device.
    """

    chunks: int
    counts: jax.Array
    where: Positions


class MeshActivations(Activations):
    """`Activations` whose chunks are spread over the devices of a mesh.

    Neighbouring batches of one shape make waves. A batch of another shape than its neighbours is a wave of its own,
    which takes as long as a full one: give batches of one shape. Every process of the mesh must make the same calls.

    Args:
      config, outer, batches, linear: as `Activations` has them; the same in every process.
      mesh: of all devices that shall work, whatever its axes are.
      spill: as `Activations` has it.
      hessian_bytes: of experts' Hessians that a device sums at once.
    """

    def __init__(
        self,
        config: DecoderConfig,
        outer: Outer,
        batches: Iterable[Any],
        linear: Linear = plain_linear,
        *,
        mesh: Mesh,
        spill: Spill | None = None,
        hessian_bytes: int = EXPERT_HESSIAN_BYTES,
    ) -> None:
        self.config, self._linear, self._mesh = config, linear, mesh
        self._hessian_bytes = hessian_bytes
        self._blocks, self._dense_blocks = MeshBlocks(mesh, config), MeshBlocks(mesh, config)
        self._states = ChunkStates([] if spill is None else spill.states())
        self._waves: list[_Wave] = []
        self.stream_bytes = 0
        most, left = devices.size(mesh), checked_batches(config, batches)
        while left:
            count = next((i for i, x in enumerate(left[:most]) if x.shape != left[0].shape), min(most, len(left)))
            where = places(config, left[0])

            def embedded(
                index: int, chunks: Sequence[np.ndarray] = left[:count], where: Positions = where
            ) -> jax.Array:
                return embedded_chunk(config, outer, chunks[min(index, len(chunks) - 1)], where)

            counts = devices.put_parts(mesh, partial(_counts, count))
            self._waves.append(_Wave(count, counts, devices.put_everywhere(mesh, where)))
            residual = devices.put_parts(mesh, embedded)
            self._states.append(State(residual))
            self.stream_bytes += count * residual.nbytes // most  # the last devices may repeat a chunk
            left = left[count:]

    def calibrate(  # type: ignore[override]
        self,
        stage: int,
        block: Block,
        dense: Activations | None = None,
        original: Block | None = None,
        *,
        begin: SumsPlace | None = None,
        keep: KeepSums | None = None,
    ) -> Iterator[tuple[tuple[str, ...], Hessian | PanelHessian, jax.Array | None]]:
        """Panels of a Hessian, or whole Hessians of experts, are spread over the devices.

        `keep` is given arrays that only a process which has all devices can read whole.
        """
        states, beside = self._states.copy(), None if dense is None else dense._states.copy()
        parts = mesh_parts(self._mesh, self.config, block.kind, stage, self._hessian_bytes)
        first = begin.part if begin is not None and begin.stage == stage else 0
        for number, part in enumerate(parts[first:], first):
            kept = PartSums(stage, number, begin, keep)
            sums = self._hessian_sums(stage, block, states, part, kept)
            drifts: Any = None
            if beside is not None and original is not None:
                drifts = self._drift_sums(stage, block, states, beside, original, part, kept)
            for index, (names, _) in enumerate(part.groups):
                hessian = hessian_at(self._mesh, part, sums, index)
                drift = None if drifts is None else drift_at(self._mesh, part, hessian, drifts, index)
                yield names, hessian, drift
                kept.keep(is_last=index + 1 == len(part.groups))

    def _hessian_sums(self, stage: int, block: Block, states: Any, part: Part, sums: PartSums) -> Any:
        linear: Any = self._linear
        block, layout = self._blocks.put(block)
        program = hessian_program(self._mesh, self.config, layout, stage, linear, bool(len(part.experts)))
        which = experts_of_devices(self._mesh, part)

        def add(index: int, total: Any) -> Any:
            wave = self._waves[index]
            return program(block, states[index], wave.where, wave.counts, total, which)

        return sums.total(empty_sums(self._mesh, part), len(states), add)

    def _drift_sums(
        self, stage: int, block: Block, states: Any, dense: Any, original: Block, part: Part, sums: PartSums
    ) -> Any:
        (block, layout), (original, _) = self._blocks.put(block), self._dense_blocks.put(original)
        program = drift_program(self._mesh, self.config, layout, stage, bool(len(part.experts)))
        which = experts_of_devices(self._mesh, part)

        def add(index: int, total: Any) -> Any:
            wave = self._waves[index]
            return program(block, original, states[index], dense[index], wave.where, wave.counts, total, which)

        return sums.total(empty_sums(self._mesh, part)[0], len(states), add)

    def drifts(
        self, stage: int, block: Block, dense: Activations, original: Block, hessians: Sequence[Any]
    ) -> tuple[jax.Array, ...]:
        """As `Activations.drifts`: f32 [in, in] each, on this process's first device."""
        found: list[jax.Array] = []
        for number, part in enumerate(mesh_parts(self._mesh, self.config, block.kind, stage, self._hessian_bytes)):
            kept = PartSums(stage, number)
            sums = self._drift_sums(stage, block, self._states, dense._states, original, part, kept)
            for index in range(len(part.groups)):
                found.append(drift_at(self._mesh, part, hessians[len(found)], sums, index))
        return tuple(found)

    def advance(self, stage: int, block: Block) -> None:
        linear: Any = self._linear
        block, layout = self._blocks.put(block)
        program = advance_program(self._mesh, self.config, layout, stage, linear)
        for index, wave in enumerate(self._waves):
            self._states[index] = program(block, self._states[index], wave.where)

    def chunks(self) -> Iterator[tuple[State, Positions]]:
        """Each chunk's state as it is now, and where its tokens stand, on this process's first device."""
        for state, wave in zip(self._states, self._waves, strict=True):
            whole, where = devices.gather(self._mesh, (state, wave.where))
            for index in range(wave.chunks):
                yield jax.tree.map(lambda leaf, index=index: leaf[index], whole), where

    def head_hessian(  # type: ignore[override]
        self, outer: Outer, *, begin: SumsPlace | None = None, keep: KeepSums | None = None
    ) -> PanelHessian:
        # Only the norm in front of the head is read; the large arrays stay where they are.
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), outer)
        leaves, tree = jax.tree.flatten(shapes)
        program = _head_program(self._mesh, self.config, tuple(leaves), tree)
        norms = [leaf for leaf in jax.tree.leaves(outer) if leaf.ndim == 1]
        norms = devices.put_everywhere(self._mesh, norms)
        empty = empty_panels(self._mesh, self.config.hidden_size)

        def add(index: int, sums: Any) -> Any:
            return program(norms, self._states[index].residual, self._waves[index].counts, sums)

        sums = PartSums(0, 0, begin, keep).total((empty.panels, empty.tokens), len(self._waves), add)
        return PanelHessian(*sums, self._mesh)

    def restore(self, residuals: Sequence[np.ndarray]) -> None:
        first = 0
        for index, wave in enumerate(self._waves):
            parts = residuals[first : first + wave.chunks]

            def part(device: int, parts: Sequence[np.ndarray] = parts) -> np.ndarray:
                return parts[min(device, len(parts) - 1)]

            self._states[index] = State(devices.put_parts(self._mesh, part))
            first += wave.chunks

    def copy(self) -> MeshActivations:
        twin = object.__new__(MeshActivations)
        twin.__dict__.update(self.__dict__)
        twin._states = self._states.copy()
        twin._blocks, twin._dense_blocks = (MeshBlocks(self._mesh, self.config) for _ in range(2))
        return twin


def text_activations(
    config: DecoderConfig,
    outer: Outer,
    batches: Iterable[Any],
    linear: Linear = plain_linear,
    *,
    mesh: Mesh | None = None,
    spill: Spill | None = None,
    hessian_bytes: int = EXPERT_HESSIAN_BYTES,
) -> Activations:
    """`Activations` on one device, or on all of a mesh."""
    if mesh is None:
        return Activations(config, outer, batches, linear, spill, hessian_bytes)
    return MeshActivations(config, outer, batches, linear, mesh=mesh, spill=spill, hessian_bytes=hessian_bytes)


def embedded_chunk(config: DecoderConfig, outer: Outer, tokens: np.ndarray, where: Positions) -> jax.Array:
    """`embed` of one chunk [batch, seq]. Of an embedding in host memory, only its tokens' rows go to the device."""
    if isinstance(outer.embed_tokens, np.ndarray):
        outer, tokens = embedded_rows(outer, [tokens])[0], np.arange(tokens.size).reshape(tokens.shape)
    return embed(config, jax.tree.map(jnp.asarray, outer), jnp.asarray(tokens, jnp.int32), where)


def _counts(chunks: int, device: int) -> np.ndarray:
    return np.array(device < chunks)


@lru_cache(maxsize=64)
def advance_program(mesh: Mesh, config: DecoderConfig, layout: BlockLayout, stage: int, linear: Any) -> Any:
    """(block, wave's state, where) -> the state after a stage."""

    def run(block: Block, state: State, where: Positions) -> State:
        block = layout.gathered(mesh, config, stage, block)
        state = after_stage(config, stage, block, mine(state), where, linear)
        return jax.tree.map(lambda leaf: leaf[None], state)

    cut, whole = devices.cut_along(mesh), devices.EVERYWHERE
    return devices.mesh_jit(mesh, run, (layout.specs(mesh), cut, whole), cut)


@lru_cache(maxsize=8)
def _head_program(mesh: Mesh, config: DecoderConfig, shapes: tuple[Any, ...], tree: Any) -> Any:
    def accumulate(norms: list[jax.Array], residual: jax.Array, counts: jax.Array, sums: Any) -> Any:
        given = iter(norms)
        leaves = [next(given) if s.ndim == 1 else jax.numpy.zeros(s.shape, s.dtype) for s in shapes]
        recorder = InputRecorder()
        logits(config, jax.tree.unflatten(tree, leaves), residual[0], recorder)
        panels, tokens = sums
        return add_panels(mesh, panels, tokens, counted_inputs(recorder.inputs[0], counts[0]))

    cut, whole = devices.cut_along(mesh), devices.EVERYWHERE
    return devices.mesh_jit(mesh, accumulate, (whole, cut, cut, (cut, whole)), (cut, whole), donate_argnums=3)
