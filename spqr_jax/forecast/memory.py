"""Peak memory of a command, in bytes: what it holds throughout, and its largest part on top."""

from __future__ import annotations

from spqr_jax.config import SpQRConfig
from spqr_jax.evaluate.passes import stream_numbers
from spqr_jax.forecast.passes import Text, block_weights, input_groups, outer_weights
from spqr_jax.forecast.quantizing import plan_text
from spqr_jax.models.config import BlockKind, DecoderConfig
from spqr_jax.models.weights import block_shapes
from spqr_jax.tune import TuneConfig

FLOAT32 = 4

# Measured as peak resident memory on the demo model, see machine.py for the machine.
_RUNTIME = 0.45e9  # Python, JAX, compiled programs (docs/explanation/performance.md, "Memory")
_QUANTIZE_PROGRAMS = 0.15e9  # more of them, and what their compilation leaves
_CALIBRATION_PROGRAMS = 0.3e9  # those of calibration and the column loop, and the temporary arrays of one chunk of text
_PLAN_PROGRAMS = 0.3e9  # those of the measuring pass, and freed memory of it that stays with the process
_COLUMN_BYTES = 36  # a weight in the column loop: weight, error, visited, value, residual, flag, code, and their copies
_ROUND_BYTES = 24  # a weight that is rounded to nearest: 22 for Gemma 3 270M's head of 168 M weights, with 8 bits
_OUTER_COPIES = 2.6  # of the embedding and head while they are read or written; Gemma 3 270M
_HESSIAN_COPIES = 6  # sum, matrix, damped, reversed, factor, inverse
_GRADIENT_COPIES = 3  # of what a block computes, in its gradient
_TUNED_BYTES = 1.6  # a weight in training: its code, and its share of statistics, outliers and optimizer state
_PACKED_BYTES = 0.6  # a quantized weight


def quantize_bytes(
    model: DecoderConfig, config: SpQRConfig, text: Text, tuning: TuneConfig | None, itemsize: int
) -> float:
    """`spqr quantize`.

    Held throughout: the embedding and head, one block's dense weights (original, dequantized and next),
    and the activations of all calibration windows. On top, the largest of: one stage's Hessians and column
    loop; the head; the measuring pass, which holds the activations before every block; tuning. Or the
    embedding and head alone, with their copies while they are read or written.

    Args:
      model, config, text, tuning: as `quantize_work`.
      itemsize: bytes of a dense weight.
    """
    outer = outer_weights(model) * itemsize
    blocks = 3 * largest_block(model) * itemsize
    calibrated = config.needs_calibration
    held = outer + blocks + (calibration_bytes(model, config, text, itemsize) if calibrated else 0)
    phases = [held + _solver_bytes(model, config), outer + _head_bytes(model, config), _OUTER_COPIES * outer]
    programs = _QUANTIZE_PROGRAMS + _CALIBRATION_PROGRAMS * calibrated
    if config.target_bits is not None:
        programs += _PLAN_PROGRAMS
        phases.append(outer + blocks + _plan_bytes(model, text, itemsize))
    if tuning is not None:
        phases.append(outer + blocks + _tuning_bytes(model, text, itemsize))
    return _RUNTIME + programs + max(phases)


def largest_block(model: DecoderConfig) -> int:
    """Weights of the largest block."""
    return max(block_weights(model, kind) for kind in set(model.kinds))


def widest_inner(model: DecoderConfig) -> int:
    """Width of the widest activations between two stages of a block, a token."""
    experts = model.experts_per_token * model.expert_size if model.num_experts else 0
    return max(model.num_heads * model.head_dim, model.intermediate_size, experts)


def calibration_bytes(model: DecoderConfig, config: SpQRConfig, text: Text, itemsize: int) -> float:
    """The residual stream of all windows, and what the stage at hand made of it; twice with a correction of drift."""
    times = 2 if config.corrects_drift or not config.sequential or config.solver == "brecq" else 1
    importance = 2 * model.num_layers * model.hidden_size if config.solver == "brecq" else 0  # bfloat16
    return text.tokens * (times * (model.hidden_size + widest_inner(model)) * itemsize + importance)


def _solver_bytes(model: DecoderConfig, config: SpQRConfig) -> float:
    """One stage's Hessians, and the column loop of the matrices that read one input."""
    per_weight = _COLUMN_BYTES if config.compensate else _ROUND_BYTES
    return max(_group_bytes(model, kind, per_weight) for kind in set(model.kinds))


def _group_bytes(model: DecoderConfig, kind: BlockKind, per_weight: int) -> float:
    shapes = block_shapes(model, kind)
    return max(
        _HESSIAN_COPIES * FLOAT32 * width**2 + per_weight * width * sum(shapes[name][0] for name in names)
        for names, width in input_groups(model, kind)
    )


