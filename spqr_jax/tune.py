"""Training what is continuous in a quantized model against the dense one. Codes stay as they are.

Trained are the statistics of each tile, the outlier values and the norm gains;
they cost nothing more to store or to run. Two objectives:

- ``blocks``: each block in turn, to give the dense block's output although its
  input comes from the quantized blocks before it (squared error).
- ``logits``: all blocks together, to give the dense model's next-token
  distributions (Kullback-Leibler divergence), by backpropagation one block at a time.

Each trained parameter p is p₀ + size · θ with θ starting at 0 and `size` such that
θ = 1 doubles a scale, moves a zero point by one code, an outlier by their root mean
square, or doubles a gain: one learning rate then fits all.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax  # schedules, and the form of an optimizer
from jax import lax

from spqr_jax.array import SpQRArray
from spqr_jax.blocks import BlockSource
from spqr_jax.calibrate import Activations, rounded_linear
from spqr_jax.errors import DataError, SpQRError
from spqr_jax.layout import round_up
from spqr_jax.models.attention import Positions
from spqr_jax.models.config import DecoderConfig
from spqr_jax.models.decoder import Block, Decoder, Outer, State, logits, pass_block, run_block
from spqr_jax.packing import unpack_codes

Tune = Literal["none", "blocks", "logits"]
Progress = Callable[[str, float], None]
"""Told after each step: what was done, and its loss."""

_WARM_UP = 0.15  # share of steps over which the learning rate rises
_TINY = 1e-20  # gradients of a mean loss may be small; only 0/0 is to be kept out
_HEAD_CHUNK = 64  # positions whose logits are held at once
_OUTLIER_STEP = 1024  # outlier lists are padded to multiples of this, so that blocks share programs


@dataclasses.dataclass(frozen=True)
class TuneConfig:
    """How to train.

    Attributes:
      objective: ``blocks`` or ``logits``.
      epochs: times the text is gone through (``blocks``: by each block).
      learning_rate: of the first step, in shares of a parameter's size; falls to
        0 along a cosine.
      batch_tokens: about how many tokens a step should see; `tune` itself takes
        batches as they come.
      seed: of the order of the batches.

    Raises:
      SpQRError: a value outside its range.
    """

    objective: Literal["blocks", "logits"] = "logits"
    epochs: int = 3
    learning_rate: float = 2e-3
    batch_tokens: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        if self.objective not in ("blocks", "logits"):
            raise SpQRError(f"objective must be blocks or logits, got {self.objective!r}")
        if self.epochs < 1 or self.batch_tokens < 1:
            raise SpQRError(f"epochs and batch_tokens must be at least 1, got {self.epochs} and {self.batch_tokens}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise SpQRError(f"learning_rate must be positive, got {self.learning_rate}")


# ---- a block in the form in which it is trained ------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Fixed:
    """What training leaves alone of one weight, unpacked: codes u8 [out, padded in], statistics codes [out, groups]."""

    codes: jax.Array
    scale_codes: jax.Array | None
    zero_codes: jax.Array | None
    perm: jax.Array | None
    rows: jax.Array  # int32 [entries], of the outliers
    cols: jax.Array
    start: dict[str, jax.Array]  # p₀
    size: dict[str, jax.Array]  # what θ = 1 adds to it
    inner: int = dataclasses.field(metadata={"static": True})
    group_size: int = dataclasses.field(metadata={"static": True})
    tile: int = dataclasses.field(metadata={"static": True})


def _fixed(array: SpQRArray, entries: int) -> _Fixed:
    # Outlier lists differ in length from weight to weight; on the host that costs no compilation.
    extra = (0, entries - array.outlier_cols.shape[0])
    values = np.asarray(array.outlier_values, np.float32)
    rows = np.repeat(np.arange(array.shape[0], dtype=np.int32), np.diff(np.asarray(array.outlier_row_ptr)))
    stats, out = jnp.asarray(array.tile_stats, jnp.float32), array.shape[0]
    scale_codes, zero_codes = array.scale_codes, array.zero_codes
    if scale_codes is not None and zero_codes is not None:
        scale_codes = _unpack(jnp.asarray(scale_codes), array.scale_bits).T[:out]
        zero_codes = _unpack(jnp.asarray(zero_codes), array.zero_bits).T[:out]
    return _Fixed(
        codes=_unpack(jnp.asarray(array.codes), array.bits),
        scale_codes=scale_codes,
        zero_codes=zero_codes,
        perm=None if array.perm is None else jnp.asarray(array.perm, jnp.int32),
        rows=jnp.asarray(np.pad(rows, (0, entries - len(rows)))),
        cols=jnp.asarray(np.pad(np.asarray(array.outlier_cols, np.int32), extra)),
        start={"stats": stats, "outliers": jnp.asarray(np.pad(values, extra))},
        size={
            "stats": _stats_size(stats, scale_codes, zero_codes, array.stats_group_size),
            # 0 where a list is padded: those entries are not there.
            "outliers": jnp.asarray(np.sqrt(np.mean(np.square(values))) * (np.arange(entries) < array.nnz)),
        },
        inner=array.shape[1],
        group_size=array.group_size,
        tile=array.stats_group_size,
    )


_unpack = jax.jit(unpack_codes, static_argnums=1)


@partial(jax.jit, static_argnums=3)
def _stats_size(stats: jax.Array, scale_codes: jax.Array | None, zero_codes: jax.Array | None, tile: int) -> jax.Array:
    """What θ = 1 adds to `stats`: to the statistics [rows, groups, 2] themselves, or to those of tiles [.., .., 4]."""
    if scale_codes is None or zero_codes is None:
        return jnp.stack([jnp.abs(stats[..., 0]), jnp.ones_like(stats[..., 1])], axis=-1)
    ss, sz, zs, zz = jnp.moveaxis(stats, -1, 0)

    def distance(codes: jax.Array, offset: jax.Array) -> jax.Array:
        """Mean |code - offset| in each tile: what a unit of the tile's factor adds to its members."""
        offsets = jnp.repeat(offset, tile, axis=0)[: codes.shape[0]]
        away = jnp.pad(jnp.abs(codes.astype(jnp.float32) - offsets), ((0, -codes.shape[0] % tile), (0, 0)))
        rows = jnp.minimum(tile, codes.shape[0] - tile * jnp.arange(len(offset)))
        return jnp.maximum(away.reshape(-1, tile, codes.shape[1]).sum(axis=1) / rows[:, None], 1.0)

    far = distance(scale_codes, sz)
    return jnp.stack([jnp.abs(ss), far, 1 / distance(zero_codes, zz), 1 / jnp.maximum(jnp.abs(zs), 1e-2)], axis=-1)


