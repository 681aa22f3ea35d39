"""Many sequences through a model, block by block.

A block is read, made dense if it is quantized, reads all sequences, and is dropped. So memory holds the weights
outside of the blocks, one block and the next one, and the residual stream of the sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from spqr_jax._compat import give_back_memory
from spqr_jax.events import Steps
from spqr_jax.models.attention import Positions, positions
from spqr_jax.models.config import DecoderConfig
from spqr_jax.models.decoder import Block, Outer, embed, pass_block
from spqr_jax.models.dense import dense_block
from spqr_jax.models.weights import weight_shapes
from spqr_jax.quantized import is_quantized
from spqr_jax.stream import sweep
from spqr_jax.stream.blocks import BlockSource
from spqr_jax.stream.outer import StoredMatrix, embedded_rows

_FEWEST_NUMBERS, _MOST_NUMBERS = 2**23, 2**28  # 32 MiB and 1 GiB in float32
_WEIGHTS_A_NUMBER = 64

T = TypeVar("T")

embed_batch = jax.jit(embed, static_argnums=0)


def stream_numbers(config: DecoderConfig) -> int:
    """Numbers of residual stream that are held at a time: 1 for 64 weights of the model, from 32 MiB to 1 GiB.

    In float32 that is a sixteenth of a byte for each weight, an eighth of a model with 4 bits per weight: the memory
    that a text needs does not depend on its length, and is small beside a small model. More text is read in groups.
    Every group reads each block again and makes it dense again. A model of 0.5 billion weights and hidden size 896 has
    groups of 9 thousand tokens. A model of 7 billion weights and hidden size 4096 has groups of 27 thousand tokens:
    their products take over 40 times as long as the dequantization. A group stays where the model is. On a CPU, the
    host has no other memory to put it into.
    """
    weights = sum(int(np.prod(shape)) for shape in weight_shapes(config).values())
    return min(max(weights // _WEIGHTS_A_NUMBER, _FEWEST_NUMBERS), _MOST_NUMBERS)


def groups(batches: Sequence[T], numbers_of: Callable[[T], int], most: int) -> Iterator[list[T]]:
    """Batches that are read together: as many as fit, at least one.

    Args:
      batches: in order.
      numbers_of: gives the numbers in a batch's residual stream.
      most: numbers that fit.
    """
    group: list[T] = []
    total = 0
    for batch in batches:
        total += numbers_of(batch)
        if group and total > most:
            yield group
            group, total = [], numbers_of(batch)
        group.append(batch)
    if group:
        yield group


def window_groups(windows: np.ndarray, batch_size: int, hidden_size: int, most: int) -> Iterator[list[np.ndarray]]:
    """Groups of batches of int32 [windows, length]; each batch has up to `batch_size` windows."""
    batches = [windows[first : first + batch_size] for first in range(0, len(windows), batch_size)]
    return groups(batches, lambda batch: batch.size * hidden_size, most)


def final_residuals(source: BlockSource, outer: Outer, batches: Sequence[np.ndarray], steps: Steps) -> list[jax.Array]:
    """The residual streams after all blocks.

    Args:
      source: the model, dense or quantized.
      outer: its weights outside of the blocks.
      batches: a group of token ids, int32 [batch, tokens] each.
      steps: counts each batch's windows once a block.

    Returns:
      [batch, tokens, hidden] for each batch.
    """
    config = source.config
    where = {
        shape: positions(config, shape[1], np.zeros(shape[0], np.int32), np.int32(0))
        for shape in {batch.shape for batch in batches}
    }
    residuals = embed_group(config, outer, batches, [where[batch.shape] for batch in batches])

    def step(block: Block, residual: jax.Array) -> jax.Array:
        return pass_block(config, block, residual, where[residual.shape[:2]])

    pass_blocks(source, residuals, step, residuals[0].dtype, lambda residual: steps.advance(len(residual)))
    return residuals


def embed_group(
    config: DecoderConfig, outer: Outer, batches: Sequence[np.ndarray], where: Sequence[Positions]
) -> list[jax.Array]:
    """The residual streams before the first block. A packed embedding becomes dense by pieces, and so does one on disk.

    Args:
      config, outer: the model's.
      batches: token ids, int32 [batch, tokens] each.
      where: the positions of each batch's tokens.

    Returns:
      [batch, tokens, hidden] for each batch.
    """
    if not is_quantized(outer.embed_tokens) and not isinstance(outer.embed_tokens, StoredMatrix):
        tables, ids = [outer] * len(batches), list(batches)
    else:
        tables = embedded_rows(outer, batches)
        ids = [np.arange(batch.size, dtype=np.int32).reshape(batch.shape) for batch in batches]
    residuals = [
        embed_batch(config, table, jnp.asarray(tokens), place)
        for table, tokens, place in zip(tables, ids, where, strict=True)
    ]
    give_back_memory()  # of reading the weights outside of the blocks
    return residuals


def pass_blocks(
    source: BlockSource,
    states: list[T],
    step: Callable[[Block, T], T],
    dtype: jnp.dtype,
    passed: Callable[[T], None],
) -> None:
    """All states through all blocks, in place. Each block is dense while the states pass it.

    Args:
      source: the model, dense or quantized.
      states: pytrees of arrays; each entry is replaced.
      step: a state after a block, by a compiled program.
      dtype: of the activations.
      passed: called with each new state once it is computed.
    """

    def visit(index: int, block: Block) -> None:
        _pass_dense(dense_block(block, dtype), states, step, passed)
        give_back_memory()  # of reading: threads that read leave freed memory behind

    sweep.forward(source, visit)


def _pass_dense(block: Block, states: list[T], step: Callable[[Block, T], T], passed: Callable[[T], None]) -> None:
    """Ends once the block is no longer needed: otherwise the next ones would become dense while this one is in use."""
    # An accelerator has its next batch already while the host waits. A CPU would compute both at once, with the
    # activations of both, and be no faster.
    most = 0 if jax.default_backend() == "cpu" else 1
    waiting: list[T] = []
    for index, state in enumerate(states):
        states[index] = step(block, state)
        waiting.append(states[index])
        while len(waiting) > most:
            passed(jax.block_until_ready(waiting.pop(0)))
    for state in waiting:
        passed(jax.block_until_ready(state))
