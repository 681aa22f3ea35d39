"""Instructions that the threads of a warp do together, without memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from support.ptx.operations import operation
from support.ptx.parsing import Program, PtxError
from support.ptx.values import listed, source, target

Match = re.Match[str]
Action = Callable[..., Any]


@operation(r"shfl\.sync\.(idx|bfly|up|down)\.b32", 5, members=4)
def _shuffle(program: Program, match: Match, operands: tuple[str, ...]) -> Action:
    """``d|p, a, b, c``: c has the mask of segments in bits 8..12, the clamp in bits 0..4."""
    mode, names = match[1], [name.strip() for name in operands[0].split("|")]
    write = target(program, names[0], "b32")
    inside = target(program, names[1], "pred") if len(names) > 1 else None
    value, lane, control = (source(program, operand, "b32") for operand in operands[1:4])

    def act(machine: Any, lanes: Any) -> None:
        threads = machine.numbers(lanes)
        here = threads % 32
        mask = control(machine, lanes).astype(np.int64)
        clamp, segment = mask & 31, mask >> 8 & 31
        by = lane(machine, lanes).astype(np.int64) & 31
        last = (here & segment) | (clamp & ~segment)
        if mode == "idx":
            wanted = (here & segment) | (by & ~segment)
        else:
            wanted = {"bfly": here ^ by, "up": here - by, "down": here + by}[mode]
        valid = wanted >= last if mode == "up" else wanted <= last
        taken = threads // 32 * 32 + np.where(valid, wanted, here)
        whole = np.zeros(machine.threads, np.uint32)
        known = np.zeros(machine.threads, bool)
        whole[threads], known[threads] = value(machine, lanes), True
        if not known[taken].all():
            raise PtxError(f"a value is taken of a thread that gives none: {match[0]} {', '.join(operands)}")
        write(machine, lanes, whole[taken])
        if inside is not None:
            inside(machine, lanes, np.broadcast_to(valid, threads.shape))

    return act


def _by_warp(machine: Any, lanes: Any, value: np.ndarray, fill: int) -> np.ndarray:
    """[warps, 32] of all warps; `fill` where a thread takes no part."""
    whole = np.full(machine.threads, fill, value.dtype)
    whole[lanes] = value
    return whole.reshape(-1, 32)


@operation(r"redux\.sync\.(add|min|max|and|or|xor)\.(u32|s32|b32)", 3, members=2)
def _reduce(program: Program, match: Match, operands: tuple[str, ...]) -> Action:
    name, kind = match.groups()
    if (kind == "b32") != (name in ("and", "or", "xor")):
        raise PtxError("form")
    function = {"min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or}
    function |= {"add": np.add, "xor": np.bitwise_xor}
    limits = np.iinfo(np.int32 if kind == "s32" else np.uint32)
    fill = {"min": int(limits.max), "max": int(limits.min), "and": 0xFFFFFFFF}.get(name, 0)
    read, write = source(program, operands[1], kind), target(program, operands[0], kind)

    def act(machine: Any, lanes: Any) -> None:
        result = function[name].reduce(_by_warp(machine, lanes, read(machine, lanes), fill), axis=1)
        write(machine, lanes, np.repeat(result, 32)[lanes])

    return act


@operation(r"vote\.sync\.(?P<how>all|any|uni)\.pred", 3, members=2)
@operation(r"vote\.sync\.(?P<how>ballot)\.b32", 3, members=2)
def _vote(program: Program, match: Match, operands: tuple[str, ...]) -> Action:
    how = match["how"]
    read = source(program, operands[1], "pred")
    write = target(program, operands[0], "b32" if how == "ballot" else "pred")

    def act(machine: Any, lanes: Any) -> None:
        value = read(machine, lanes)
        some = _by_warp(machine, lanes, value, 0)
        every = _by_warp(machine, lanes, value, 1).all(axis=1)
        if how == "ballot":
            result = (some.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(axis=1).astype(np.uint32)
        else:
            result = {"all": every, "any": some.any(axis=1), "uni": every | ~some.any(axis=1)}[how]
        write(machine, lanes, np.repeat(result, 32)[lanes])

    return act


@operation(r"elect\.sync", 2, members=1)
def _elect(program: Program, match: Match, operands: tuple[str, ...]) -> Action:
    """The lowest of the threads that take part."""
    names = [name.strip() for name in operands[0].split("|")]
    if len(names) != 2:
        raise PtxError("form")
    leader, chosen = target(program, names[0], "b32"), target(program, names[1], "pred")

    def act(machine: Any, lanes: Any) -> None:
        here = machine.numbers(lanes) % 32
        lowest = _by_warp(machine, lanes, here.astype(np.uint32), 32).min(axis=1)
        first = np.repeat(lowest, 32)[lanes]
        leader(machine, lanes, first)
        chosen(machine, lanes, first == here)

    return act


@operation(r"bar\.warp\.sync", 1, members=0)
def _warp_barrier(program: Program, match: Match, operands: tuple[str, ...]) -> Action:
    return lambda machine, lanes: None


_LANE = np.arange(32)
_ROW, _COLUMN = _LANE // 4, _LANE % 4


@operation(
    r"mma\.sync\.aligned\.m16n8k(?P<depth>16|8)\.row\.col\.f32\.(?P<a>f16|bf16)\.(?P<b>f16|bf16)\.f32", 4, together=True
)
def _matrix_product(program: Program, match: Match, operands: tuple[str, ...]) -> Action:
    """d = a b + c of a warp, subnormal numbers kept, summed in float64 and rounded once."""
    if match["a"] != match["b"]:
        raise PtxError("form")
    depth = int(match["depth"])
    d, a, b, c = (listed(operand) for operand in operands)
    if [len(names) for names in (d, a, b, c)] != [4, depth // 4, depth // 8, 4]:
        raise PtxError("number of registers")
    left_reads, right_reads = ([source(program, name, f"{match['a']}x2") for name in names] for names in (a, b))
    sums = [source(program, name, "f32") for name in c]
    writes = [target(program, name, "f32") for name in d]

    def act(machine: Any, lanes: Any) -> None:
        warps = machine.count(lanes) // 32
        left, right = np.empty((warps, 16, depth)), np.empty((warps, depth, 8))
        for i, read in enumerate(left_reads):
            pair = np.broadcast_to(read(machine, lanes), (32 * warps, 2)).reshape(warps, 32, 2)
            for e in (0, 1):
                left[:, _ROW + 8 * (i & 1), 2 * _COLUMN + e + 8 * (i >> 1)] = pair[..., e]
        for i, read in enumerate(right_reads):
            pair = np.broadcast_to(read(machine, lanes), (32 * warps, 2)).reshape(warps, 32, 2)
            for e in (0, 1):
                right[:, 2 * _COLUMN + e + 8 * i, _ROW] = pair[..., e]
        product = left @ right
        results = []
        for i, read in enumerate(sums):
            part = product[:, _ROW + 8 * (i >> 1), 2 * _COLUMN + (i & 1)].reshape(-1)
            results.append((part + read(machine, lanes)).astype(np.float32))
        for write, result in zip(writes, results, strict=True):
            write(machine, lanes, result)

    return act