@jax.custom_vjp
def _undo_permutation(w: jax.Array, perm: jax.Array) -> jax.Array:
    return jnp.take(w, jnp.argsort(perm), axis=1)


# The transpose of a permutation is a gather too; JAX would scatter, one column at a time.
_undo_permutation.defvjp(
    lambda w, perm: (_undo_permutation(w, perm), perm), lambda perm, g: (jnp.take(g, perm, axis=1), None)
)


def _values(fixed: _Fixed, theta: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: fixed.start[name] + fixed.size[name] * theta[name] for name in theta}


def _dense(fixed: _Fixed, theta: dict[str, jax.Array]) -> jax.Array:
    """The weight [out, in], as `SpQRArray.to_dense`, differentiable in θ."""
    values = _values(fixed, theta)
    stats, out = values["stats"], fixed.codes.shape[0]
    if fixed.scale_codes is None or fixed.zero_codes is None:
        scale, zero = stats[..., 0], stats[..., 1]
    else:
        ss, sz, zs, zz = jnp.moveaxis(jnp.repeat(stats, fixed.tile, axis=0)[:out], -1, 0)
        scale = ss * (fixed.scale_codes.astype(jnp.float32) - sz)
        zero = zs * (fixed.zero_codes.astype(jnp.float32) - zz)
    groups = scale.shape[1]
    codes = fixed.codes[:, : groups * fixed.group_size].astype(jnp.float32).reshape(out, groups, fixed.group_size)
    dense = (scale[..., None] * (codes - zero[..., None])).reshape(out, -1)[:, : fixed.inner]
    dense = dense.at[fixed.rows, fixed.cols].add(values["outliers"], mode="promise_in_bounds")
    return dense if fixed.perm is None else _undo_permutation(dense, fixed.perm)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _BlockForm:
    """A block in training: what is fixed, θ, and the optimizer's state.

    Attributes:
      fixed: name -> `_Fixed`.
      dense: the block's other leaves by name, norm gains among them.
      theta: name -> {"stats", "outliers"}, or for a norm gain its θ [hidden].
      state: of the optimizer.
    """

    fixed: dict[str, _Fixed]
    dense: dict[str, jax.Array]
    theta: dict[str, Any]
    state: Any


