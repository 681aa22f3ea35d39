"""How much the model's loss minds an error in the output of each weight.

One backward pass through the dense model. Letters: L, the summed next-token
loss of the text; y = W x, a weight's output for one token; g = ∂L/∂y. To second
order an output error δ costs ½ (g·δ)² a token (the Fisher information in place of
the curvature), and on average over tokens, with the outputs taken as
independent, rounding W to Ŵ costs

    ½ Σ_r mean(g_r²) · mean((δ_r)²) = ¼ Σ_r mean(g_r²) · (w_r-ŵ_r) H (w_r-ŵ_r)ᵀ

nats per token, H = (2/n) X Xᵀ as in `spqr_jax.solver`.

A plan reads short windows, and the first tokens of a window lose more than later ones do: they have little to look back
at. So L counts the predictions of the second half of each window only (docs/explanation/quality.md).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Container, Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from spqr_jax.errors import DataError
from spqr_jax.events import Events, Steps, ignore
from spqr_jax.models.attention import Positions
from spqr_jax.models.config import BlockKind, DecoderConfig
from spqr_jax.models.decoder import STAGES, Block, Linear, State, matrix_names, plain_linear, run_block
from spqr_jax.models.finite import refuse_infinite
from spqr_jax.models.tiles import Tiles, multiply_tiles
from spqr_jax.solver import Hessian, accumulate_hessian, empty_hessian
from spqr_jax.stream import sweep
from spqr_jax.stream.activations import Activations
from spqr_jax.stream.blocks import BlockSource
from spqr_jax.stream.head import loss_gradient
from spqr_jax.stream.spill import Spill, SpilledStates
from spqr_jax.stream.stages import (
    Group,
    InputRecorder,
    rounded_linear,
    rounded_throughout,
    run_stage,
    stage_groups,
)

Halves = tuple[Hessian, Hessian]
"""Hessians of one input over two halves of a text."""


@dataclasses.dataclass(frozen=True)
class BlockSensitivity:
    """What a plan needs to know of one block.

    Attributes:
      index: of the block.
      block: its dense weights.
      hessians: for each group of weights that read one input, their names and the
        input's Hessian.
      halves: for each of these groups the Hessians of every second batch and of the others, where they were asked for;
        else None.
      fisher: for each weight Σ g_r² over the text, divided by the number of predictions that count, f32 [out].
    """

    index: int
    block: Block
    hessians: list[tuple[tuple[str, ...], Hessian]]
    halves: list[Halves | None]
    fisher: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class MeasuringPlace:
    """Where a measuring pass is, between two blocks.

    Attributes:
      forward: whether it is still on its way forward.
      index: of the block that comes next; the number of blocks, or -1, where none does.
      streams: for each batch [batch, tokens, hidden]: forward, the residual stream before that block; backward, the
        gradients of the loss behind it.
      before: for each block that was passed and is not yet measured, the activations before it, for each batch. Empty
        where they are not kept: a pass that goes on then makes them again.
    """

    forward: bool
    index: int
    streams: Sequence[Any]
    before: Sequence[Iterable[Any]] = ()


class _Watching(InputRecorder):
    """A `linear` that applies the weights, notes their inputs and adds to their outputs."""

    def __init__(self, added: dict[str, jax.Array], linear: Linear) -> None:
        super().__init__()
        self._added, self._linear = added, linear

    def __call__(self, name: str, w: Any, x: jax.Array) -> jax.Array:
        super().__call__(name, w, x)
        y = self._linear(name, w, x)
        return y + self._added[name].astype(y.dtype)

    def experts(self, block: Block, names: tuple[tuple[str, ...], ...], x: jax.Array, tiles: Tiles) -> list[jax.Array]:
        super().experts(block, names, x, tiles)
        results = multiply_tiles(self._linear, block, names, x, tiles)
        return [y + self._added[name] for name, y in zip(names[0], results, strict=True)]

    def all_inputs(self) -> list[jax.Array]:
        """What weights were given, then what experts were."""
        return [*self.inputs, *(given.rows for given in self.pairs)]


_Sums = tuple[dict[str, jax.Array], list[Hessian]]
"""Σ g² of each weight's outputs, and the Hessian of each input that weights share.

