"""Training what is continuous in a quantized model against the dense one. Codes stay as they are.

Trained are the statistics of each tile, the outlier values and the norm gains;
they cost nothing more to store or to run. Two objectives:

- ``blocks``: each block in turn, to give the dense block's output although its
  input comes from the quantized blocks before it (squared error).
- ``logits``: all blocks together, to give the dense model's next-token
  distributions (Kullback-Leibler divergence), by backpropagation one block at a time.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax  # schedules

from spqr_jax.errors import DataError, NotFiniteError
from spqr_jax.events import Events, Steps, ignore
from spqr_jax.models.attention import Positions
from spqr_jax.models.config import DecoderConfig
from spqr_jax.models.decoder import Block, Decoder, Outer, State, pass_block, run_block
from spqr_jax.stream import sweep
from spqr_jax.stream.activations import Activations
from spqr_jax.stream.blocks import BlockSink, BlockSource, TreeSink, as_source
from spqr_jax.stream.head import divergence_gradient
from spqr_jax.stream.stages import rounded_linear
from spqr_jax.tune.config import TuneConfig
from spqr_jax.tune.form import BlockForm, block_form, finished, note_entries, padded_entries, to_block, updated

_WARM_UP = 0.15  # share of steps over which the learning rate rises


# ---- steps ------------------------------------------------------------------------------


@partial(jax.jit, static_argnums=0)
def _run(config: DecoderConfig, form: BlockForm, x: jax.Array, where: Positions) -> jax.Array:
    return run_block(config, to_block(form, form.theta), State(x), where, rounded_linear).residual


@partial(jax.jit, static_argnums=0)
def _backward_step(
    config: DecoderConfig, form: BlockForm, x: jax.Array, where: Positions, gradient: jax.Array, rate: jax.Array
) -> tuple[BlockForm, jax.Array]:
    """Takes ∂L/∂output to ∂L/∂input, and the block one step on."""

    def run(x: jax.Array, theta: dict[str, Any]) -> jax.Array:
        return run_block(config, to_block(form, theta), State(x), where, rounded_linear).residual

    _, back = jax.vjp(run, x, form.theta)
    before, by_theta = back(gradient)
    return updated(form, by_theta, rate), before


@partial(jax.jit, static_argnums=0)
def _match_step(
    config: DecoderConfig, form: BlockForm, x: jax.Array, where: Positions, wanted: jax.Array, rate: jax.Array
) -> tuple[BlockForm, jax.Array]:
    """One step towards the dense block's output; also the loss, relative to what the block adds."""

    def loss(theta: dict[str, Any]) -> jax.Array:
        got = run_block(config, to_block(form, theta), State(x), where, rounded_linear).residual
        # By token: a few tokens' residuals are hundreds of times larger than the others'.
        size = jnp.mean(jnp.square(wanted), axis=-1)
        return jnp.mean(jnp.mean(jnp.square(got - wanted), axis=-1) / size)

    value, gradient = jax.value_and_grad(loss)(form.theta)
    return updated(form, gradient, rate), value


# ---- the two objectives -----------------------------------------------------------------


def tune(
    params: Decoder | BlockSource,
    dense: BlockSource,
    batches: Sequence[Any],
    config: TuneConfig | None = None,
    events: Events = ignore,
) -> Decoder:
    """Trains a quantized model's statistics, outlier values and norm gains; its codes and size stay.

    Args:
      params: the quantized model, in memory or as a source.
      dense: the model it was made from, read one block at a time.
      batches: int32 [batch, seq] of token ids, the calibration text; one step each.
      config: how.
      events: told of each step, as phase "tuning", with the step's loss as `detail`. A step is a batch, or with the
        objective ``blocks`` a block. Before that, with the objective ``logits``, phase "reading" tells of each block
        of the dense model.

    Raises:
      DataError: no batches.
      NotFiniteError: the loss is no number.
    """
    source = as_source(params)
    sink = TreeSink(source.config)
    tune_into(source, sink, dense, batches, config or TuneConfig(), events)
    return sink.params()


