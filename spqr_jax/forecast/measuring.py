"""The work of the commands that measure: perplexity, compare, analyze, bench and eval."""

from __future__ import annotations

from spqr_jax.forecast.passes import (
    Text,
    Work,
    block_weights,
    forward_pass,
    head_operations,
    hessian_operations,
    input_groups,
    kind_counts,
    model_weights,
)
from spqr_jax.models.config import DecoderConfig
from spqr_jax.models.weights import matrix_names

# Seconds of compilation on the reference machine, see machine.py.
_START = 1.5
_BY_KIND = 2.0  # one kind of block
_BY_FORMAT = 1.2  # what makes a weight of one shape and format dense
_FORMATS = 2  # assumed of each weight over all blocks: one without a target size, up to three with one
_SPARSE_ROLES = 7  # weights of a block with experts that differ in shape or in outlier capacity
_ANALYSIS_BY_KIND = 6.0  # stages, their Hessians, and sensitivities of each shape of matrix


def reading_work(model: DecoderConfig, text: Text) -> Work:
    """Text through all blocks and the output head, as perplexity and tasks take it."""
    passed = forward_pass(model, text)
    return Work(dense=passed.products + head_operations(model, text.tokens), attention=passed.attention)


def perplexity_work(model: DecoderConfig, text: Text, packed: bool = False) -> Work:
    """One model, read whole, and one pass over the text.

    Args:
      model: its sizes.
      text: what it reads.
      packed: whether the model is quantized. Programs that make its weights dense are then compiled, too.
    """
    kinds = set(model.kinds)
    programs = _START + _BY_KIND * len(kinds)
    if packed:
        programs += _BY_FORMAT * _FORMATS * sum(len(matrix_names(model, kind)) for kind in kinds if not kind.sparse)
        programs += _BY_FORMAT * _FORMATS * _SPARSE_ROLES * any(kind.sparse for kind in kinds)
    return reading_work(model, text) + Work(handled=model_weights(model), programs=programs)


def compare_work(dense: DecoderConfig, quantized: DecoderConfig, text: Text) -> Work:
    """Two models over the same text. They share programs where their sizes are the same."""
    both = perplexity_work(dense, text) + perplexity_work(quantized, text, packed=True)
    return both if dense != quantized else both + Work(programs=-_BY_KIND * len(set(dense.kinds)))


def analyze_work(model: DecoderConfig, text: Text) -> Work:
    """Calibration without a solver: one rounded forward pass, Hessians, factors, and two products W H a matrix.

    Then patterns are looked for in the map of every matrix, which takes most of the time of short texts.
    """
    passed = forward_pass(model, text)
    work = Work(bfloat16=passed.products, attention=passed.attention, gram=hessian_operations(model, text.tokens))
    for kind, count in kind_counts(model):
        weights = count * block_weights(model, kind)
        groups = input_groups(model, kind)
        mean_width = sum(width for _, width in groups) / len(groups)
        work += Work(factor=count * sum(4 / 3 * width**3 for _, width in groups))
        work += Work(float32=2 * 2.0 * weights * mean_width, mapped=weights, handled=weights)
    return work + Work(programs=_START + _ANALYSIS_BY_KIND * len(set(model.kinds)))


_SHARE_OF_BANDWIDTH = {True: 0.37, False: 0.68}
"""Of the memory bandwidth, what decoding reaches with packed and with dense weights (docs/explanation/performance.md:
packed 11.5 of 33 and 6.0 of 16 GB/s, dense 23 of 33 and 10.6 of 16)."""
BENCH_PROGRAMS = 6.0
"""Seconds to compile what one rival of `spqr bench` generates with, on the reference machine."""


def decode_seconds(weight_bytes: float, packed: bool, new_tokens: int, bandwidth: float) -> float:
    """Seconds to decode tokens one at a time, each of which reads all weights. Bandwidth in bytes per second."""
    return new_tokens * weight_bytes / (_SHARE_OF_BANDWIDTH[packed] * bandwidth)