class _Moments(NamedTuple):
    """Of the optimizer: steps so far, running means of the gradient and of its mean square, an array each."""

    steps: jax.Array
    first: Any
    second: Any


def _scale_by_array_moment(b1: float = 0.9, b2: float = 0.95) -> optax.GradientTransformation:
    """Adam with one second moment for each array, as Adam-mini (arXiv 2406.16793), or for each kind in `stats`.

    A few steps on little text say little about any single parameter: Adam moves those
    that hardly matter as far as the others, and most of that is noise.
    """

    def mean_square(g: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(g), axis=(0, 1) if g.ndim == 3 else None)

    def init(params: Any) -> _Moments:
        zero = jnp.zeros((), jnp.int32)
        return _Moments(zero, jax.tree.map(jnp.zeros_like, params), jax.tree.map(mean_square, params))

    def update(gradient: Any, state: _Moments, params: Any = None) -> tuple[Any, _Moments]:
        steps = state.steps + 1
        first = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.first, gradient)
        second = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * mean_square(g), state.second, gradient)
        taken = steps.astype(jnp.float32)
        seen1, seen2 = 1 - b1**taken, 1 - b2**taken  # the means start at 0
        step = jax.tree.map(lambda m, v: m / seen1 / (jnp.sqrt(v / seen2) + _TINY), first, second)
        return step, _Moments(steps, first, second)

    return optax.GradientTransformation(init, update)


_OPTIMIZER = _scale_by_array_moment()


def _block_form(block: Block, entries: dict[str, int]) -> _BlockForm:
    leaves = {field.name: getattr(block, field.name) for field in dataclasses.fields(block)}
    fixed = {n: _fixed(leaf, entries[n]) for n, leaf in leaves.items() if isinstance(leaf, SpQRArray)}
    dense = {n: jnp.asarray(leaf, jnp.float32) for n, leaf in leaves.items() if n not in fixed and leaf is not None}
    theta: dict[str, Any] = {n: jax.tree.map(jnp.zeros_like, one.start) for n, one in fixed.items()}
    theta |= {n: jnp.zeros_like(leaf) for n, leaf in dense.items() if leaf.ndim == 1}
    return _BlockForm(fixed, dense, theta, _start_optimizer(theta))


_start_optimizer = jax.jit(_OPTIMIZER.init)


def _entries(blocks: Sequence[Block]) -> dict[str, int]:
    """Length to which each weight's outlier list is padded, so that all blocks are of one form."""
    longest: dict[str, int] = {}
    for block in blocks:
        for field in dataclasses.fields(block):
            leaf = getattr(block, field.name)
            if isinstance(leaf, SpQRArray):
                longest[field.name] = max(longest.get(field.name, 1), leaf.outlier_cols.shape[0])
    return {name: round_up(length, _OUTLIER_STEP) for name, length in longest.items()}


def _gain(dense: jax.Array, theta: jax.Array) -> jax.Array:
    return dense * (1 + theta)


def _to_block(form: _BlockForm, theta: dict[str, Any], like: type[Block]) -> Block:
    """The block with dense weights, differentiable in θ."""
    leaves = dict(form.dense)
    for name, own in theta.items():
        leaves[name] = _dense(form.fixed[name], own) if name in form.fixed else _gain(form.dense[name], own)
    return like(**leaves)


