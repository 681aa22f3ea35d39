"""The attention kernel for NVIDIA GPUs: rotary embedding, cache update and flash decoding in one launch.

Written per thread, with CUDA cores only: reading the cache takes longer than the arithmetic. In a warp, `lanes` lanes
share a key; a group of lanes keeps its own maximum and sums over its keys (online softmax), and groups, warps and
splits are joined at the end. Scores are in units of log2: the factor is part of the query.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu

from pallas_kernels import machine as m
from pallas_kernels.attention.elements import load_element, round_to, store_element, unpack
from pallas_kernels.attention.plan import LOAD_BYTES, Plan
from pallas_kernels.machine import Address, Bool, Float, Shared, Word

plgpu: Any = mosaic_gpu  # what older JAX has not, and what has no types of its own

MASKED = -1e30
"""The maximum of a split without keys: finite, so that a difference of two is no NaN."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is static of a step; sizes as :func:`pallas_kernels.attention.attend` describes them."""

    layers: int
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    length: int
    rotated: int
    scale: float
    softcap: float | None
    dtype: Any
    cache_dtype: Any

    @property
    def share(self) -> int:
        """Query heads that read one KV head."""
        return self.heads // self.kv_heads

    @property
    def row_bytes(self) -> int:
        """Bytes of one key."""
        return self.head_dim * self.cache_dtype.itemsize


def attend(
    problem: Problem,
    plan: Plan,
    qkv: jax.Array,
    cos: jax.Array | None,
    sin: jax.Array | None,
    keys: jax.Array,
    values: jax.Array,
    layer: jax.Array,
    first: jax.Array,
    start: jax.Array,
) -> tuple[tuple[jax.Array, ...], jax.Array, jax.Array]:
    """The kernel alone.

    Returns:
      With one split (out [batch, heads * head_dim] of qkv's dtype,). Else float32, to be combined: output sums
      [batch, heads, splits, head_dim], maxima in units of log2 and sums of weights [batch, heads, splits]; of a split
      without keys only the maximum is written. Then keys and values, written in place.
    """
    keys_ref, values_ref = jax.new_ref(keys), jax.new_ref(values)
    by_split = (problem.batch, problem.heads, plan.splits)
    if plan.splits == 1:
        outputs = [jax.ShapeDtypeStruct((problem.batch, problem.heads * problem.head_dim), problem.dtype)]
    else:
        shapes = ((*by_split, problem.head_dim), by_split, by_split)
        outputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    rotary = (cos, sin) if problem.rotated else ()
    kernel = plgpu.kernel(
        functools.partial(_kernel, problem, plan),
        out_type=outputs,
        scratch_types=[plgpu.SMEM((size,), jnp.float32) for size in _shared_sizes(problem, plan)],
        grid=(problem.batch * problem.kv_heads * plan.parts * plan.splits,),
        grid_names=("block",),
        num_threads=plan.warps // 4,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )
    results = kernel(layer.reshape(1), start.reshape(1), first, qkv, *rotary, keys_ref, values_ref)
    return tuple(results), jax.freeze(keys_ref), jax.freeze(values_ref)


def _padded(problem: Problem, plan: Plan) -> int:
    """Dimensions of a head with those of idle lanes."""
    return plan.lanes * plan.chunks * LOAD_BYTES // problem.cache_dtype.itemsize


def _shared_sizes(problem: Problem, plan: Plan) -> tuple[int, int, int]:
    """Floats in shared memory: queries, key and value of the token; sums of warps; their maxima and weights."""
    head = _padded(problem, plan)
    by_warp = plan.warps * plan.block_heads
    return (plan.block_heads + 2) * head, by_warp * head, by_warp * 2


def _kernel(problem: Problem, plan: Plan, *refs: Any) -> None:
    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs))
    def per_thread(_: Any, *refs: Any) -> None:
        _Thread(problem, plan, refs[:-3], refs[-3:]).run()

    per_thread(*refs)


@dataclasses.dataclass
class _Sums:
    """Of one query head, over the keys that a group of lanes has seen; `out` are this lane's dimensions."""

    top: Float
    weight: Float
    out: list[Float]