@dataclasses.dataclass(frozen=True)
class TuningPlace:
    """Where tuning is: what it takes to go on later with the same bits.

    Attributes:
      done: steps that are done.
      arrays: with the objective ``logits`` θ and the optimizer's state of all blocks; with ``blocks`` the text's
        residual streams behind the finished blocks, those of the dense model first.
    """

    done: int
    arrays: Sequence[Any]


def tune_into(
    source: BlockSource,
    sink: BlockSink,
    dense: BlockSource,
    batches: Sequence[Any],
    config: TuneConfig,
    events: Events = ignore,
    *,
    begin: TuningPlace | None = None,
    keep: Callable[[TuningPlace], None] | None = None,
) -> None:
    """As `tune`, from a source to a sink. The objective ``blocks`` holds one block at a time, ``logits`` all.

    Args:
      source, dense, batches, config, events: as `tune` has them.
      sink: takes the trained model. With ``blocks`` each block is put before `keep` is told of it.
      begin: where an earlier run came to; None to begin anew.
      keep: is given the place after each step.
    """
    batches = [np.asarray(batch) for batch in batches]
    if not batches:
        raise DataError("tuning needs calibration batches: give at least one int32 [batch, seq] of token ids")
    run = _tune_logits if config.objective == "logits" else _tune_blocks
    run(source, sink, dense, batches, config, events, begin, keep or (lambda place: None))
    sink.put_outer(source.outer())


def _finite(loss: float, where: str) -> float:
    if not math.isfinite(loss):
        raise NotFiniteError(
            f"the tuning loss is not a number from {where} on: try a lower learning rate (--tune-learning-rate), or "
            "--dtype float32"
        )
    return loss


def _orders(config: TuneConfig, batches: int) -> list[tuple[float, int]]:
    """(learning rate, batch) of each step."""
    rng = np.random.default_rng(config.seed)
    order = np.concatenate([rng.permutation(batches) for _ in range(config.epochs)])
    steps = len(order)
    if steps == 1:  # optax's schedule needs a step behind the warm-up
        return [(config.learning_rate, int(order[0]))]
    rate = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, max(1, round(_WARM_UP * steps)), steps)
    return [(float(rate(step + 1)), int(batch)) for step, batch in enumerate(order)]


def _residuals(config: DecoderConfig, outer: Outer, batches: list[np.ndarray]) -> list[jax.Array]:
    """The text's residual stream before the first block, [batch, seq, hidden] for each batch."""
    return [state.residual for state, _ in Activations(config, outer, batches).chunks()]


def _rounded_head(config: DecoderConfig, outer: Outer) -> Outer:
    """The dense model's norm and head, the head in bfloat16: rounded once, not at each step."""
    norm_only = Outer(None, outer.final_norm, final_norm_bias=outer.final_norm_bias)
    return dataclasses.replace(norm_only, **{config.head_path: getattr(outer, config.head_path).astype(jnp.bfloat16)})


def _forms(source: BlockSource) -> list[BlockForm]:
    """All blocks in the form in which they are trained."""
    longest: dict[str, int] = {}
    sweep.forward(source, lambda index, block: note_entries(longest, block))
    forms: list[BlockForm] = []
    entries, offset = padded_entries(longest), source.config.norm_offset
    sweep.forward(source, lambda index, block: forms.append(block_form(block, entries, offset)))
    return forms


def _with_trained(forms: list[BlockForm], leaves: Sequence[Any]) -> list[BlockForm]:
    """Forms with the θ and optimizer state that `TuningPlace` holds."""
    tree = jax.tree.structure([(form.theta, form.state) for form in forms])
    trained = jax.tree.unflatten(tree, [jax.device_put(leaf) for leaf in leaves])
    return [
        dataclasses.replace(form, theta=theta, state=state) for form, (theta, state) in zip(forms, trained, strict=True)
    ]