def _finished(form: _BlockForm, block: Block) -> Block:
    """The quantized block with what was trained put back, in its own types."""
    changes: dict[str, Any] = {}
    for name, theta in form.theta.items():
        leaf = getattr(block, name)
        if isinstance(leaf, SpQRArray):
            values = _values(form.fixed[name], theta)
            entries = leaf.outlier_cols.shape[0]
            outliers = jnp.where(jnp.arange(entries) < leaf.nnz, values["outliers"][:entries], 0.0)
            changes[name] = dataclasses.replace(
                leaf, tile_stats=values["stats"].astype(jnp.float16), outlier_values=outliers.astype(jnp.float16)
            )
        else:
            changes[name] = _gain(form.dense[name], theta).astype(leaf.dtype)
    return dataclasses.replace(block, **changes)


def _updated(form: _BlockForm, gradient: dict[str, Any], rate: jax.Array) -> _BlockForm:
    updates, state = _OPTIMIZER.update(gradient, form.state)
    theta = jax.tree.map(lambda p, step: p - rate * step, form.theta, updates)
    return dataclasses.replace(form, theta=theta, state=state)


# ---- steps ------------------------------------------------------------------------------


@partial(jax.jit, static_argnums=0)
def _run(config: DecoderConfig, form: _BlockForm, x: jax.Array, where: Positions) -> jax.Array:
    return run_block(config, _to_block(form, form.theta, Block), State(x), where, rounded_linear).residual


@partial(jax.jit, static_argnums=0)
def _backward_step(
    config: DecoderConfig, form: _BlockForm, x: jax.Array, where: Positions, gradient: jax.Array, rate: jax.Array
) -> tuple[_BlockForm, jax.Array]:
    """Takes ∂L/∂output to ∂L/∂input, and the block one step on."""

    def run(x: jax.Array, theta: dict[str, Any]) -> jax.Array:
        return run_block(config, _to_block(form, theta, Block), State(x), where, rounded_linear).residual

    _, back = jax.vjp(run, x, form.theta)
    before, by_theta = back(gradient)
    return _updated(form, by_theta, rate), before


@partial(jax.jit, static_argnums=0)
def _match_step(
    config: DecoderConfig, form: _BlockForm, x: jax.Array, where: Positions, wanted: jax.Array, rate: jax.Array
) -> tuple[_BlockForm, jax.Array]:
    """One step towards the dense block's output; also the loss, relative to what the block adds."""

    def loss(theta: dict[str, Any]) -> jax.Array:
        got = run_block(config, _to_block(form, theta, Block), State(x), where, rounded_linear).residual
        # By token: a few tokens' residuals are hundreds of times larger than the others'.
        size = jnp.mean(jnp.square(wanted), axis=-1)
        return jnp.mean(jnp.mean(jnp.square(got - wanted), axis=-1) / size)

    value, gradient = jax.value_and_grad(loss)(form.theta)
    return _updated(form, gradient, rate), value


