"""Peak memory of the commands that measure, in bytes: what each holds throughout, and its largest part on top."""

from __future__ import annotations

from spqr_jax.config import SpQRConfig
from spqr_jax.evaluate.passes import stream_numbers
from spqr_jax.forecast.memory_plan import FLOAT32, PACKED_BYTES, calibration_bytes, largest_block, widest_inner
from spqr_jax.forecast.passes import Text, input_groups, outer_weights
from spqr_jax.models.config import BlockKind, DecoderConfig
from spqr_jax.models.weights import block_shapes
from spqr_jax.stream.outer import OuterMemory

_RUNTIME = 0.45e9  # Python, JAX, compiled programs (docs/explanation/performance.md, "Memory")
_ANALYZE_PROGRAMS = 0.15e9  # more of them, and what their compilation leaves
_DECOMPRESSION = 1.5  # bytes on disk and in memory, for a byte of an array that is read as a whole
_FACTOR_COPIES = 6  # of a Hessian: sum, matrix, damped, reversed, factor, inverse
_MAP_BYTES = 36  # a weight whose sensitivity is mapped


def perplexity_bytes(
    model: DecoderConfig, text: Text, batch_size: int, itemsize: int, packed: bool, outer: OuterMemory | None = None
) -> float:
    """`spqr perplexity`: the weights outside of the blocks, two blocks, the residual stream, and one batch's
    activations and logits.

    Args:
      model, text: what is measured.
      batch_size: windows that are read at a time.
      itemsize: bytes of a dense weight.
      packed: whether the blocks are.
      outer: what the weights outside of the blocks take; None if they are dense and in memory.
    """
    outer = outer or _dense_outer(model, itemsize)
    working = _blocks_bytes(model, itemsize, packed) + _stream_bytes(model, text, model.hidden_size)
    working += _window_bytes(model, text, batch_size, 512, outer.head_rows)
    return _RUNTIME + outer.held + max(working, _DECOMPRESSION * outer.reading)


def compare_bytes(
    dense: DecoderConfig,
    quantized: DecoderConfig,
    text: Text,
    batch_size: int,
    itemsize: int,
    outers: tuple[OuterMemory | None, OuterMemory | None] = (None, None),
) -> float:
    """As `perplexity_bytes` for both models, with fewer positions' logits, of both with their probabilities."""
    models = (dense, False), (quantized, True)
    both = [outer or _dense_outer(model, itemsize) for outer, (model, _) in zip(outers, models, strict=True)]
    working = sum(_blocks_bytes(model, itemsize, packed) for model, packed in models)
    working += _stream_bytes(dense, text, dense.hidden_size + quantized.hidden_size)
    working += 2 * _window_bytes(dense, text, batch_size, 128, min(outer.head_rows for outer in both))
    held, reading = sum(outer.held for outer in both), max(outer.reading for outer in both)
    return _RUNTIME + held + max(working, _DECOMPRESSION * reading)


def analyze_bytes(model: DecoderConfig, text: Text, itemsize: int) -> float:
    """As quantizing, with a map of sensitivities in place of the column loop."""
    held = outer_weights(model) * itemsize + largest_block(model) * itemsize
    return (
        _RUNTIME
        + _ANALYZE_PROGRAMS
        + held
        + calibration_bytes(model, SpQRConfig(), text, itemsize)
        + max(_mapped_bytes(model, kind) for kind in set(model.kinds))
    )


def _mapped_bytes(model: DecoderConfig, kind: BlockKind) -> float:
    """The Hessian of matrices that read one input, and their map."""
    shapes = block_shapes(model, kind)
    return max(
        _FACTOR_COPIES * FLOAT32 * width**2 + _MAP_BYTES * width * sum(shapes[name][0] for name in names)
        for names, width in input_groups(model, kind)
    )


def _dense_outer(model: DecoderConfig, itemsize: int) -> OuterMemory:
    return OuterMemory(outer_weights(model) * itemsize, 0, model.vocab_size)


def _blocks_bytes(model: DecoderConfig, itemsize: int, packed: bool) -> float:
    """A block and the next one. A packed block is dense as well, in float32 at most."""
    a_block = 2 * PACKED_BYTES + FLOAT32 if packed else 2 * itemsize
    return float(a_block * largest_block(model))


def _stream_bytes(model: DecoderConfig, text: Text, width: int) -> float:
    """The residual streams of all windows, or of as many as are read at a time."""
    return float(FLOAT32 * min(text.tokens * width, stream_numbers(model)))


def _window_bytes(model: DecoderConfig, text: Text, batch_size: int, positions: int, head_rows: int) -> float:
    """Activations of one block on a batch, and logits of so many positions of each of its windows."""
    batch = min(batch_size, text.windows)
    a_token = 4 * model.hidden_size + 3 * widest_inner(model) + 3 * model.num_heads * model.head_dim
    activations = FLOAT32 * batch * text.seqlen * a_token
    return activations + 3.0 * FLOAT32 * batch * min(positions, text.seqlen) * head_rows