jax.tree_util.register_dataclass(_Sums, ["top", "weight", "out"], [])


@dataclasses.dataclass(frozen=True)
class _Rotary:
    """What turns one dimension: where it is `low`, into a · cos - b · sin, else into b · cos + a · sin."""

    rotates: Bool
    low: Bool
    partner: Float
    cos: Float
    sin: Float

    def of(self, value: Float) -> Float:
        """The value rotated; each product is rounded, so that the bits are the same everywhere."""
        side = m.product(self.partner, self.sin)
        turned = m.product(value, self.cos) + m.choose(self.low, m.number(0.0) - side, side)
        return m.choose(self.rotates, turned, value)


@dataclasses.dataclass(frozen=True)
class _Item:
    """One dimension (`place`) of a query, or of the token's key or value; `slot` counts these in shared memory."""

    slot: Word
    place: Word
    real: Bool
    value: Float
    rotary: _Rotary | None


class _Thread:
    """One thread of the kernel."""

    def __init__(self, problem: Problem, plan: Plan, refs: Sequence[Any], shared: Sequence[Any]):
        self.problem, self.plan = problem, plan
        self.elements = LOAD_BYTES // problem.cache_dtype.itemsize  # of a load
        self.head = _padded(problem, plan)
        # In this order the compiled kernel takes its parameters.
        addresses = [Address.of(ref) for ref in refs]
        layer_at, start_at, first_at, self.qkv, *rest = addresses
        self.rotary, rest = (rest[:2], rest[2:]) if problem.rotated else ([], rest)
        keys, values, *self.outputs = rest
        self.token, self.by_warp, self.statistics = (Shared(ref) for ref in shared)
        self.thread = m.thread_index()
        lane = self.thread & 31
        self.warp, self.group, self.lane = self.thread >> 5, lane // plan.lanes, lane & (plan.lanes - 1)
        block = m.block_index()
        self.split, block = block % plan.splits, block // plan.splits
        part, block = block % plan.parts, block // plan.parts
        self.kv_head, self.text = block % problem.kv_heads, block // problem.kv_heads
        self.part, self.first_head = part, part * plan.block_heads  # of those that share the KV head
        [layer] = m.load(layer_at, policy=m.PLAIN)
        [self.start] = m.load(start_at, policy=m.PLAIN)
        [self.first] = m.load(first_at.at(self.text), policy=m.PLAIN)
        row = (layer * problem.batch + self.text) * problem.kv_heads + self.kv_head
        self.keys, self.values = (a.times(row, problem.length * problem.row_bytes) for a in (keys, values))

    def run(self) -> None:
        """The whole kernel."""
        begin, end = self.span()
        if self.plan.splits == 1:
            self.attend(begin, end)
            return
        # The first split has the token itself, the others may have nothing.
        busy = self.split.equals(0) | begin.signed_below(end)
        m.if_(busy, lambda: self.attend(begin, end), self.store_nothing)

    def span(self) -> tuple[Word, Word]:
        """The keys of this split, before the token: each has an equal number of those that are seen."""
        first = m.select(self.first.signed_below(0), 0, self.first)
        if self.plan.splits == 1:
            return first, self.start
        count = m.select(first.signed_below(self.start), self.start - first, 0)
        each = (count + (self.plan.splits - 1)) // self.plan.splits
        begin = first + self.split * each
        return begin, m.minimum(begin + each, first + count)

    def attend(self, begin: Word, end: Word) -> None:
        plan, turn_keys = self.plan, self.plan.block_keys
        items = self.load_token()
        key = begin + self.warp * (32 // plan.lanes) + self.group
        under_way = self.fetch(self.keys, key, end), self.fetch(self.values, key, end)
        for item in items:
            self.prepare(item)
        m.barrier()

        def turn(offset: Word, carried: Any) -> Any:
            (keys, values), sums = carried
            here, after = key + offset, key + offset + turn_keys
            scores = self.scores(self.unpacked(keys), self.there(here, end))
            keys = self.fetch(self.keys, after, end)
            sums = self.accumulate(sums, scores, self.unpacked(values))
            return (keys, self.fetch(self.values, after, end)), sums

        _, sums = m.loop(0, end - begin, turn_keys, (under_way, self.of_token()), turn)
        self.join(sums)
        m.barrier()
        self.finish()

    # ---- the token itself ----

    def load_token(self) -> list[_Item]:
        """What this thread prepares of the queries, of the key and of the value: loads only."""
        items = (self.plan.block_heads + 2) * self.head
        return [self.load_item(self.thread + begin) for begin in range(0, items, self.plan.threads)]

    def load_item(self, item: Word) -> _Item:
        problem, heads = self.problem, self.plan.block_heads
        slot, place = item // self.head, item % self.head
        real = slot < heads + 2
        if self.head != problem.head_dim:
            real = real & (place < problem.head_dim)
        of_share = m.minimum(self.first_head + slot, problem.share - 1)
        query = self.kv_head * problem.share + of_share
        key_or_value = self.kv_head + problem.heads + (slot - heads) * problem.kv_heads
        row = self.text * (problem.heads + 2 * problem.kv_heads) + m.select(slot < heads, query, key_or_value)
        value = load_element(self.qkv, row * problem.head_dim + place, problem.dtype, real)
        rotary = self.load_rotary(row, place, real & (slot < heads + 1)) if problem.rotated else None
        return _Item(slot, place, real, value, rotary)

    def load_rotary(self, row: Word, place: Word, real: Bool) -> _Rotary:
        problem, half = self.problem, self.problem.rotated // 2
        rotates, low = real & (place < 2 * half), place < half
        partner_at = row * problem.head_dim + m.select(low, place + half, place - half)
        partner = load_element(self.qkv, partner_at, problem.dtype, rotates)
        angle = self.text * half + m.select(low, place, place - half)
        cos, sin = (m.load(table.at(angle), when=rotates, policy=m.PLAIN)[0].float() for table in self.rotary)
        return _Rotary(rotates, low, partner, cos, sin)

    def prepare(self, item: _Item) -> None:
        """Rotates, rounds the new key and value as the cache does, and stores for the block and in the cache."""
        problem, plan, value = self.problem, self.plan, item.value
        if item.rotary is not None:
            value = item.rotary.of(value)
        bits, rounded = round_to(value, problem.cache_dtype)
        factor = problem.scale * math.log2(math.e)
        if problem.softcap is not None:
            factor = 2 * factor / problem.softcap  # see `capped`
        shared = m.choose(item.slot < plan.block_heads, value * factor, rounded)
        if self.head != problem.head_dim:
            shared = m.choose(item.real, shared, 0.0)
        index = item.slot * self.head + self.position(item.place)
        m.if_(item.slot < plan.block_heads + 2, lambda: self.token.store(index, [shared.word()]))
        writes = self.split.equals(0) & self.part.equals(0) & item.real
        row = self.start * problem.head_dim + item.place
        for slot, cache in ((plan.block_heads, self.keys), (plan.block_heads + 1, self.values)):
            store_element(cache, row, bits, problem.cache_dtype, writes & item.slot.equals(slot))

    def position(self, place: Word) -> Word:
        """Where a dimension of a head stands in shared memory: four by four, lanes side by side."""
        piece, inside = place // self.elements, place % self.elements
        chunk, lane = piece // self.plan.lanes, piece % self.plan.lanes
        fours = self.elements // 4
        return ((chunk * fours + (inside >> 2)) * self.plan.lanes + lane) * 4 + (inside & 3)

    def dimension(self, position: Word) -> Word:
        """The dimension that stands at a position."""
        inside, fours = position & 3, position >> 2
        lane, fours = fours % self.plan.lanes, fours // self.plan.lanes
        chunk, four = fours // (self.elements // 4), fours % (self.elements // 4)
        return (chunk * self.plan.lanes + lane) * self.elements + four * 4 + inside

    def of_slot(self, slot: int) -> list[Float]:
        """This lane's dimensions of a query, or of the token's key or value."""
        found: list[Float] = []
        for four in range(self.plan.chunks * self.elements // 4):
            words = self.token.load(self.lane * 4 + (slot * self.head + four * self.plan.lanes * 4), 4)
            found += [w.float() for w in words]
        return found

    def of_token(self) -> list[_Sums]:
        """Sums to begin with: of the first group the token itself, of all others nothing."""
        heads = self.plan.block_heads
        here = self.split.equals(0) & self.thread.equals(self.lane)
        scores = self.scores([self.of_slot(heads)], [here])
        value = [m.choose(here, v, 0.0) for v in self.of_slot(heads + 1)]
        weight = m.choose(here, 1.0, 0.0)
        return [_Sums(top, weight, value) for [top] in scores]

    # ---- the cache ----

    def stride(self) -> int:
        """Keys between two that a lane has under way."""
        return self.plan.warps * (32 // self.plan.lanes)

    def there(self, key: Word, end: Word) -> list[Bool]:
        """Whether the keys of a turn are before the end."""
        return [(key + u * self.stride()).signed_below(end) for u in range(self.plan.keys)]

    def fetch(self, base: Address, key: Word, end: Word) -> list[list[Word]]:
        """The words of a turn's keys (or values), zeros past the end; by key."""
        problem, plan = self.problem, self.plan
        address = base.at(key, problem.row_bytes).at(self.lane, LOAD_BYTES)
        found = []
        for u, there in enumerate(self.there(key, end)):
            words: list[Word] = []
            for chunk in range(plan.chunks):
                when = there
                if chunk * plan.lanes + plan.lanes > problem.row_bytes // LOAD_BYTES:
                    when = there & (self.lane + chunk * plan.lanes < problem.row_bytes // LOAD_BYTES)
                offset = u * self.stride() * problem.row_bytes + chunk * plan.lanes * LOAD_BYTES
                words += m.load(address, 4, when=when, offset=offset)
            found.append(words)
        return found

    def unpacked(self, words: list[list[Word]]) -> list[list[Float]]:
        return [[v for w in of_key for v in unpack(w, self.problem.cache_dtype)] for of_key in words]

    def scores(self, keys: list[list[Float]], there: list[Bool]) -> list[list[Float]]:
        """By query head and key, in units of log2; the same in all lanes of a group."""
        found = []
        for h in range(self.plan.block_heads):
            query = self.of_slot(h)
            of_head = []
            for key, is_there in zip(keys, there, strict=True):
                total = query[0] * key[0]
                for a, b in zip(query[1:], key[1:], strict=True):
                    total = m.fma(a, b, total)
                score = self.capped(m.warp_sum(total, self.plan.lanes))
                of_head.append(m.choose(is_there, score, MASKED))
            found.append(of_head)
        return found

    def capped(self, score: Float) -> Float:
        """Softcap times tanh: 1 - 2 / (1 + 2^score), the score being twice the tangent's argument times log2(e)."""
        cap = self.problem.softcap
        if cap is None:
            return score
        inverse = m.reciprocal(m.exp2(score) + 1.0)
        return m.fma(inverse, m.number(-2 * cap * math.log2(math.e)), m.number(cap * math.log2(math.e)))

    def accumulate(self, sums: list[_Sums], scores: list[list[Float]], values: list[list[Float]]) -> list[_Sums]:
        """Online softmax: the sums with a turn's keys."""
        found = []
        for old, of_head in zip(sums, scores, strict=True):
            top = functools.reduce(m.larger, of_head, old.top)
            before = m.exp2(old.top - top)
            weights = [m.exp2(score - top) for score in of_head]
            out = [v * before for v in old.out]
            for weight, value in zip(weights, values, strict=True):
                out = [m.fma(weight, v, total) for v, total in zip(value, out, strict=True)]
            found.append(_Sums(top, m.fma(old.weight, before, m.tree_sum(weights)), out))
        return found

    # ---- the end ----

    def join(self, sums: list[_Sums]) -> None:
        """The groups of a warp add up, and the warp stores its sums for the block."""
        lanes = self.plan.lanes
        distances = [d for d in (1, 2, 4, 8, 16) if d >= lanes]
        for h, of_head in enumerate(sums):
            top = of_head.top
            for distance in distances:
                top = m.larger(top, m.from_xor_lane(top.word(), distance).float())
            factor = m.exp2(of_head.top - top)
            weight = of_head.weight * factor
            out = [v * factor for v in of_head.out]
            place = m.word(0)  # of the first that this lane still has
            for distance in distances:
                other = m.from_xor_lane(weight.word(), distance).float()
                weight = weight + other
                out, place = self.halved(out, place, distance)
            row = self.warp * self.plan.block_heads + h
            self.store_sums(row * self.head, out, place)
            statistics = [top.word(), weight.word()]
            is_first = (self.thread & 31).equals(0)
            m.if_(is_first, functools.partial(self.statistics.store, row * 2, statistics))

    def halved(self, out: list[Float], place: Word, distance: int) -> tuple[list[Float], Word]:
        """Two lanes add up: each keeps half of the sums where their number is even."""
        half, odd = divmod(len(out), 2)
        if odd:
            return [v + m.from_xor_lane(v.word(), distance).float() for v in out], place
        upper = (self.thread & distance).equals(distance)
        kept = [m.choose(upper, b, a) for a, b in zip(out[:half], out[half:], strict=True)]
        sent = [m.choose(upper, a, b) for a, b in zip(out[:half], out[half:], strict=True)]
        out = [a + m.from_xor_lane(b.word(), distance).float() for a, b in zip(kept, sent, strict=True)]
        return out, place + m.select(upper, half, 0)

    def store_sums(self, base: Word, out: list[Float], place: Word) -> None:
        """A lane's sums from its `place`-th on to shared memory."""
        at_once = 4 if len(out) % 4 == 0 else 1
        for i in range(0, len(out), at_once):
            here = place + i
            position = ((here >> 2) * self.plan.lanes + self.lane) * 4 + (here & 3)
            self.by_warp.store(base + position, [v.word() for v in out[i : i + at_once]])

    def finish(self) -> None:
        """The warps' sums added up, and out."""
        items = self.plan.block_heads * self.head
        for begin in range(0, items, self.plan.threads):
            item = self.thread + begin
            if begin + self.plan.threads <= items:
                self.finish_item(item)
            else:
                m.if_(item < items, functools.partial(self.finish_item, item))

    def finish_item(self, item: Word) -> None:
        plan, problem = self.plan, self.problem
        h, position = item // self.head, item % self.head
        statistics = [self.statistics.load((h + w * plan.block_heads) * 2, 2) for w in range(plan.warps)]
        tops = [s[0].float() for s in statistics]
        top = functools.reduce(m.larger, tops)
        factors = [m.exp2(t - top) for t in tops]
        out = weight = m.number(0.0)
        for w, factor in enumerate(factors):
            [total] = self.by_warp.load(item + w * plan.block_heads * self.head)
            out = m.fma(total.float(), factor, out)
            weight = m.fma(statistics[w][1].float(), factor, weight)
        place = self.dimension(position)
        real = self.first_head + h < problem.share
        if self.head != problem.head_dim:
            real = real & (place < problem.head_dim)
        row = (
            self.text * problem.heads + self.kv_head * problem.share + self.first_head + h
        ) * plan.splits + self.split
        at = row * problem.head_dim + place
        if plan.splits == 1:
            bits, _ = round_to(out * m.reciprocal(weight), problem.dtype)
            store_element(self.outputs[0], at, bits, problem.dtype, real)
            return
        m.store(self.outputs[0].at(at), [out.word()], when=real)
        is_first = real & place.equals(0)
        m.store(self.outputs[1].at(row), [top.word()], when=is_first)
        m.store(self.outputs[2].at(row), [weight.word()], when=is_first)

    def store_nothing(self) -> None:
        """The maxima of a split without keys."""
        problem, plan = self.problem, self.plan
        h = self.first_head + self.thread
        real = (self.thread < plan.block_heads) & (h < problem.share)
        row = (self.text * problem.heads + self.kv_head * problem.share + h) * plan.splits + self.split
        m.store(self.outputs[1].at(row), [m.number(MASKED).word()], when=real)
