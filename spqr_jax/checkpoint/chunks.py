"""How arrays are cut on disk. A reader of a part of an array reads the chunks that the part touches, each whole."""

from __future__ import annotations

import math
from typing import Any

_CHUNK_BYTES = 2**21  # small beside a host's part of a large matrix, large beside what a chunk costs to find
_LARGEST_CHUNK_BYTES = 2**26
_SMALLEST_SHARE = 8  # a chunk has at least this fraction of the bytes that were asked for


def storage_options(path: Any, value: Any) -> Any:
    """Orbax' options for one array; a ``scoped_storage_options_creator``."""
    from spqr_jax._compat import orbax_v1

    options = orbax_v1().options.ArrayOptions.Saving.StorageOptions
    return options(chunk_byte_size=chunk_bytes(tuple(value.shape), value.dtype.itemsize))


def chunk_bytes(shape: tuple[int, ...], itemsize: int) -> int | None:
    """The bytes of a chunk to ask Orbax for; None for an array that stays in one chunk.

    Orbax divides dimensions by whole numbers only. A dimension with a large prime factor would become many tiny chunks.
    Such an array gets larger chunks, or stays whole.

    Args:
      shape: of the array.
      itemsize: bytes of an element.
    """
    asked = _CHUNK_BYTES
    while asked < math.prod(shape) * itemsize and asked <= _LARGEST_CHUNK_BYTES:
        chunk = _chunk_shape(shape, asked // itemsize)
        if math.prod(chunk) * itemsize * _SMALLEST_SHARE >= asked:
            return asked
        asked *= 2
    return None


def _chunk_shape(shape: tuple[int, ...], most: int) -> tuple[int, ...]:
    """The chunk that Orbax chooses: the largest dimension is divided until a chunk has so many elements at most."""
    choices = [_divisors(size) for size in shape]
    while math.prod(divisors[-1] for divisors in choices) > most:
        max(choices, key=lambda divisors: divisors[-1]).pop()
    return tuple(divisors[-1] for divisors in choices)


def _divisors(size: int) -> list[int]:
    small = [number for number in range(1, math.isqrt(size) + 1) if size % number == 0]
    return sorted({*small, *(size // number for number in small)})
