"""The token's queries, key and value: rotary embedding, rounding, and the cache update."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from pallas_kernels import machine as m
from pallas_kernels.attention.elements import load_element, round_to, store_element
from pallas_kernels.attention.place import Place
from pallas_kernels.machine import Address, Bool, Float, Word


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
class Item:
    """One dimension of a query, or of the token's key or value; `slot` counts these in shared memory."""

    slot: Word
    dimension: Word
    real: Bool
    value: Float
    rotary: _Rotary | None


def load_items(place: Place, qkv: Address, tables: Sequence[Address]) -> list[Item]:
    """What this thread prepares. Loads only: nothing waits for them yet."""
    items = (place.plan.block_heads + 2) * place.head
    return [_load_item(place, qkv, tables, place.thread + i) for i in range(0, items, place.plan.threads)]


def _load_item(place: Place, qkv: Address, tables: Sequence[Address], index: Word) -> Item:
    problem, heads = place.problem, place.plan.block_heads
    slot, dimension = index // place.head, index % place.head
    real = slot < heads + 2
    if place.head != problem.head_dim:
        real = real & (dimension < problem.head_dim)
    query = place.kv_head * problem.share + m.minimum(place.first_head + slot, problem.share - 1)
    key_or_value = place.kv_head + problem.heads + (slot - heads) * problem.kv_heads
    row = place.text * (problem.heads + 2 * problem.kv_heads) + m.select(slot < heads, query, key_or_value)
    value = load_element(qkv, row * problem.head_dim + dimension, problem.dtype, real)
    rotary = _load_rotary(place, qkv, tables, row, dimension, real & (slot < heads + 1)) if tables else None
    return Item(slot, dimension, real, value, rotary)


def _load_rotary(
    place: Place, qkv: Address, tables: Sequence[Address], row: Word, dimension: Word, real: Bool
) -> _Rotary:
    problem, half = place.problem, place.problem.rotated // 2
    rotates, low = real & (dimension < 2 * half), dimension < half
    partner_at = row * problem.head_dim + m.select(low, dimension + half, dimension - half)
    partner = load_element(qkv, partner_at, problem.dtype, rotates)
    angle = place.text * half + m.select(low, dimension, dimension - half)
    cos, sin = (m.load(table.at(angle), when=rotates, policy=m.PLAIN)[0].float() for table in tables)
    return _Rotary(rotates, low, partner, cos, sin)


def prepare(place: Place, item: Item, start: Word, keys: Address, values: Address) -> None:
    """Rotates, rounds key and value as the cache does, and stores: in shared memory for the block, and in the cache.

    Queries get the factor that makes scores (with a softcap, twice the tangent's argument) units of log2.
    """
    problem, plan = place.problem, place.plan
    value = item.value if item.rotary is None else item.rotary.of(item.value)
    bits, rounded = round_to(value, problem.cache_dtype)
    factor = problem.scale * math.log2(math.e)
    if problem.softcap is not None:
        factor = 2 * factor / problem.softcap
    shared = m.choose(item.slot < plan.block_heads, value * factor, rounded)
    if place.head != problem.head_dim:
        shared = m.choose(item.real, shared, 0.0)
    index = item.slot * place.head + place.position(item.dimension)
    m.if_(item.slot < plan.block_heads + 2, lambda: place.token.store(index, [shared.word()]))
    writes = place.split.equals(0) & place.part.equals(0) & item.real
    row = start * problem.head_dim + item.dimension
    for slot, cache in ((plan.block_heads, keys), (plan.block_heads + 1, values)):
        store_element(cache, row, bits, problem.cache_dtype, writes & item.slot.equals(slot))
