"""Evaluation block by block: what memory holds while blocks run, and what is compiled."""

from __future__ import annotations

import dataclasses
import sys

import jax
import numpy as np
import pytest
from support.problems import TINY

from spqr_jax import SpQRConfig, perplexity, quantize
from spqr_jax.evaluate import continuations, passes
from spqr_jax.evaluate.continuations import continuation_scores
from spqr_jax.evaluate.fidelity import compare
from spqr_jax.models import dense
from spqr_jax.models.weights import random_decoder, weight_shapes

DEEP = dataclasses.replace(TINY, num_layers=5)
WINDOWS = np.random.default_rng(0).integers(0, 256, (3, 32)).astype(np.int32)
BLOCK_WEIGHTS = sum(leaf.size for leaf in jax.tree.leaves(random_decoder(TINY, seed=0).layers[0]))


@pytest.fixture(scope="module")
def quantized():
    return quantize(random_decoder(DEEP, seed=0), None, SpQRConfig.rtn(3))


@pytest.fixture(scope="module")
def packed_throughout():
    """A tied model with more weights in its head than in its blocks; they are packed."""
    config = dataclasses.replace(TINY, vocab_size=5000, tied_head=True)
    return quantize(random_decoder(config, seed=0), None, dataclasses.replace(SpQRConfig.rtn(3), head_bits=8))


@pytest.fixture
def live_bytes(monkeypatch):
    """Bytes of all arrays of this process each time a batch has passed a block, those before the test left out."""
    seen = []
    before = {id(array) for array in jax.live_arrays()}
    real = jax.block_until_ready

    def watched(state):
        seen.append(sum(array.nbytes for array in jax.live_arrays() if id(array) not in before))
        return real(state)

    monkeypatch.setattr(passes.jax, "block_until_ready", watched)
    return seen


def test_one_block_is_dense_at_a_time(quantized, live_bytes):
    perplexity(quantized, WINDOWS)
    assert len(live_bytes) == 3 * DEEP.num_layers + 1  # and the head once
    streams = 4 * WINDOWS.size * DEEP.hidden_size
    assert (
        4 * BLOCK_WEIGHTS < max(live_bytes) < 4 * BLOCK_WEIGHTS * 1.1 + 2 * streams
    )  # a batch has two streams a while


def test_two_models_are_compared_with_one_dense_block(quantized, live_bytes):
    compare(quantized, quantized, WINDOWS)
    assert max(live_bytes) < 4 * BLOCK_WEIGHTS * 1.1 + 3 * 4 * WINDOWS.size * DEEP.hidden_size


def test_a_packed_head_is_never_dense_as_a_whole(packed_throughout, live_bytes, monkeypatch):
    monkeypatch.setattr(dense, "PIECE_WEIGHTS", 512 * TINY.hidden_size)
    perplexity(packed_throughout, WINDOWS)
    compare(packed_throughout, packed_throughout, WINDOWS)
    whole = 4 * 5000 * TINY.hidden_size
    assert whole > 4 * (4 * BLOCK_WEIGHTS)
    assert max(live_bytes) < whole / 2


@pytest.mark.parametrize("measure", ["windows", "continuations"])
def test_groups_change_nothing(quantized, monkeypatch, measure):
    """More text than is held at a time: each group makes the blocks dense again."""
    dense = []
    real = passes.dense_block
    monkeypatch.setattr(passes, "dense_block", lambda block, dtype: dense.append(1) or real(block, dtype))

    def scores():
        if measure == "windows":
            return perplexity(quantized, WINDOWS).window_losses
        requests = [([n, *range(3, 20 + n)], [n, 2 * n]) for n in range(1, 9)]
        return [score.log_probability for score in continuation_scores(quantized, requests, batch_tokens=40)]

    together = scores()
    assert len(dense) == DEEP.num_layers
    for module in (sys.modules["spqr_jax.evaluate.perplexity"], continuations):
        monkeypatch.setattr(module, "stream_numbers", lambda config: 1)  # a batch is a group
    monkeypatch.setattr(continuations, "_FEWEST_NUMBERS", 1)
    np.testing.assert_array_equal(scores(), together)
    assert len(dense) >= DEEP.num_layers * (1 + 3)


def test_groups_hold_what_fits():
    assert list(passes.groups([4, 4, 4, 20, 1], lambda numbers: numbers, 10)) == [[4, 4], [4], [20], [1]]


def test_a_group_is_small_beside_the_model():
    """A sixteenth of a byte for each weight, from 32 MiB to 1 GiB."""
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_layers": 24, "vocab_size": 128000}
    middle = dataclasses.replace(TINY, **sizes)
    weights = sum(np.prod(shape) for shape in weight_shapes(middle).values())
    assert 1e9 < weights < 3e9
    assert 4 * passes.stream_numbers(middle) == pytest.approx(weights / 16, rel=1e-6)
    assert 4 * passes.stream_numbers(TINY) == 32 << 20
    assert 4 * passes.stream_numbers(dataclasses.replace(middle, num_layers=1000)) == 1 << 30


def test_progress_counts_windows_times_blocks_and_the_head(quantized):
    told = []
    perplexity(quantized, WINDOWS, batch_size=2, events=told.append)
    total = 3 * (DEEP.num_layers + 1)
    assert [(event.phase, event.done, event.total) for event in told[:4]] == [
        ("scoring", done, total) for done in (0, 2, 3, 5)
    ]
    assert told[-1].done == total
    told.clear()
    compare(quantized, quantized, WINDOWS, events=told.append)
    assert told[-1].done == told[-1].total == 3 * (2 * DEEP.num_layers + 1)


def test_blocks_of_one_format_share_programs(quantized):
    """Every part is compiled once: a second model of the same sizes compiles nothing."""
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: compiled.append(name) if name.endswith("backend_compile_duration") else None
    )
    perplexity(quantized, WINDOWS[:, :24])
    first = len(compiled)
    assert first <= 4 + 5 + 1  # positions, embedding, block, head; a weight's shape and format each; dense embedding
    perplexity(quantized, WINDOWS[:, :24])
    assert len(compiled) == first
