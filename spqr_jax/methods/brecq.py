"""BRECQ (Li et al., "BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction",
arXiv 2102.05426): AdaRound's choices for all matrices of a block at once.

Letters: z, what a block adds up to for one token, from the quantized blocks before it; z*, the
same of the dense model; g = ∂L/∂z* of the summed next-token loss L. A block minimizes

    mean over tokens of  Σ_i g_i² (z_i - z*_i)² / unit + λ Σ (1 - |2h(v) - 1|^β)

(the paper's diagonal Fisher information, equation 10) over the v of all its matrices, whose
h(v) say how far each weight is rounded up (`spqr_jax.methods.adaround`). A step
sees one chunk of text. Beside the text's activations before and after a block, g² of every
block is held, in bfloat16: some gigabytes for a model of a billion parameters, which is
what this method manages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from spqr_jax.array import SpQRArray
from spqr_jax.config import SpQRConfig
from spqr_jax.methods.adaround import LAMBDA, choice_of, soft_choice, undecided
from spqr_jax.methods.grid import WeightGrid, adam_step, weight_grid, with_codes
from spqr_jax.models.attention import Positions
from spqr_jax.models.config import DecoderConfig
from spqr_jax.models.decoder import STAGES, Block, State, matrix_names, pass_block, run_block
from spqr_jax.solver import LayerStats, quantize_weights
from spqr_jax.solver.solve import solved_as
from spqr_jax.stream import sweep
from spqr_jax.stream.activations import Activations
from spqr_jax.stream.blocks import BlockSource
from spqr_jax.stream.head import loss_gradient
from spqr_jax.stream.stages import rounded_linear, stage_groups

LEARNING_RATE = 0.05
_SEED = 0  # of the order of the chunks

Report = Callable[[str, SpQRArray, LayerStats], None]
_Chunk = tuple[jax.Array, Positions, jax.Array, jax.Array]
"""What goes into a block and where it stands, what should come out, and g² of it."""


class _Rounding(NamedTuple):
    """A block's matrices between the codes below and above each weight."""

    block: Block
    grids: dict[str, WeightGrid]
    below: dict[str, jax.Array]  # ⌊w/s + z⌋, f32 [out, in]

    @classmethod
    def of(cls, block: Block, arrays: dict[str, SpQRArray]) -> _Rounding:
        """Of matrices that were rounded to nearest, on their grids."""
        grids = {name: weight_grid(array) for name, array in arrays.items()}
        grids = {name: grid._replace(maxq=jnp.float32(grid.maxq)) for name, grid in grids.items()}
        below = {name: jnp.floor(block[name].astype(jnp.float32) / g.scale + g.zero) for name, g in grids.items()}
        return cls(block, grids, below)

    def choices(self) -> dict[str, jax.Array]:
        """v with which each weight stays where it is."""
        places = {n: self.block[n].astype(jnp.float32) / g.scale + g.zero for n, g in self.grids.items()}
        return {name: choice_of(place - self.below[name]) for name, place in places.items()}

    def codes(self, up: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Codes of weights that go up by so much, 0..1."""
        return {
            name: jnp.clip(self.below[name] + up[name].astype(jnp.float32), 0.0, grid.maxq)
            for name, grid in self.grids.items()
        }

    def with_codes(self, codes: dict[str, jax.Array]) -> Block:
        """The block with what codes stand for."""
        values = {name: grid.values(codes[name]) for name, grid in self.grids.items()}
        return self.block.replace({name: value.astype(self.block[name].dtype) for name, value in values.items()})

    def nearest(self) -> Block:
        """The block rounded to nearest."""
        weights = {name: self.block[name].astype(jnp.float32) for name in self.grids}
        return self.with_codes({name: grid.codes(weights[name]) for name, grid in self.grids.items()})


_rounding_of = jax.jit(lambda block, arrays: _Rounding.of(block, arrays))
_first_choices = jax.jit(_Rounding.choices)
_nearest_block = jax.jit(_Rounding.nearest)
_start_optimizer = jax.jit(optax.adam(LEARNING_RATE).init)


@jax.jit
def _decided_codes(rounding: _Rounding, choices: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Codes of weights that go up where h(v) is at least one half."""
    return rounding.codes({name: soft_choice(choice) >= 0.5 for name, choice in choices.items()})


class BlockReconstruction:
    """Quantizes a model's blocks in order.

    Args:
      source: the dense model.
      batches: int32 [batch, seq] of token ids, as `activations` was made from.
      config: `SpQRConfig.baseline("brecq")`, perhaps with rules.
      report: told of each weight.
    """

    def __init__(self, source: BlockSource, batches: Sequence[Any], config: SpQRConfig, report: Report) -> None:
        self._config, self._report = config, report
        self._importance = _output_importance(source, batches)
        self._dense = Activations(source.config, source.outer(), batches, rounded_linear)

    def solve(
        self,
        activations: Activations | None,
        block: Block,
        prefix: str,
        last: bool,
        begin: Any = None,
        keep: Any = None,
    ) -> Block:
        """Quantizes one block and takes both streams of activations through it; see `spqr_jax.job.block_solver`.

        There is no place inside a block to go on from.
        """
        assert activations is not None
        model, importance = activations.config, self._importance.pop(0)
        for stage in range(len(STAGES)):
            self._dense.advance(stage, block)
        wanted = [state.residual for state, _ in self._dense.chunks()]
        data = [
            (state.residual, where, aim, weights)
            for (state, where), aim, weights in zip(activations.chunks(), wanted, importance, strict=True)
        ]
        configs = {name: self._config.for_path(prefix + name) for name in matrix_names(model, block.kind)}
        starts = {name: _nearest(block[name], own) for name, own in configs.items() if own is not None}
        rounding = _rounding_of(block, starts)
        decided = _decided_codes(rounding, self._learned(model, rounding, data))
        hessians = self._hessians(activations, block)
        quantized, dense = block, block
        for name, codes in decided.items():
            solved = solved_as(block[name], hessians[name], with_codes(starts[name], codes))
            quantized = quantized.replace({name: solved.array})
            dense = dense.replace({name: solved.dense.astype(block[name].dtype)})
            self._report(prefix + name, solved.array, solved.stats)
        for stage in range(len(STAGES)):
            activations.advance(stage, dense)
        return quantized

    def replay(self, activations: Activations | None, original: Block, finished: Block) -> None:
        """Takes both streams through a block that an earlier run has finished; see `spqr_jax.job.block_solver`."""
        assert activations is not None
        self._importance.pop(0)
        arrays = {name: weight for name, weight in finished.items() if isinstance(weight, SpQRArray)}
        dense = original.replace({name: a.to_dense().astype(original[name].dtype) for name, a in arrays.items()})
        for stage in range(len(STAGES)):
            self._dense.advance(stage, original)
            activations.advance(stage, dense)

    @property
    def streams(self) -> None:
        """It also holds g² of the blocks to come: a run that goes on makes all of it again."""

    def _learned(self, model: DecoderConfig, rounding: _Rounding, data: list[_Chunk]) -> dict[str, jax.Array]:
        """v of each weight after the last step."""
        choices = _first_choices(rounding)
        if not choices:
            return {}
        steps, rng = self._config.solver_steps, np.random.default_rng(_SEED)
        nearest = _nearest_block(rounding)
        error = np.mean([float(_error(model, nearest, *chunk)) for chunk in data])
        unit = jnp.float32((error if error > 0 else 1.0) / sum(choice.size for choice in choices.values()))
        state = _start_optimizer(choices)
        order = np.concatenate([rng.permutation(len(data)) for _ in range(-(-steps // len(data)))])[:steps]
        for step, chunk in enumerate(order):
            choices, state = _step(
                model, rounding, choices, state, data[chunk], unit, np.float32(step), np.float32(steps)
            )
        return choices

    def _hessians(self, activations: Activations, block: Block) -> dict[str, jax.Array]:
        """H of each matrix's input in the dense block, for the report."""
        ahead = activations.copy()
        found: dict[str, jax.Array] = {}
        for stage in range(len(STAGES)):
            groups = stage_groups(activations.config, block.kind, stage)
            for (names, _), hessian in zip(groups, ahead.hessians(stage, block), strict=True):
                found |= dict.fromkeys(names, hessian.matrix())
            if stage + 1 < len(STAGES):
                ahead.advance(stage, block)
        return found


def _nearest(w: jax.Array, config: SpQRConfig) -> SpQRArray:
    own = SpQRConfig.rtn(config.bits, config.group_size, fit=config.fit, stats_bits=config.stats_bits)
    return quantize_weights([w], None, [own])[0].array


@partial(jax.jit, static_argnums=0)
def _error(
    model: DecoderConfig, block: Block, x: jax.Array, where: Positions, wanted: jax.Array, importance: jax.Array
) -> jax.Array:
    """Mean over tokens of Σ_i g_i² (z_i - z*_i)²."""
    got = run_block(model, block, State(x), where, rounded_linear).residual
    return jnp.mean(jnp.sum(importance.astype(got.dtype) * jnp.square(got - wanted), axis=-1))


@partial(jax.jit, static_argnums=0, donate_argnums=(2, 3))
def _step(
    model: DecoderConfig,
    rounding: _Rounding,
    choices: dict[str, jax.Array],
    state: optax.OptState,
    chunk: _Chunk,
    unit: jax.Array,
    step: jax.Array,
    steps: jax.Array,
) -> tuple[dict[str, jax.Array], optax.OptState]:
    """One gradient step of all choices of a block."""

    def loss(choices: dict[str, jax.Array]) -> jax.Array:
        up = {name: soft_choice(choice) for name, choice in choices.items()}
        term = sum((undecided(choice, step, steps) for choice in choices.values()), jnp.float32(0))
        return _error(model, rounding.with_codes(rounding.codes(up)), *chunk) / unit + LAMBDA * term

    return adam_step(optax.adam(LEARNING_RATE), jax.grad(loss)(choices), state, choices)


@partial(jax.jit, static_argnums=0)
def _before(model: DecoderConfig, block: Block, x: jax.Array, where: Positions, gradient: jax.Array) -> jax.Array:
    """The gradient before a block from that behind it."""
    return jax.vjp(lambda x: run_block(model, block, State(x), where).residual, x)[1](gradient)[0]


def _output_importance(source: BlockSource, batches: Sequence[Any]) -> list[list[jax.Array]]:
    """g² of what each block adds up to, bfloat16 [batch, tokens, hidden] for each block and chunk."""
    model, outer = source.config, source.outer()
    chunks = list(Activations(model, outer, batches).chunks())
    places, residuals = [where for _, where in chunks], [state.residual for state, _ in chunks]
    inputs: list[list[jax.Array]] = []

    def pass_forward(index: int, block: Block) -> None:
        inputs.append(list(residuals))
        for chunk, where in enumerate(places):
            residuals[chunk] = pass_block(model, block, residuals[chunk], where)

    sweep.forward(source, pass_forward)
    gradients = [
        loss_gradient(model, outer, x, jnp.asarray(tokens)) for x, tokens in zip(residuals, batches, strict=True)
    ]
    residuals.clear()
    squares: list[list[jax.Array]] = []  # of the last block first

    def note_squares() -> None:
        squares.append([jnp.square(g).astype(jnp.bfloat16) for g in gradients])

    def pass_backward(index: int, block: Block) -> None:
        for chunk, (x, where) in enumerate(zip(inputs.pop(), places, strict=True)):
            gradients[chunk] = _before(model, block, x, where, gradients[chunk])
        note_squares()

    note_squares()
    sweep.backward(source, pass_backward, end=1)
    return squares[::-1]