All experts of a block have one sum, under the first expert's name, and one Hessian. So little text reaches an expert
that what it has of its own says little, and nothing of an expert not reached.
"""


def _empty_sums(config: DecoderConfig, block: Block) -> _Sums:
    names = [name for name in matrix_names(config, block.kind) if _first_alike(name) == name]
    widths = {_first_alike(group[0]): width for group, width in _groups(config, block.kind)}
    return {name: jnp.zeros(block[name].shape[0]) for name in names}, [
        empty_hessian(width) for width in widths.values()
    ]


def _groups(config: DecoderConfig, kind: BlockKind) -> list[Group]:
    return [group for stage in range(len(STAGES)) for group in stage_groups(config, kind, stage)]


def _first_alike(name: str) -> str:
    """The weight whose sums a weight shares: the first expert's, for all experts."""
    return re.sub(r"^experts\.\d+\.", "experts.0.", name)


@partial(jax.jit, static_argnums=(0, 6), donate_argnums=5)
def _backward(
    config: DecoderConfig,
    block: Block,
    residual: jax.Array,
    where: Positions,
    gradient: jax.Array,
    sums: _Sums,
    linear: Linear = plain_linear,
) -> tuple[jax.Array, _Sums]:
    """The gradient before a block, and what its weights read and their outputs' gradients added to `sums`."""
    residual = residual.astype(gradient.dtype)
    # Adding a zero to each output and asking for its gradient gives g.
    tokens = gradient.shape[:-1]
    pairs = (tokens[0] * tokens[1] * config.experts_per_token,)
    zeros = {
        name: jnp.zeros((*(pairs if name.startswith("experts.") else tokens), block[name].shape[0]), residual.dtype)
        for name in sums[0]
    }
    linear = rounded_throughout if linear is rounded_linear else linear

    def run(residual: jax.Array, added: dict[str, jax.Array]) -> tuple[jax.Array, list[jax.Array]]:
        watching = _Watching(added, linear)
        after = run_block(config, block, State(residual), where, watching).residual
        return after, watching.all_inputs()

    _, back, inputs = jax.vjp(run, residual, zeros, has_aux=True)
    before, by_output = back(gradient)
    squares = {
        name: sums[0][name] + jnp.sum(jnp.square(g.astype(jnp.float32)), axis=tuple(range(g.ndim - 1)))
        for name, g in by_output.items()
    }
    inputs = [x.astype(jnp.bfloat16) if linear is rounded_throughout else x for x in inputs]
    return before, (squares, [accumulate_hessian(h, x) for h, x in zip(sums[1], inputs, strict=True)])


def _first_counted(length: int) -> int:
    """Of the positions of a sequence that predict a token, all but the last: where their second half begins."""
    return (length - 1) // 2


def _that_predict(batches: Iterable[Any]) -> list[Any]:
    """The batches whose sequences are longer than one token: a single token predicts nothing that is known."""
    every = list(batches)
    if kept := [batch for batch in every if batch.shape[1] > 1]:
        return kept
    raise DataError(
        f"a plan for a size needs sequences of two tokens and more, got batches {[batch.shape for batch in every]}: "
        "join short texts into longer sequences, or name a bit width in place of a size"
    )


def _sensitivity(
    config: DecoderConfig, index: int, block: Block, sums: Sequence[_Sums], counted: int
) -> BlockSensitivity:
    """A block's sums over parts of the text, for each weight; `counted` predictions count. Experts get their mean."""
    squares = jax.tree.map(lambda *parts: sum(parts[1:], parts[0]), *(part[0] for part in sums))
    fisher = {}
    for name in matrix_names(config, block.kind):
        of_outputs = squares[_first_alike(name)] / counted
        alike = name.startswith("experts.")
        fisher[name] = jnp.full_like(of_outputs, jnp.mean(of_outputs) / config.num_experts) if alike else of_outputs
    groups = [names for names, _ in _groups(config, block.kind)]
    place = {first: i for i, first in enumerate(dict.fromkeys(_first_alike(names[0]) for names in groups))}
    of_inputs = [[part[1][place[_first_alike(names[0])]] for part in sums] for names in groups]
    whole = [_added(parts) for parts in of_inputs]
    reading = {id(parts[0]): hessian for parts, hessian in zip(of_inputs, whole, strict=True)}  # experts' only once
    hessians = [(names, reading[id(parts[0])]) for names, parts in zip(groups, of_inputs, strict=True)]
    halves = [(parts[0], parts[1]) if len(parts) == 2 else None for parts in of_inputs]
    return BlockSensitivity(index, block, hessians, halves, fisher)


def _added(parts: Sequence[Hessian]) -> Hessian:
    """The Hessian of all parts of a text."""
    return parts[0] if len(parts) == 1 else jax.tree.map(lambda a, b: a + b, *parts)


