"""Changes to bytes of which nothing is known."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable

INTEGERS = (
    0, 1, 2, 3, 7, 8, 15, 16, 31, 32, 64, 100, 127, 128, 255, 256, 1000, 4096, 65535, 65536, 2**24,
    2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1,
)  # fmt: skip
"""Where sizes, signs and types end."""

_RUNS = (1, 2, 7, 64, 1000, 70_000)


def mutate_bytes(data: bytes, rng: random.Random, other: bytes = b"") -> bytes:
    """One to eight changes; `other` is a second sound file, of which parts may be taken."""
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        data = rng.choice(_CHANGES)(data, rng, other)
    return data


def packed_integer(value: int, size: int, little: bool = True) -> bytes:
    """The lower `size` bytes of a number."""
    return (value % (1 << 8 * size)).to_bytes(size, "little" if little else "big")


def _place(data: bytes, rng: random.Random) -> int:
    """Headers stand at the front: half of the changes are made there."""
    end = len(data) if rng.random() < 0.5 else min(len(data), 256)
    return rng.randrange(end) if end else 0


def _flip(data: bytes, rng: random.Random, other: bytes) -> bytes:
    at = _place(data, rng)
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :] if data else data


def _set(data: bytes, rng: random.Random, other: bytes) -> bytes:
    at = _place(data, rng)
    return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]


def _integer(data: bytes, rng: random.Random, other: bytes) -> bytes:
    size = rng.choice((1, 2, 4, 8))
    at = _place(data, rng) // size * size
    return data[:at] + packed_integer(rng.choice(INTEGERS), size, rng.random() < 0.9) + data[at + size :]


def _float(data: bytes, rng: random.Random, other: bytes) -> bytes:
    kind = rng.choice(("<f", "<d", "<e"))
    value = struct.pack(kind, rng.choice((float("nan"), float("inf"), float("-inf"), 0.0, -1.0, 6e4)))
    at = _place(data, rng) // len(value) * len(value)
    return data[:at] + value + data[at + len(value) :]


def _cut(data: bytes, rng: random.Random, other: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _remove(data: bytes, rng: random.Random, other: bytes) -> bytes:
    at = _place(data, rng)
    return data[:at] + data[at + rng.choice(_RUNS) :]


def _repeat(data: bytes, rng: random.Random, other: bytes) -> bytes:
    at, count = _place(data, rng), rng.choice(_RUNS)
    return data[:at] + data[at : at + count] * rng.choice((2, 2, 3, 50)) + data[at + count :]


def _insert(data: bytes, rng: random.Random, other: bytes) -> bytes:
    at = _place(data, rng)
    run = bytes([rng.choice((0, 32, 48, 65, 91, 123, 128, 255, rng.randrange(256)))]) * rng.choice(_RUNS)
    return data[:at] + run + data[at:]


def _splice(data: bytes, rng: random.Random, other: bytes) -> bytes:
    other = other or data
    return data[: _place(data, rng)] + other[_place(other, rng) :]


_CHANGES: tuple[Callable[[bytes, random.Random, bytes], bytes], ...] = (
    _flip, _flip, _set, _set, _integer, _integer, _integer, _float, _cut, _remove, _repeat, _insert, _splice,
)  # fmt: skip
