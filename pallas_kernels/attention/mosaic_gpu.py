"""The attention kernel for NVIDIA GPUs: rotary embedding, cache update and flash decoding in one launch.

Written per thread, with CUDA cores only: reading the cache takes longer than the arithmetic. In a warp, `lanes` lanes
share a key; a group of lanes keeps a maximum and sums over its keys (online softmax), and groups, warps and splits are
joined at the end. Scores are in units of log2: the factor is part of the query.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from pallas_kernels import machine as m
from pallas_kernels.attention import token
from pallas_kernels.attention.elements import unpack
from pallas_kernels.attention.join import Sums, finish, join_groups, store_nothing
from pallas_kernels.attention.place import Place, shared_sizes
from pallas_kernels.attention.plan import LOAD_BYTES, Plan
from pallas_kernels.attention.problem import MASKED, Problem
from pallas_kernels.machine import Address, Bool, Float, Word

_THREADS = "warpgroup"
_CACHE = ".L1::no_allocate"  # read once; not `.nc`: the kernel writes into the same buffer

plgpu: Any = mosaic_gpu  # what older JAX has not, and what has no types of its own


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
      With one sum (out [batch, heads * head_dim] of qkv's dtype,). Else float32, to be combined: output sums
      [batch, heads, sums, head_dim], maxima in units of log2 and sums of weights [batch, heads, sums]; of one
      without keys only the maximum is written. Then keys and values, written in place.
    """
    keys_ref, values_ref = jax.new_ref(keys), jax.new_ref(values)
    by_sum = (problem.batch, problem.heads, plan.sums)
    if plan.sums == 1:
        outputs = [jax.ShapeDtypeStruct((problem.batch, problem.heads * problem.head_dim), problem.dtype)]
    else:
        shapes = ((*by_sum, problem.head_dim), by_sum, by_sum)
        outputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    # Not `plgpu.kernel`: JAX 0.10's does not take references.
    mesh = plgpu.Mesh(
        grid=(problem.batch * problem.kv_heads * plan.parts * plan.sums,),
        grid_names=("sum",),
        cluster=(plan.cluster,) if plan.cluster > 1 else (),
        cluster_names=("split",) if plan.cluster > 1 else (),
        num_threads=plan.warps // 4,
        thread_name=_THREADS,
        kernel_name="attention",
    )
    params = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane)
    kernel = pl.kernel(functools.partial(_kernel, problem, plan), outputs, mesh=mesh, compiler_params=params)
    rotary = (cos, sin) if problem.rotated else ()
    results = kernel(layer.reshape(1), start.reshape(1), first, qkv, *rotary, keys_ref, values_ref)
    return tuple(results), jax.freeze(keys_ref), jax.freeze(values_ref)


def _kernel(problem: Problem, plan: Plan, *refs: Any) -> None:
    def with_shared(*shared: Any) -> None:
        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * (len(refs) + len(shared)))
        def per_thread(_: Any, *all_refs: Any) -> None:
            _Thread(problem, plan, all_refs[: len(refs)], all_refs[len(refs) :]).run()

        per_thread(*refs, *shared)

    scratch = [plgpu.SMEM((size,), jnp.float32) for size in shared_sizes(problem, plan)]
    pl.run_scoped(with_shared, *scratch, collective_axes=_THREADS)


