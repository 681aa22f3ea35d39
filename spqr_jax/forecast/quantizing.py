"""The work of `spqr quantize`: calibration, the plan of a target, the solver, tuning."""

from __future__ import annotations

import math

from spqr_jax.config import SpQRConfig
from spqr_jax.forecast.passes import (
    Pass,
    Text,
    Work,
    block_sizes,
    block_total,
    expert_share,
    forward_pass,
    gram_operations,
    head_operations,
    hessian_operations,
    input_groups,
    kind_counts,
    model_weights,
)
from spqr_jax.models.config import BlockKind, DecoderConfig
from spqr_jax.models.weights import block_shapes, matrix_names
from spqr_jax.planning.budget import text_of_plan
from spqr_jax.tune.config import TuneConfig

_BACKWARD_ATTENTION = 4  # passes: forward, once more for the gradient, and twice as much backwards
_HEAD_GRADIENT = 3  # passes of the output head: forward, once more for the gradient, backwards
_FACTOR = 4 / 3  # operations of a Cholesky factor (1/3) and its inverse (1), times the cube of the width
_PLAN_PRICES = 5  # outlier thresholds that a plan tries with each width
_SOLVED_AGAIN = 1.6  # times that weights are solved to keep to a target: assumed; whole runs at 4.3 bits agree
_SMALLEST_STACK = 128  # rows that the column loop pads few rows to


def quantize_work(
    model: DecoderConfig,
    config: SpQRConfig,
    text: Text,
    tuning: TuneConfig | None = None,
    batch_tokens: int = 1024,
) -> Work:
    """All of it: reading the model, the plan, calibration and solver block by block, the head, tuning, writing.

    Args:
      model: sizes of the model.
      config: what is done to it.
      text: calibration text; not looked at where no part needs any.
      tuning: None for none.
      batch_tokens: tokens of a step of tuning.
    """
    work = Work(handled=model_weights(model))
    if config.target_bits is not None:
        work += plan_work(model, config, text)
    if config.needs_calibration:
        work += calibration_work(model, config, text)
    work += solver_work(model, config, text) + head_work(model, config, text)
    if tuning is not None:
        work += tuning_work(model, tuning, text, batch_tokens)
    return work + Work(programs=compile_seconds(model, config, tuning))


def calibration_work(model: DecoderConfig, config: SpQRConfig, text: Text) -> Work:
    """The text through every block, and the Hessians of what each matrix reads.

    One forward pass; two with a correction of drift or where a block's weights do not see its
    earlier ones quantized.
    """
    passed = forward_pass(model, text)
    times = 2 if config.corrects_drift or not config.sequential else 1
    work = times * _products(passed, rounds(config)) + _grams(hessian_operations(model, text.tokens), config)
    if config.corrects_drift:  # X₀ Xᵀ, which is not symmetric
        work += Work(gram=drift_operations(model, text.tokens))
    return work


def rounds(config: SpQRConfig) -> bool:
    """Whether calibration rounds the factors of its products to bfloat16."""
    return config.calibration_dtype != "float32"


def _grams(operations: float, config: SpQRConfig) -> Work:
    return Work(rounded_gram=operations) if rounds(config) else Work(gram=operations)


def drift_operations(model: DecoderConfig, tokens: int) -> float:
    """X₀ Xᵀ of every input, whole."""
    return sum(
        count * 2.0 * width**2 * tokens * expert_share(model, names[0])
        for kind, count in kind_counts(model)
        for names, width in input_groups(model, kind)
    )


def _products(passed: Pass, rounded: bool) -> Work:
    """A forward pass whose products round their factors to bfloat16, or have the weights' type."""
    if rounded:
        return Work(bfloat16=passed.products, attention=passed.attention)
    return Work(dense=passed.products, attention=passed.attention)


def plan_text(text: Text) -> Text:
    """The beginnings of windows that a plan looks at."""
    return Text(*text_of_plan(text.windows, text.seqlen))