def _head_bytes(model: DecoderConfig, config: SpQRConfig) -> float:
    if config.for_head(model.head_path) is None:
        return 0.0
    return float(_ROUND_BYTES * model.vocab_size * model.hidden_size)


def _plan_bytes(model: DecoderConfig, text: Text, itemsize: int) -> float:
    """Activations before every block, the gradient of one block and one chunk, and the trials of one stage."""
    seen = plan_text(text)
    kept = (model.num_layers + 2) * seen.tokens * model.hidden_size * itemsize
    hessians = max(sum(FLOAT32 * width**2 for _, width in input_groups(model, kind)) for kind in set(model.kinds))
    trials = max(_group_bytes(model, kind, _COLUMN_BYTES) for kind in set(model.kinds))
    gradient = _gradient_bytes(model, max(text.seqlen, 1024))
    logits = 3 * FLOAT32 * min(512, text.seqlen) * max(1, 1024 // text.seqlen) * model.vocab_size
    return kept + max(2 * hessians + gradient, logits, hessians + trials)


def _gradient_bytes(model: DecoderConfig, tokens: int) -> float:
    """What a block computes of one chunk of text, kept for its gradient, and the gradient."""
    experts = max(1, model.num_experts)
    attention = model.num_heads + 2 * model.num_kv_heads
    a_token = 4 * model.hidden_size + 2 * attention * model.head_dim + 4 * experts * widest_inner(model)
    return float(_GRADIENT_COPIES * FLOAT32 * tokens * a_token)


def _tuning_bytes(model: DecoderConfig, text: Text, itemsize: int) -> float:
    """The whole quantized model as it is trained, the text at both ends of both models, one block's gradients."""
    weights = sum(block_weights(model, kind) for kind in model.kinds)
    ends = 3 * text.tokens * model.hidden_size * itemsize
    inputs = (model.num_layers + 1) * max(text.seqlen, 1024) * model.hidden_size * FLOAT32
    block = 6 * FLOAT32 * largest_block(model)
    head = 2 * model.vocab_size * model.hidden_size  # rounded to bfloat16
    forms = (_TUNED_BYTES + _PACKED_BYTES) * weights
    return forms + ends + inputs + block + head + _gradient_bytes(model, max(text.seqlen, 1024))


def perplexity_bytes(model: DecoderConfig, text: Text, batch_size: int, itemsize: int, packed: bool) -> float:
    """`spqr perplexity`: the weights outside of the blocks, two blocks, the residual stream, and one batch's
    activations and logits. An output head that is packed is counted as a dense one.
    """
    held = _held_model(model, itemsize, packed) + _stream_bytes(model, text, model.hidden_size)
    return _RUNTIME + held + _window_bytes(model, text, batch_size, 512)


def compare_bytes(dense: DecoderConfig, quantized: DecoderConfig, text: Text, batch_size: int, itemsize: int) -> float:
    """As `perplexity_bytes` for both models, with fewer positions' logits, of both with their probabilities."""
    models = _held_model(dense, itemsize, packed=False) + _held_model(quantized, itemsize, packed=True)
    streams = _stream_bytes(dense, text, dense.hidden_size + quantized.hidden_size)
    return _RUNTIME + models + streams + 2 * _window_bytes(dense, text, batch_size, 128)


def analyze_bytes(model: DecoderConfig, text: Text, itemsize: int) -> float:
    """As `quantize_bytes`, with a map of sensitivities in place of the column loop."""
    held = outer_weights(model) * itemsize + largest_block(model) * itemsize
    return (
        _RUNTIME
        + _QUANTIZE_PROGRAMS
        + held
        + calibration_bytes(model, SpQRConfig(), text, itemsize)
        + max(_group_bytes(model, kind, _COLUMN_BYTES) for kind in set(model.kinds))
    )


def _held_model(model: DecoderConfig, itemsize: int, packed: bool) -> float:
    """What is outside of the blocks; a block and the next one. A packed block is dense as well, in float32 at most."""
    a_block = 2 * _PACKED_BYTES + FLOAT32 if packed else 2 * itemsize
    return outer_weights(model) * itemsize + a_block * largest_block(model)


def _stream_bytes(model: DecoderConfig, text: Text, width: int) -> float:
    """The residual streams of all windows, or of as many as are read at a time."""
    return float(FLOAT32 * min(text.tokens * width, stream_numbers(model)))


def _window_bytes(model: DecoderConfig, text: Text, batch_size: int, positions: int) -> float:
    """Activations of one block on a batch, and the logits of so many positions of each of its windows."""
    batch = min(batch_size, text.windows)
    a_token = 4 * model.hidden_size + 3 * widest_inner(model) + 3 * model.num_heads * model.head_dim
    activations = FLOAT32 * batch * text.seqlen * a_token
    return activations + 3.0 * FLOAT32 * batch * min(positions, text.seqlen) * model.vocab_size