class _Thread:
    """One thread of the kernel."""

    def __init__(self, problem: Problem, plan: Plan, refs: Sequence[Any], shared: Sequence[Any]):
        self.problem, self.plan = problem, plan
        # The compiled kernel takes its parameters in this order.
        layer_at, start_at, first_at, self.qkv, *rest = [Address.of(ref) for ref in refs]
        self.tables, rest = (rest[:2], rest[2:]) if problem.rotated else ([], rest)
        keys, values, *self.outputs = rest
        self.place = place = Place(problem, plan, shared)
        [layer] = m.load(layer_at, policy=m.PLAIN)
        [self.start] = m.load(start_at, policy=m.PLAIN)
        [self.first] = m.load(first_at.at(place.text), policy=m.PLAIN)
        row = (layer * problem.batch + place.text) * problem.kv_heads + place.kv_head
        self.keys, self.values = (a.times(row, problem.length * problem.row_bytes) for a in (keys, values))
        self.stride = plan.warps * (32 // plan.lanes)  # keys between two that a lane has under way

    def run(self) -> None:
        """The whole kernel."""
        first, count, part = self.span()
        begin, stop = first + self.place.split * part, first + count
        end = m.minimum(begin + part, stop)
        if self.plan.sums == 1:
            self.attend(begin, end)
            return
        # The first cluster (or block) has the token itself, the others may have nothing.
        busy = (self.place.split < self.plan.cluster) | (begin - self.place.rank * part).signed_below(stop)
        m.if_(busy, lambda: self.attend(begin, end), lambda: store_nothing(self.place, self.outputs))

    def span(self) -> tuple[Word, Word, Word]:
        """The first key that is seen, how many are before the token, and how many of them a split has."""
        first = m.select(self.first.signed_below(0), 0, self.first)
        count = m.select(first.signed_below(self.start), self.start - first, 0)
        return first, count, (count + (self.plan.splits - 1)) // self.plan.splits

    def attend(self, begin: Word, end: Word) -> None:
        """A block that has keys."""
        place, turn_keys = self.place, self.plan.block_keys
        items = token.load_items(place, self.qkv, self.tables)
        key = begin + place.warp * (32 // self.plan.lanes) + place.group
        under_way = self.fetch(self.keys, key, end), self.fetch(self.values, key, end)
        for item in items:
            token.prepare(place, item, self.start, self.keys, self.values)
        m.barrier()

        def turn(offset: Word, carried: Any) -> Any:
            (keys, values), sums = carried
            here, after = key + offset, key + offset + turn_keys
            scores = self.scores([self.unpacked(words) for words in keys], self.there(here, end))
            keys = self.fetch(self.keys, after, end)
            sums = self.accumulate(sums, scores, values)
            return (keys, self.fetch(self.values, after, end)), sums

        _, sums = m.loop(0, end - begin, turn_keys, (under_way, self.of_token()), turn)
        join_groups(place, sums)
        m.barrier()
        finish(place, self.outputs)

    def of_token(self) -> list[Sums]:
        """Sums to begin with: of the block's first group the token itself, of all others nothing."""
        heads, place = self.plan.block_heads, self.place
        here = place.split.equals(0) & place.thread.equals(place.lane)
        scores = self.scores([place.of_lane(heads)], [here])
        value, weight = [m.choose(here, v, 0.0) for v in place.of_lane(heads + 1)], m.choose(here, 1.0, 0.0)
        return [Sums(top, weight, value) for [top] in scores]

    def there(self, key: Word, end: Word) -> list[Bool]:
        """Whether the keys of a turn are before the end."""
        return [(key + u * self.stride).signed_below(end) for u in range(self.plan.keys)]

    def fetch(self, base: Address, key: Word, end: Word) -> list[list[Word]]:
        """This lane's words of a turn's keys (or values), zeros past the end; by key."""
        row_bytes, lanes, lane = self.problem.row_bytes, self.plan.lanes, self.place.lane
        address = base.at(key, row_bytes).at(lane, LOAD_BYTES)
        fetched = []
        for u, there in enumerate(self.there(key, end)):
            words: list[Word] = []
            for chunk in range(self.plan.chunks):
                when = there
                if (chunk + 1) * lanes * LOAD_BYTES > row_bytes:  # idle lanes
                    when = there & (lane + chunk * lanes < row_bytes // LOAD_BYTES)
                offset = u * self.stride * row_bytes + chunk * lanes * LOAD_BYTES
                words += m.load(address, 4, when=when, offset=offset, policy=_CACHE)
            fetched.append(words)
        return fetched

    def unpacked(self, words: list[Word]) -> list[Float]:
        return [v for w in words for v in unpack(w, self.problem.cache_dtype)]

    def scores(self, keys: list[list[Float]], there: list[Bool]) -> list[list[Float]]:
        """By query head and key, in units of log2; the same in all lanes of a group."""
        return [self.scores_of_head(self.place.of_lane(h), keys, there) for h in range(self.plan.block_heads)]

    def scores_of_head(self, query: list[Float], keys: list[list[Float]], there: list[Bool]) -> list[Float]:
        scores = []
        for key, is_there in zip(keys, there, strict=True):
            total = query[0] * key[0]
            for a, b in zip(query[1:], key[1:], strict=True):
                total = m.fma(a, b, total)
            score = self.capped(m.warp_sum(total, self.plan.lanes))
            scores.append(m.choose(is_there, score, MASKED))
        return scores

    def capped(self, score: Float) -> Float:
        """With a softcap: cap · tanh(x) = cap · (1 - 2 / (1 + 2^score)), as the score is 2 · x · log2(e)."""
        if self.problem.softcap is None:
            return score
        cap = self.problem.softcap * math.log2(math.e)
        return m.fma(m.reciprocal(m.exp2(score) + 1.0), m.number(-2 * cap), m.number(cap))

    def accumulate(self, sums: list[Sums], scores: list[list[Float]], values: list[list[Word]]) -> list[Sums]:
        """Online softmax: the sums with a turn's keys. Key by key, so that few values are unpacked at a time."""
        added, weights = [], []
        for old, of_head in zip(sums, scores, strict=True):
            top = functools.reduce(m.larger, of_head, old.top)
            before, of_keys = m.exp2(old.top - top), [m.exp2(score - top) for score in of_head]
            weight = m.fma(old.weight, before, m.tree_sum(of_keys))
            added.append(Sums(top, weight, [v * before for v in old.out]))
            weights.append(of_keys)
        for u, words in enumerate(values):
            value = self.unpacked(words)
            for total, of_keys in zip(added, weights, strict=True):
                total.out = [m.fma(of_keys[u], v, out) for v, out in zip(value, total.out, strict=True)]
        return added
