"""Threads and blocks, barriers, loops and branches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax

from pallas_kernels.machine.dialects import arith, gpu, i32, ir, scf, statement, utils
from pallas_kernels.machine.values import Bool, Word, plain_word

Tree = TypeVar("Tree")
"""A tree (tuples, lists, dicts) of values."""


def thread_index() -> Word:
    """The thread's index in its block."""
    return Word(utils.thread_idx())


def block_index(dimension: str = "x") -> Word:
    """The thread block's index in the grid."""
    return Word(arith.index_cast(i32(), gpu.block_id(getattr(gpu.Dimension, dimension))))


def barrier() -> None:
    """All threads of the block arrive before any goes on; what they stored is seen."""
    gpu.barrier()


def warp_barrier() -> None:
    """All lanes of the warp arrive before any goes on; what they stored is seen."""
    statement("bar.warp.sync -1;")


def cluster_barrier(*, stores: bool = True) -> None:
    """All threads of the cluster arrive before any goes on; `stores`: what they stored before is seen."""
    statement(f"barrier.cluster.arrive.{'release' if stores else 'relaxed'}.aligned;")
    statement("barrier.cluster.wait.acquire.aligned;")


def loop(
    first: Word | int, bound: Word | int, step: Word | int, carried: Tree, body: Callable[[Word, Tree], Tree]
) -> Tree:
    """for (i = first; i < bound; i += step) carried = body(i, carried), signed; returns what is carried at the end."""
    leaves, structure = jax.tree.flatten(carried)
    kinds = [type(leaf) for leaf in leaves]

    def tree_of(plain: Sequence[Any]) -> Tree:
        return jax.tree.unflatten(structure, [kind(v) for kind, v in zip(kinds, plain, strict=True)])

    op = scf.ForOp(plain_word(first), plain_word(bound), plain_word(step), [leaf.mlir for leaf in leaves])
    with ir.InsertionPoint(op.body):
        after = body(Word(op.induction_variable), tree_of(list(op.inner_iter_args)))
        scf.yield_([leaf.mlir for leaf in jax.tree.leaves(after)])
    return tree_of(list(op.results))


def for_each(first: Word | int, bound: Word | int, step: Word | int, body: Callable[[Word], None]) -> None:
    """for (i = first; i < bound; i += step) body(i), signed."""
    op = scf.ForOp(plain_word(first), plain_word(bound), plain_word(step), [])
    with ir.InsertionPoint(op.body):
        body(Word(op.induction_variable))
        scf.yield_([])


def if_(condition: Bool, body: Callable[[], None], otherwise: Callable[[], None] | None = None) -> None:
    """Runs `body` where the condition holds, else `otherwise`."""
    op = scf.IfOp(condition.mlir, has_else=otherwise is not None)
    with ir.InsertionPoint(op.then_block):
        body()
        scf.yield_([])
    if otherwise is not None:
        with ir.InsertionPoint(op.else_block):
            otherwise()
            scf.yield_([])


def branch(condition: Bool, like: Tree, then: Callable[[], Tree], otherwise: Callable[[], Tree]) -> Tree:
    """The tree of `then()` where the condition holds, else of `otherwise()`; `like` is a tree of the same types."""
    leaves, structure = jax.tree.flatten(like)
    op = scf.IfOp(condition.mlir, [leaf.mlir.type for leaf in leaves], has_else=True)
    for block, body in ((op.then_block, then), (op.else_block, otherwise)):
        with ir.InsertionPoint(block):
            scf.yield_([leaf.mlir for leaf in jax.tree.leaves(body())])
    results = [type(leaf)(v) for leaf, v in zip(leaves, op.results, strict=True)]
    return jax.tree.unflatten(structure, results)