def plan_work(model: DecoderConfig, config: SpQRConfig, text: Text) -> Work:
    """What `--target-bits` measures first: one pass forwards, one backwards, and trials of each width and threshold.

    Backwards, a block's products run once more forwards and once for the gradient of its input;
    weights get no gradient. Trials take a quarter of the rows that each matrix has, but at least one tile a choice.
    """
    seen = plan_text(text)
    passed = forward_pass(model, seen)
    products = 3 * passed.products + _HEAD_GRADIENT * head_operations(model, seen.tokens)
    work = _products(Pass(products, (1 + _BACKWARD_ATTENTION) * passed.attention), rounds(config))
    work += _grams(hessian_operations(model, seen.tokens), config)
    choices = _PLAN_PRICES * len(config.bit_choices)
    for kind, count in kind_counts(model):
        shapes = block_sizes(model, kind)
        for names, width in input_groups(model, kind):
            rows = sum(_trial_rows(shapes[name][0], config, choices) for name in names)
            work += count * (_column_loop(config, rows, width) + Work(factor=_FACTOR * width**3))
    return work


def _trial_rows(rows: int, config: SpQRConfig, choices: int) -> int:
    tile = config.stats_group_size if config.quantized_stats else 16
    return choices * tile * max(1, math.ceil(rows / tile) // (4 * choices))


def solver_work(model: DecoderConfig, config: SpQRConfig, text: Text) -> Work:
    """Factorizations and the column loop of all blocks; other methods' steps."""
    work, solved = Work(), _SOLVED_AGAIN if config.target_bits is not None else 1.0
    for kind, count in kind_counts(model):
        shapes = block_sizes(model, kind)
        for names, width in input_groups(model, kind):
            rows = sum(shapes[name][0] for name in names)
            if config.solver != "columns":
                work += count * _other_solver(config, rows, width)
            elif config.compensate:
                work += count * solved * (_column_loop(config, rows, width) + Work(factor=_FACTOR * width**3))
            else:
                work += Work(rounded=count * rows * width)
    if config.solver == "brecq":
        work += _block_reconstruction(model, config, text)
    return work


def _column_loop(config: SpQRConfig, rows: int, width: int) -> Work:
    """Every weight is visited once; bringing columns up to date takes rows·width² operations."""
    visits = float(max(rows, _SMALLEST_STACK) * width)
    update = Work(float32=visits * width)
    return update + (Work(searched=visits) if config.fit == "search" else Work(plain=visits))


def _other_solver(config: SpQRConfig, rows: int, width: int) -> Work:
    """Methods to compare with. Each begins with weights rounded to nearest.

    A step of those that learn takes W H and its gradient, 2·rows·width² operations each; a sweep of
    bit-split the same for each bit of a code. OBQ reads about a quarter of width³ numbers a row. Only counted:
    no run of these methods was compared with its forecast.
    """
    product = 2.0 * rows * width**2
    operations = {
        "adaround": 2 * config.solver_steps * product,
        "adaquant": 2 * config.solver_steps * product,
        "bit-split": config.solver_steps * (config.bits - 1) * product,
        "obq": rows * width**3 / 4,
        "brecq": 0.0,
    }
    return Work(rounded=rows * width, float32=operations[config.solver])


def _block_reconstruction(model: DecoderConfig, config: SpQRConfig, text: Text) -> Work:
    """BRECQ: g² of every block from one backward pass, the dense text beside the quantized, and steps of each block.

    A step runs one chunk of text, its gradients by inputs and by weights.
    """
    passed = forward_pass(model, text)
    chunk = forward_pass(model, Text(max(1, 1024 // text.seqlen), text.seqlen))
    importance = Work(
        dense=3 * passed.products + _HEAD_GRADIENT * head_operations(model, text.tokens),
        attention=(1 + _BACKWARD_ATTENTION) * passed.attention,
    )
    step = Work(bfloat16=2 * chunk.products, float32=chunk.products, attention=_BACKWARD_ATTENTION * chunk.attention)
    ahead = _products(passed, rounded=True)
    return importance + 2 * ahead + config.solver_steps * step


def head_work(model: DecoderConfig, config: SpQRConfig, text: Text) -> Work:
    """The output head: up to 4 bits as any other matrix, with more rounded to nearest, by the search fit."""
    head = config.for_head(model.head_path)
    if head is None:
        return Work()
    rows, width = model.vocab_size, model.hidden_size
    if not head.needs_calibration:
        return Work(rounded=rows * width)
    hessian = Work(gram=gram_operations(width, text.tokens), factor=_FACTOR * width**3)
    return hessian + (_column_loop(head, rows, width) if head.solver == "columns" else _other_solver(head, rows, width))


def tuning_work(model: DecoderConfig, tuning: TuneConfig, text: Text, batch_tokens: int = 1024) -> Work:
    """`--tune`: the dense model's outputs once, then a step for each batch of text and pass over it.

    A step of ``logits`` runs all blocks forwards, the head, and all blocks backwards: once more
    forwards, the gradient by inputs, and by weights in float32. A step of ``blocks`` leaves the first
    and the head out, but the text runs through each finished block once.
    """
    passed = forward_pass(model, text)
    weights = block_total(model)
    steps = tuning.epochs * math.ceil(text.windows / max(1, batch_tokens // text.seqlen))
    teacher = _products(passed, rounded=False)
    gradient = Work(
        bfloat16=2 * passed.products, float32=passed.products, attention=_BACKWARD_ATTENTION * passed.attention
    )
    run = _products(passed, rounded=True)
    head = Work(bfloat16=_HEAD_GRADIENT * head_operations(model, text.tokens))
    if tuning.objective == "logits":
        return teacher + tuning.epochs * (run + head + gradient) + Work(unpacked=steps * weights)
    return teacher + run + tuning.epochs * gradient + Work(unpacked=steps * weights)


# ---- compilation ------------------------------------------------------------------------
# Seconds on the reference machine (see machine.py). The demo model's 19.2 CPU seconds and one layer's 5.0
# (docs/explanation/quality.md) give the first three; the others are shares of what first runs took as a whole.

_START = 1.2  # small programs of any quantization
_BY_KIND = 3.0  # stages of one kind of block and their Hessians
_BY_STACK = 1.7  # one width and number of rows: stacking, column loop, cutting and packing
_ROUNDED_BY_STACK = 0.7  # the same without a column loop
_PLAN_BY_KIND = 6.0  # backward pass of one kind of block
_PLAN_START = 4.0  # gradient of the loss, trials
_TUNING_BY_KIND = 12.0  # a training step of one kind of block
_LEARNING_BY_MATRIX = 2.0  # a method that learns, for one shape of matrix


def compile_seconds(model: DecoderConfig, config: SpQRConfig, tuning: TuneConfig | None) -> float:
    """Seconds of compilation on the reference machine where no program is kept from an earlier run."""
    kinds = set(model.kinds)
    stacks = {stack for kind in kinds for stack in _stacks(model, kind)}
    seconds = _START + (_BY_STACK if config.compensate else _ROUNDED_BY_STACK) * len(stacks)
    if config.needs_calibration:
        seconds += _BY_KIND * len(kinds)
    if config.for_head(model.head_path) is not None:
        seconds += _ROUNDED_BY_STACK
    if config.target_bits is not None:
        seconds += _PLAN_START + _PLAN_BY_KIND * len(kinds)
    if config.solver != "columns":
        shapes = {block_shapes(model, kind)[name] for kind in kinds for name in matrix_names(model, kind)}
        seconds += _LEARNING_BY_MATRIX * len(shapes)
    if tuning is not None or config.solver == "brecq":
        seconds += _TUNING_BY_KIND * len(kinds)
    return seconds


def _stacks(model: DecoderConfig, kind: BlockKind) -> set[tuple[int, int]]:
    """(rows, width) of the matrices that are solved together."""
    shapes = block_shapes(model, kind)
    return {(sum(shapes[name][0] for name in names), width) for names, width in input_groups(model, kind)}
