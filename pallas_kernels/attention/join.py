"""The end of the kernel: the sums of groups, of warps and of the block."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

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
    """The warps' sums added up, of a cluster those of its blocks too, and out."""
    plan = place.plan
    if plan.cluster == 1:
        _each_item(
            place, place.thread, plan.threads, lambda index: _put(place, outputs, index, *_of_block(place, index))
        )
        return
    _each_item(place, place.thread, plan.threads, lambda index: _keep(place, index, *_of_block(place, index)))
    m.cluster_barrier()
    mine = place.rank * plan.threads + place.thread
    threads = plan.cluster * plan.threads
    _each_item(place, mine, threads, lambda index: _put(place, outputs, index, *_of_cluster(place, index)))
    m.cluster_barrier(stores=False)  # a block must not end while others read its shared memory


def _each_item(place: Place, mine: Word, threads: int, body: Callable[[Word], None]) -> None:
    """Calls it with the index in [heads, dimensions] of each of this thread's sums."""
    items = place.plan.block_heads * place.head
    for first in range(0, items, threads):
        index = mine + first
        if first + threads <= items:
            body(index)
        else:
            m.if_(index < items, functools.partial(body, index))


def _joined(parts: Sequence[tuple[Float, Float, Float]]) -> tuple[Float, Float, Float]:
    """The sum, the maximum and the weight of several."""
    top = functools.reduce(m.larger, [of_part for _, of_part, _ in parts])
    total = weight = m.number(0.0)
    for out, of_part, of_weight in parts:
        factor = m.exp2(of_part - top)
        total, weight = m.fma(out, factor, total), m.fma(of_weight, factor, weight)
    return total, top, weight


def _of_block(place: Place, index: Word) -> tuple[Float, Float, Float]:
    h, parts = index // place.head, []
    for w in range(place.plan.warps):
        top, weight = place.statistics.load((h + w * place.plan.block_heads) * 2, 2)
        [out] = place.sums.load(index + w * place.plan.block_heads * place.head)
        parts.append((out.float(), top.float(), weight.float()))
    return _joined(parts)


def _keep(place: Place, index: Word, out: Float, top: Float, weight: Float) -> None:
    """The block's sums to shared memory for the cluster, where the token was."""
    place.token.store(index, [out.word()])
    h, position = index // place.head, index % place.head
    statistics = h * 2 + place.plan.block_heads * place.head
    m.if_(position.equals(0), lambda: place.token.store(statistics, [top.word(), weight.word()]))


def _of_cluster(place: Place, index: Word) -> tuple[Float, Float, Float]:
    statistics = index // place.head * 2 + place.plan.block_heads * place.head
    places = (index, statistics, statistics + 1)
    ranks = range(place.plan.cluster)
    out, top, weight = ([place.token.load_from_cluster(rank, i).float() for rank in ranks] for i in places)
    return _joined(list(zip(out, top, weight, strict=True)))


def _put(place: Place, outputs: Sequence[Address], index: Word, out: Float, top: Float, weight: Float) -> None:
    """One dimension of the output, or of sums that are yet to be combined, to device memory."""
    problem, h = place.problem, index // place.head
    dimension, real = place.dimension(index % place.head), place.first_head + h < problem.share
    if place.head != problem.head_dim:
        real = real & (dimension < problem.head_dim)
    row = _row(place, h)
    element = row * problem.head_dim + dimension
    if place.plan.sums == 1:
        bits, _ = round_to(out * m.reciprocal(weight), problem.dtype)
        store_element(outputs[0], element, bits, problem.dtype, real)
        return
    m.store(outputs[0].at(element), [out.word()], when=real)
    is_first = real & dimension.equals(0)
    m.store(outputs[1].at(row), [top.word()], when=is_first)
    m.store(outputs[2].at(row), [weight.word()], when=is_first)


def store_nothing(place: Place, outputs: Sequence[Address]) -> None:
    """The maxima of splits without keys."""
    real = (place.thread < place.plan.block_heads) & (place.first_head + place.thread < place.problem.share)
    m.store(outputs[1].at(_row(place, place.thread)), [m.number(MASKED).word()], when=real & place.rank.equals(0))


def _row(place: Place, head: Word) -> Word:
    """Of [batch, heads, sums], of a query head of the block."""
    heads = place.text * place.problem.heads + place.kv_head * place.problem.share + place.first_head
    return (heads + head) * place.plan.sums + place.split // place.plan.cluster
