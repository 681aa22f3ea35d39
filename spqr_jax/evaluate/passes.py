"""Many sequences through a model, block by block.

A quantized block is made dense once, reads all sequences, and is dropped. So memory holds the packed model, one dense
block, and the residual stream of the sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from spqr_jax.models.attention import positions
from spqr_jax.models.decoder import Block, Decoder, embed, pass_block
from spqr_jax.models.dense import dense_block, embedding_part

STREAM_NUMBERS = 2**28
"""Numbers of residual stream that are held at a time: 1 GiB in float32.

More text is read in groups, and every group makes each block dense again. For a block of 200 million weights and
hidden size 4096, a group has 65536 tokens: their products take over 100 times as long as the dequantization.
A group stays where the model is. On a CPU, the host has no other memory to put it into.
"""

T = TypeVar("T")

embed_batch = jax.jit(embed, static_argnums=0)


class Steps:
    """Counts steps for a progress callback. A step is one sequence through one block, or through the output head.

    Args:
      total: number of steps in all.
      progress: called with (steps done, `total`) after each batch; None for nothing.
    """

    def __init__(self, total: int, progress: Callable[[int, int], None] | None) -> None:
        self.done, self.total, self._progress = 0, total, progress

    def advance(self, count: int) -> None:
        """Notes that `count` more steps are done."""
        self.done += count
        if self._progress is not None:
            self._progress(self.done, self.total)


def groups(batches: Sequence[T], numbers_of: Callable[[T], int]) -> Iterator[list[T]]:
    """Batches that are read together: as many as fit, at least one.

    Args:
      batches: in order.
      numbers_of: gives the numbers in a batch's residual stream.
    """
    group: list[T] = []
    total = 0
    for batch in batches:
        total += numbers_of(batch)
        if group and total > STREAM_NUMBERS:
            yield group
            group, total = [], numbers_of(batch)
        group.append(batch)
    if group:
        yield group


def window_groups(windows: np.ndarray, batch_size: int, hidden_size: int) -> Iterator[list[np.ndarray]]:
    """Groups of batches of int32 [windows, length]; each batch has up to `batch_size` windows."""
    batches = [windows[first : first + batch_size] for first in range(0, len(windows), batch_size)]
    return groups(batches, lambda batch: batch.size * hidden_size)


def final_residuals(params: Decoder, batches: Sequence[np.ndarray], steps: Steps) -> list[jax.Array]:
    """The residual streams after all blocks.

    Args:
      params: the model, dense or quantized.
      batches: a group of token ids, int32 [batch, tokens] each.
      steps: counts each batch's windows once a block.

    Returns:
      [batch, tokens, hidden] for each batch.
    """
    config = params.config
    where = {
        shape: positions(config, shape[1], np.zeros(shape[0], np.int32), np.int32(0))
        for shape in {batch.shape for batch in batches}
    }
    outer = embedding_part(params.outer)
    residuals = [embed_batch(config, outer, jnp.asarray(batch), where[batch.shape]) for batch in batches]
    del outer  # a dense copy where the embedding is quantized

    def step(block: Block, residual: jax.Array) -> jax.Array:
        return pass_block(config, block, residual, where[residual.shape[:2]])

    pass_blocks(params.layers, residuals, step, residuals[0].dtype, lambda residual: steps.advance(len(residual)))
    return residuals


def pass_blocks(
    layers: Sequence[Block],
    states: list[T],
    step: Callable[[Block, T], T],
    dtype: jnp.dtype,
    passed: Callable[[T], None],
) -> None:
    """All states through all blocks, in place. Each block is dense while the states pass it.

    Args:
      layers: the blocks, dense or quantized.
      states: pytrees of arrays; each entry is replaced.
      step: a state after a block, by a compiled program.
      dtype: of the activations.
      passed: called with each new state once it is computed.
    """
    for block in layers:
        _pass_dense(dense_block(block, dtype), states, step, passed)


def _pass_dense(block: Block, states: list[T], step: Callable[[Block, T], T], passed: Callable[[T], None]) -> None:
    """Ends once the block is no longer needed: otherwise the next ones would become dense while this one is in use."""
    waiting: list[T] = []
    for index, state in enumerate(states):
        states[index] = step(block, state)
        waiting.append(states[index])
        if len(waiting) > 1:  # the device has its next batch already while the host waits
            passed(jax.block_until_ready(waiting.pop(0)))
    passed(jax.block_until_ready(waiting.pop()))
