"""Activations that are made twice in place of being held: the same bits, and fewer bytes."""

from __future__ import annotations

import gc
import weakref

import jax
import numpy as np
import pytest

from spqr_jax import SpQRConfig, quantize
from spqr_jax.models.decoder import State
from spqr_jax.stream import activations
from spqr_jax.stream.blocks import TreeSource
from spqr_jax.stream.chunk_states import ChunkStates


def test_a_postponed_step_is_done_at_each_reading_until_the_state_is_set():
    states = ChunkStates([State(np.float32(1)), State(np.float32(2))])
    states.postpone(1, lambda state: State(state.residual + 10))
    assert [float(state.residual) for state in states] == [1, 12]
    twin = states.copy()
    states[1] = State(states[1].residual + 100)
    assert [float(states[1].residual), float(twin[1].residual)] == [112, 12]


@pytest.mark.parametrize("sequential", [True, False])
def test_what_is_made_twice_has_the_same_bits(monkeypatch, tiny_model, tiny_batches, sequential):
    config = SpQRConfig(bits=3, sequential=sequential)
    held = quantize(tiny_model, tiny_batches, config)
    postponed = []
    monkeypatch.setattr(activations, "HELD_BYTES", 0)
    monkeypatch.setattr(activations, "HELD_SHARE", 0)
    monkeypatch.setattr(ChunkStates, "postpone", _noting(ChunkStates.postpone, postponed))
    made_twice = quantize(tiny_model, tiny_batches, config)
    assert postponed, "all was held"
    jax.tree.map(np.testing.assert_array_equal, held, made_twice)


def test_the_bytes_of_the_stream_are_known_without_reading_it(tiny_model, tiny_batches):
    text = activations.Activations(tiny_model.config, tiny_model.outer, tiny_batches)
    assert text.stream_bytes == text.copy().stream_bytes == sum(state.residual.nbytes for state, _ in text.chunks())


def _noting(postpone, postponed):
    def note(self, index, step):
        postponed.append(index)
        postpone(self, index, step)

    return note


def test_a_copy_of_the_text_is_freed_as_soon_as_nobody_holds_it(monkeypatch, tiny_model, tiny_batches):
    monkeypatch.setattr(activations, "HELD_BYTES", 0)
    monkeypatch.setattr(activations, "HELD_SHARE", 0)
    block = TreeSource(tiny_model).block(0)
    text = activations.Activations(tiny_model.config, tiny_model.outer, tiny_batches)
    gc.disable()  # it would free the copy later, when more of them have piled up
    try:
        ahead = text.copy()
        for stage in range(3):  # steps of the last one are postponed
            ahead.advance(stage, block)
        assert any(ahead._states.is_postponed(chunk) for chunk in range(len(ahead._states)))
        states = weakref.ref(ahead._states)
        del ahead
        assert states() is None
    finally:
        gc.enable()