@partial(jax.jit, static_argnums=0)
def _divergence(
    config: DecoderConfig, outer: Outer, student: jax.Array, teacher: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Mean KL(p ‖ q) in nats a token, p the teacher's and q the student's, and its gradient by the student.

    Both are residual streams [batch, tokens, hidden]. By the student's logits the
    gradient is q - p; the norm and head before them are differentiated.
    """
    hidden = student.shape[-1]
    tokens = student.size // hidden
    chunk = min(_HEAD_CHUNK, tokens)
    padding = -tokens % chunk

    def by_chunk(x: jax.Array) -> jax.Array:
        return jnp.pad(x.reshape(tokens, hidden), ((0, padding), (0, 0))).reshape(-1, chunk, hidden)

    # Rounded once, not once a chunk. A tied head is the embedding, which has no part here.
    head = dataclasses.replace(outer, **{config.head_path: getattr(outer, config.head_path).astype(jnp.bfloat16)})

    def one(part: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        student, teacher, counted = part
        scores, back = jax.vjp(lambda x: logits(config, head, x, rounded_linear), student)
        got, wanted = (jax.nn.log_softmax(each) for each in (scores, logits(config, head, teacher, rounded_linear)))
        p = jnp.exp(wanted)
        value = jnp.sum(jnp.where(counted, jnp.sum(p * (wanted - got), axis=-1), 0.0)) / tokens
        return value, back(jnp.where(counted[:, None], jnp.exp(got) - p, 0.0) / tokens)[0]

    counted = (jnp.arange(tokens + padding) < tokens).reshape(-1, chunk)
    values, gradients = lax.map(one, (by_chunk(student), by_chunk(teacher), counted))
    return jnp.sum(values), gradients.reshape(-1, hidden)[:tokens].reshape(student.shape)


# ---- the two objectives -----------------------------------------------------------------


def tune(
    params: Decoder,
    dense: BlockSource,
    batches: Sequence[Any],
    config: TuneConfig | None = None,
    progress: Progress | None = None,
) -> Decoder:
    """Trains a quantized model's statistics, outlier values and norm gains; its codes and size stay.

    Args:
      params: the quantized model.
      dense: the model it was made from, read one block at a time.
      batches: int32 [batch, seq] of token ids, the calibration text; one step each.
      config: how.
      progress: told after each step.

    Raises:
      DataError: no batches.
    """
    config = config or TuneConfig()
    batches = [np.asarray(batch) for batch in batches]
    if not batches:
        raise DataError("tuning needs calibration batches: give at least one int32 [batch, seq] of token ids")
    return (_tune_logits if config.objective == "logits" else _tune_blocks)(
        params, dense, batches, config, progress or (lambda done, loss: None)
    )


def _orders(config: TuneConfig, batches: int) -> list[tuple[float, int]]:
    """(learning rate, batch) of each step."""
    rng = np.random.default_rng(config.seed)
    order = np.concatenate([rng.permutation(batches) for _ in range(config.epochs)])
    steps = len(order)
    rate = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, max(1, round(_WARM_UP * steps)), steps)
    return [(float(rate(step + 1)), int(batch)) for step, batch in enumerate(order)]


def _tune_logits(
    params: Decoder, dense: BlockSource, batches: list[np.ndarray], config: TuneConfig, progress: Progress
) -> Decoder:
    model = params.config
    places = [where for _, where in Activations(model, params.outer, batches).chunks()]
    begin = [state.residual for state, _ in Activations(model, params.outer, batches).chunks()]
    teacher = [state.residual for state, _ in Activations(model, dense.outer(), batches).chunks()]
    for index in range(model.num_layers):
        block = dense.block(index)
        teacher = [pass_block(model, block, x, where) for x, where in zip(teacher, places, strict=True)]
    entries = _entries(params.layers)
    forms = [_block_form(block, entries) for block in params.layers]
    for step, (rate, batch) in enumerate(orders := _orders(config, len(batches))):
        x, where = begin[batch], places[batch]
        inputs = []
        for form in forms:
            inputs.append(x)
            x = _run(model, form, x, where)
        loss, gradient = _divergence(model, dense.outer(), x, teacher[batch])
        for index in reversed(range(len(forms))):
            forms[index], gradient = _backward_step(
                model, forms[index], inputs.pop(), where, gradient, jnp.float32(rate)
            )
        progress(f"step {step + 1} of {len(orders)}", float(loss))
    layers = tuple(_finished(form, block) for form, block in zip(forms, params.layers, strict=True))
    return dataclasses.replace(params, layers=layers)


def _tune_blocks(
    params: Decoder, dense: BlockSource, batches: list[np.ndarray], config: TuneConfig, progress: Progress
) -> Decoder:
    model, entries, layers = params.config, _entries(params.layers), []
    places = [where for _, where in Activations(model, params.outer, batches).chunks()]
    wanted = [state.residual for state, _ in Activations(model, dense.outer(), batches).chunks()]
    inputs = [state.residual for state, _ in Activations(model, params.outer, batches).chunks()]
    for index, quantized in enumerate(params.layers):
        original = dense.block(index)
        wanted = [pass_block(model, original, x, where) for x, where in zip(wanted, places, strict=True)]
        form, losses = _block_form(quantized, entries), []
        for rate, batch in _orders(config, len(batches)):
            form, loss = _match_step(model, form, inputs[batch], places[batch], wanted[batch], jnp.float32(rate))
            losses.append(float(loss))
        layers.append(_finished(form, quantized))
        inputs = [_run(model, form, x, where) for x, where in zip(inputs, places, strict=True)]
        progress(f"block {index}", float(np.mean(losses[-len(batches) :])))
    return dataclasses.replace(params, layers=tuple(layers))
