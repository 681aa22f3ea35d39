"""The end of the kernel: the sums of groups, of warps and of the block."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax

from pallas_kernels import machine as m
from pallas_kernels.attention.elements import round_to, store_element
from pallas_kernels.attention.place import Place
from pallas_kernels.attention.problem import MASKED
from pallas_kernels.machine import Address, Float, Word


@dataclasses.dataclass
class Sums:
    """Of one query head, over the keys that a group of lanes has seen.

    Attributes:
      top: the largest score, in units of log2.
      weight: the sum of 2^(score - top).
      out: the sums of 2^(score - top) · value, of this lane's dimensions.
    """

    top: Float
    weight: Float
    out: list[Float]


jax.tree_util.register_dataclass(Sums, ["top", "weight", "out"], [])


def join_groups(place: Place, sums: list[Sums]) -> None:
    """The groups of a warp add up, and the warp stores its sums for the block."""
    distances = [d for d in (1, 2, 4, 8, 16) if d >= place.plan.lanes]
    for h, of_head in enumerate(sums):
        top = of_head.top
        for distance in distances:
            top = m.larger(top, _from_lane(top, distance))
        factor = m.exp2(of_head.top - top)
        weight, out = of_head.weight * factor, [v * factor for v in of_head.out]
        begin = m.word(0)  # the first of its dimensions that this lane still has
        for distance in distances:
            weight = weight + _from_lane(weight, distance)
            out, begin = _halved(place, out, begin, distance)
        row = place.warp * place.plan.block_heads + h
        _store(place, row * place.head, out, begin)
        statistics = [top.word(), weight.word()]
        m.if_((place.thread & 31).equals(0), functools.partial(place.statistics.store, row * 2, statistics))


def _from_lane(value: Float, distance: int) -> Float:
    return m.from_xor_lane(value.word(), distance).float()


def _halved(place: Place, out: list[Float], begin: Word, distance: int) -> tuple[list[Float], Word]:
    """Two lanes add up: each keeps half of the sums where their number is even."""
    half, odd = divmod(len(out), 2)
    if odd:
        return [v + _from_lane(v, distance) for v in out], begin
    upper = (place.thread & distance).equals(distance)
    pairs = list(zip(out[:half], out[half:], strict=True))
    kept, sent = [m.choose(upper, b, a) for a, b in pairs], [m.choose(upper, a, b) for a, b in pairs]
    out = [a + _from_lane(b, distance) for a, b in zip(kept, sent, strict=True)]
    return out, begin + m.select(upper, half, 0)


def _store(place: Place, base: Word, out: list[Float], begin: Word) -> None:
    """A lane's sums, from its `begin`-th dimension on, to shared memory."""
    at_once = 4 if len(out) % 4 == 0 else 1
    for i in range(0, len(out), at_once):
        position = place.position_of_lane(begin + i)
        place.sums.store(base + position, [v.word() for v in out[i : i + at_once]])


def finish(place: Place, outputs: Sequence[Address]) -> None:
    """The warps' sums added up, and out."""
    items = place.plan.block_heads * place.head
    for first in range(0, items, place.plan.threads):
        index = place.thread + first
        if first + place.plan.threads <= items:
            _finish_dimension(place, outputs, index)
        else:
            m.if_(index < items, functools.partial(_finish_dimension, place, outputs, index))


def _finish_dimension(place: Place, outputs: Sequence[Address], index: Word) -> None:
    plan, problem = place.plan, place.problem
    h, position = index // place.head, index % place.head
    statistics = [place.statistics.load((h + w * plan.block_heads) * 2, 2) for w in range(plan.warps)]
    tops = [pair[0].float() for pair in statistics]
    top = functools.reduce(m.larger, tops)
    out = weight = m.number(0.0)
    for w in range(plan.warps):
        factor = m.exp2(tops[w] - top)
        [total] = place.sums.load(index + w * plan.block_heads * place.head)
        out = m.fma(total.float(), factor, out)
        weight = m.fma(statistics[w][1].float(), factor, weight)
    dimension, real = place.dimension(position), place.first_head + h < problem.share
    if place.head != problem.head_dim:
        real = real & (dimension < problem.head_dim)
    row = _row(place, h)
    element = row * problem.head_dim + dimension
    if plan.splits == 1:
        bits, _ = round_to(out * m.reciprocal(weight), problem.dtype)
        store_element(outputs[0], element, bits, problem.dtype, real)
        return
    m.store(outputs[0].at(element), [out.word()], when=real)
    is_first = real & dimension.equals(0)
    m.store(outputs[1].at(row), [top.word()], when=is_first)
    m.store(outputs[2].at(row), [weight.word()], when=is_first)


def store_nothing(place: Place, outputs: Sequence[Address]) -> None:
    """The maxima of a split without keys."""
    real = (place.thread < place.plan.block_heads) & (place.first_head + place.thread < place.problem.share)
    m.store(outputs[1].at(_row(place, place.thread)), [m.number(MASKED).word()], when=real)


def _row(place: Place, head: Word) -> Word:
    """Of [batch, heads, splits], of a query head of the block."""
    heads = place.text * place.problem.heads + place.kv_head * place.problem.share + place.first_head
    return (heads + head) * place.plan.splits + place.split