def _tune_logits(
    source: BlockSource,
    sink: BlockSink,
    dense: BlockSource,
    batches: list[np.ndarray],
    config: TuneConfig,
    events: Events,
    begin: TuningPlace | None,
    keep: Callable[[TuningPlace], None],
) -> None:
    model = source.config
    places = [where for _, where in Activations(model, source.outer(), batches).chunks()]
    starts = _residuals(model, source.outer(), batches)
    teacher = _residuals(model, dense.outer(), batches)
    reading = Steps("reading", model.num_layers, events)

    def pass_dense(index: int, block: Block) -> None:
        teacher[:] = [pass_block(model, block, x, where) for x, where in zip(teacher, places, strict=True)]
        reading.advance(note=f"block {index} of the dense model")

    sweep.forward(dense, pass_dense)
    forms, head = _forms(source), _rounded_head(model, dense.outer())
    orders = _orders(config, len(batches))
    steps = Steps("tuning", len(orders), events)
    done = 0 if begin is None else begin.done
    if begin is not None:
        forms = _with_trained(forms, begin.arrays)
        steps.advance(done, note=f"{done} steps are done already")
    for step, (rate, batch) in enumerate(orders[done:], done):
        x, where = starts[batch], places[batch]
        inputs = []
        for form in forms:
            inputs.append(x)
            x = _run(model, form, x, where)
        loss, gradient = divergence_gradient(model, head, x, teacher[batch], rounded_linear)
        for index in reversed(range(len(forms))):
            forms[index], gradient = _backward_step(
                model, forms[index], inputs.pop(), where, gradient, jnp.float32(rate)
            )
        value = _finite(float(loss), f"step {step + 1}")
        keep(TuningPlace(step + 1, jax.tree.leaves([(form.theta, form.state) for form in forms])))
        steps.advance(note=f"step {step + 1} of {len(orders)}  loss {value:.4f}", detail=value)
    sweep.forward(source, lambda index, block: sink.put_block(index, finished(forms[index], block)))


def _tune_blocks(
    source: BlockSource,
    sink: BlockSink,
    dense: BlockSource,
    batches: list[np.ndarray],
    config: TuneConfig,
    events: Events,
    begin: TuningPlace | None,
    keep: Callable[[TuningPlace], None],
) -> None:
    model, longest = source.config, dict[str, int]()
    sweep.forward(source, lambda index, block: note_entries(longest, block))
    entries = padded_entries(longest)
    places = [where for _, where in Activations(model, source.outer(), batches).chunks()]
    aims, inputs = _residuals(model, dense.outer(), batches), _residuals(model, source.outer(), batches)
    steps = Steps("tuning", model.num_layers, events)
    done = 0 if begin is None else begin.done
    if begin is not None:
        streams = [jax.device_put(array) for array in begin.arrays]
        aims, inputs = streams[: len(batches)], streams[len(batches) :]
        steps.advance(done, note=f"{done} blocks are done already")

    def visit(index: int, quantized: Block) -> None:
        original = dense.block(index)
        aims[:] = [pass_block(model, original, x, where) for x, where in zip(aims, places, strict=True)]
        form, losses = block_form(quantized, entries, model.norm_offset), []
        for rate, batch in _orders(config, len(batches)):
            form, loss = _match_step(model, form, inputs[batch], places[batch], aims[batch], jnp.float32(rate))
            losses.append(_finite(float(loss), f"block {index}"))
        sink.put_block(index, finished(form, quantized))
        inputs[:] = [_run(model, form, x, where) for x, where in zip(inputs, places, strict=True)]
        value = float(np.mean(losses[-len(batches) :]))
        keep(TuningPlace(index + 1, [*aims, *inputs]))
        steps.advance(note=f"block {index}  loss {value:.4f}", detail=value)

    sweep.forward(source, visit, first=done)
