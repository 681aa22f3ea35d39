"""Runs compiled PTX in NumPy, so that a kernel's numbers can be checked where there is no GPU.

Registers are arrays over the threads of several thread blocks. Every buffer of device memory has its own
bounds: a read or write outside of them is an error. So is an access of shared memory that races with one of
another warp (:mod:`support.ptx.races`), and every opcode, modifier or operand that is not known: nothing is
ignored. What ``cp.async`` copies arrives when it is waited for, not before, so a missing wait is seen.

Not seen: races on device memory, and between threads of one warp; anything about time. Approximate functions
(``ex2.approx``) are exact here. Not there: TMA, mbarriers, wgmma, atomics, local memory, calls.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence

import numpy as np

from support.ptx import arithmetic, conversions, exchange, transfers  # noqa: F401  (they register instructions)
from support.ptx.costs import Costs, joined
from support.ptx.machine import Machine
from support.ptx.memory import Global
from support.ptx.operations import decode
from support.ptx.parsing import Instruction, Program, PtxError, parse

__all__ = ["Costs", "Instruction", "Program", "PtxError", "launch", "parse"]

_TOGETHER = 8192  # threads that run at the same time, about


def _three(sizes: int | Sequence[int]) -> tuple[int, int, int]:
    given = (sizes,) if isinstance(sizes, int) else tuple(sizes)
    x, y, z = (*given, 1, 1, 1)[:3]
    return x, y, z


def launch(
    program: Program,
    parameters: Sequence[np.ndarray | int],
    *,
    grid: int | Sequence[int],
    threads: int | Sequence[int],
    cluster: int | Sequence[int] = 1,
    shared_bytes: int = 232448,
    races: bool = True,
    counts: bool = True,
    early: Collection[int] | None = None,
) -> tuple[list[np.ndarray], Costs]:
    """Runs a kernel over a grid.

    Args:
      program: from :func:`parse`.
      parameters: an array each, or a whole number, in the order of the program's parameters; the last may be left
        out where the program does not read them.
      grid: thread blocks along x, y, z.
      threads: of a block, along x, y, z; whole warps.
      cluster: thread blocks of a cluster, along x, y, z.
      shared_bytes: shared memory of a block.
      races: whether races on shared memory are errors.
      counts: whether costs are counted; without, those returned are zero.
      early: places among `parameters` of the arrays that may be used before ``griddepcontrol.wait``, as they do
        not come from the launch before; None: all.

    Returns:
      The arrays as they are afterwards (whole numbers as they were), and what the run cost.

    Raises:
      PtxError: an access out of bounds, an unwritten register, a race, threads that wait for ever, an
        instruction that is not known.
    """
    grid, block, cluster = _three(grid), _three(threads), _three(cluster)
    _check(program, grid, block, cluster, len(parameters))
    operations = [decode(program, instruction) for instruction in program.code]
    arrays = [i for i, parameter in enumerate(parameters) if isinstance(parameter, np.ndarray)]
    device = Global([np.asarray(parameters[i]) for i in arrays])
    starts = dict(zip(arrays, device.starts, strict=True))
    values = [starts[i] if i in starts else int(parameters[i]) for i in range(len(parameters))]
    allowed = None if early is None else frozenset(arrays.index(i) for i in early)
    places = _places(grid, cluster)
    size = int(np.prod(cluster))
    step = max(_TOGETHER // (int(np.prod(block)) * size), 1) * size
    costs = []
    with np.errstate(all="ignore"):
        for first in range(0, len(places), step):
            machine = Machine(
                program,
                operations,
                device,
                values,
                places[first : first + step],
                grid,
                block,
                cluster,
                shared_bytes=shared_bytes,
                races=races,
                counts=counts,
                early=allowed,
            )
            machine.run()
            if machine.counter is not None:
                costs.append(machine.counter.result())
    results = [np.asarray(parameter) for parameter in parameters]
    for number, i in enumerate(arrays):
        results[i] = device.buffer(number).view(results[i].dtype).reshape(results[i].shape).copy()
    nothing = np.zeros((1, 1), np.int64)
    return results, joined(costs) if costs else Costs({}, nothing, nothing, {}, {}, {})


def _check(
    program: Program, grid: Sequence[int], block: Sequence[int], cluster: Sequence[int], parameters: int
) -> None:
    if parameters > len(program.parameters):
        raise PtxError(f"{parameters} parameters for the {len(program.parameters)} of the program")
    if np.prod(block) % 32:
        raise PtxError("a block is not of whole warps")
    if program.threads not in (None, int(np.prod(block))):
        raise PtxError(f"the program asks for {program.threads} threads a block")
    if program.most_threads is not None and np.prod(block) > program.most_threads:
        raise PtxError(f"the program allows {program.most_threads} threads a block")
    if program.cluster not in (None, int(np.prod(cluster))):
        raise PtxError(f"the program asks for {program.cluster} blocks a cluster")
    if any(g % c for g, c in zip(grid, cluster, strict=True)):
        raise PtxError("a grid is not of whole clusters")


def _places(grid: Sequence[int], cluster: Sequence[int]) -> np.ndarray:
    """int64 [blocks, 3]: places of the blocks, x fastest, a cluster's blocks side by side."""
    clusters = itertools.product(*(range(g // c) for g, c in reversed(list(zip(grid, cluster, strict=True)))))
    inside = list(itertools.product(*(range(c) for c in reversed(cluster))))
    size = np.array(cluster)
    return np.array([np.array(at[::-1]) * size + np.array(i[::-1]) for at in clusters for i in inside], np.int64)
