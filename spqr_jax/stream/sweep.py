"""The two loops over a model's blocks: forward and backward.

Whatever walks a model is a visitor of one of them: it is given each block once, in order, and moves what it needs
(activations, gradients, files) along by itself. While a visitor works, a thread reads the next block.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax

from spqr_jax.models.decoder import Block
from spqr_jax.stream.blocks import BlockSource, TreeSource

Visit = Callable[[int, Block], None]
"""Is given a block's index and the block. Keep no reference to the block, so that its memory is free afterwards."""


def forward(
    source: BlockSource, visit: Visit, *, first: int = 0, end: int | None = None, read_ahead: bool = True
) -> None:
    """Visits the blocks `first`, ..., `end - 1` in this order.

    Held at once: the block that is visited and, with `read_ahead`, the next one.

    Args:
      source: the model.
      visit: is given each block.
      first, end: range of blocks; `end` None for the number of blocks.
      read_ahead: whether a thread reads the next block during a visit. A tree in memory is never read ahead.

    Raises:
      SpQRError: a block cannot be read. The error is raised once all blocks before it are visited.
    """
    end = source.config.num_layers if end is None else end
    _sweep(source, range(first, end), visit, read_ahead)


def backward(
    source: BlockSource, visit: Visit, *, first: int | None = None, end: int = 0, read_ahead: bool = True
) -> None:
    """Visits the blocks `first`, `first - 1`, ..., `end` in this order; see `forward`.

    Args:
      source: the model.
      visit: is given each block.
      first, end: the block to begin with, None for the last one; the block to end with.
      read_ahead: as in `forward`.

    Raises:
      SpQRError: as `forward`.
    """
    first = source.config.num_layers - 1 if first is None else first
    _sweep(source, range(first, end - 1, -1), visit, read_ahead)


def _sweep(source: BlockSource, indices: Sequence[int], visit: Visit, read_ahead: bool) -> None:
    if not read_ahead or len(indices) < 2 or isinstance(source, TreeSource):
        for index in indices:
            visit(index, source.block(index))
        return
    # The thread sees the caller's context variables and default device; JAX keeps the latter for each thread.
    context, device = contextvars.copy_context(), jax.config.jax_default_device  # type: ignore[attr-defined]

    def read(index: int) -> Block:
        with jax.default_device(device):
            return context.run(source.block, index)

    with ThreadPoolExecutor(1, "read-ahead") as thread:  # on an error, the read that is under way ends first
        waiting = [thread.submit(read, indices[0])]

        def take(position: int) -> Block:
            """The block that is due; the read of the next one begins."""
            block = waiting.pop().result()
            if position + 1 < len(indices):
                waiting.append(thread.submit(read, indices[position + 1]))
            return block

        for position, index in enumerate(indices):
            visit(index, take(position))  # only the visitor holds the block