def block_sensitivities(
    source: BlockSource,
    batches: Iterable[Any],
    visit: Callable[[BlockSensitivity], None],
    events: Events = ignore,
    *,
    linear: Linear = plain_linear,
    in_halves: Container[int] = (),
    begin: MeasuringPlace | None = None,
    keep: Callable[[MeasuringPlace], None] | None = None,
    spill: Spill | None = None,
) -> None:
    """Goes through a dense model forwards, then backwards, one block at a time.

    Held at once: one block, the next one, and the text's activations before every block, in bfloat16 if `linear`
    rounds to it.

    Args:
      source: the dense model.
      batches: int32 [batch, seq] of token ids, few will do. Sequences of one token are left out.
      visit: is given a :class:`BlockSensitivity` for each block, the last block first.
      events: told of each block, once forward and once backward: phase "measuring", the block's index as `detail`.
      linear: what multiplies with the weights, as in calibration.
      in_halves: indices of the blocks whose Hessians are wanted for two halves of the text, too, if it has two batches.
      begin: where an earlier pass came to; None to begin with the first block.
      keep: is given the place after each block, on the way back once `visit` has seen the block.
      spill: where the activations before every block are kept on disk; None to keep them in memory.

    Raises:
      DataError: no sequence has two tokens.
      NotFiniteError: activations or gradients are no numbers; says behind which block.
    """
    config, outer, batches = source.config, source.outer(), _that_predict(batches)
    chunks = list(Activations(config, outer, batches).chunks())
    places, residuals = [where for _, where in chunks], [state.residual for state, _ in chunks]
    before: list[list[jax.Array] | SpilledStates] = []
    kept_as = jnp.bfloat16 if linear is rounded_linear else residuals[0].dtype
    steps = Steps("measuring", 2 * config.num_layers, events)

    def note_before(streams: Iterable[Any]) -> None:
        before.append([] if spill is None else spill.states())
        for stream in streams:
            before[-1].append(jnp.asarray(stream))

    def tell(forward: bool, index: int, streams: list[jax.Array]) -> None:
        if keep is not None:
            keep(MeasuringPlace(forward, index, streams, before))

    def pass_forward(index: int, block: Block) -> None:
        note_before(residual.astype(kept_as) for residual in residuals)
        for chunk, where in enumerate(places):
            state = State(residuals[chunk])
            for stage in range(len(STAGES)):  # calibration's own programs
                state = run_stage(config, stage, block, state, where, linear)
            residuals[chunk] = state.residual
        refuse_infinite(residuals, f"activations after block {index}")
        tell(True, index + 1, residuals)
        steps.advance(note=f"forward through block {index}", detail=index)

    first, left = 0, config.num_layers  # the first block to pass, and the number of blocks that are to be measured
    if begin is not None:
        left = config.num_layers if begin.forward else begin.index + 1
        first = len(begin.before)
        for streams in begin.before:
            note_before(streams)
        if begin.forward:
            residuals[:] = map(jnp.asarray, begin.streams)
        if passed := 2 * (config.num_layers - left) + first:
            steps.advance(passed, note=f"{passed} steps are done already")
    sweep.forward(source, pass_forward, first=first, end=left)
    if begin is None or begin.forward:
        gradients = [
            loss_gradient(config, outer, x, jnp.asarray(tokens), linear, _first_counted(x.shape[1]))
            for x, tokens in zip(residuals, batches, strict=True)
        ]
        refuse_infinite(gradients, "gradients of the loss after the last block")
    else:
        gradients = [jax.device_put(gradient) for gradient in begin.streams]
    residuals.clear()
    counted = sum(len(batch) * (batch.shape[1] - 1 - _first_counted(batch.shape[1])) for batch in batches)

    def pass_backward(index: int, block: Block) -> None:
        parts = 2 if index in in_halves and len(places) > 1 else 1
        sums = [_empty_sums(config, block) for _ in range(parts)]
        for chunk, (x, where) in enumerate(zip(before.pop(), places, strict=True)):
            part = chunk % parts
            gradients[chunk], sums[part] = _backward(config, block, x, where, gradients[chunk], sums[part], linear)
        visit(_sensitivity(config, index, block, sums, counted))
        tell(False, index - 1, gradients)
        steps.advance(note=f"backward through block {index}", detail=index)

    sweep.backward(source, pass_backward, first=left - 1)
