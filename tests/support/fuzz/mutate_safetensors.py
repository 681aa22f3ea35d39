"""Changes to safetensors files: eight bytes of length, a JSON header, the tensors' bytes."""

from __future__ import annotations

import json
import random
from typing import Any

from support.fuzz.mutate_bytes import INTEGERS, mutate_bytes, packed_integer
from support.fuzz.mutate_json import mutate_tree, write_json

_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "U16", "U32",
           "U64", "F4", "C64", "X", "")  # fmt: skip


def mutate_safetensors(data: bytes, rng: random.Random, other: bytes = b"") -> bytes:
    if rng.random() < 0.25:
        return mutate_bytes(data, rng, other)
    size = int.from_bytes(data[:8], "little")
    header: Any = json.loads(data[8 : 8 + size])
    body = data[8 + size :]
    for _ in range(rng.choice((1, 1, 2, 3))):
        if rng.random() < 0.5 or not header:
            header = mutate_tree(header, rng)
        else:
            _change_entry(header, rng)
        if not isinstance(header, dict):
            break
    if rng.random() < 0.15:
        body = mutate_bytes(body, rng)
    text = write_json(header, rng)
    length = len(text) if rng.random() < 0.9 else rng.choice((len(text) + 1, len(text) - 1, *INTEGERS))
    return packed_integer(length, 8) + text + body


def _change_entry(header: dict[str, Any], rng: random.Random) -> None:
    """A tensor's type, its sizes or its place."""
    entry = header[rng.choice(list(header))]
    if not isinstance(entry, dict):
        return
    shape, where = entry.get("shape"), entry.get("data_offsets")
    change = rng.randrange(4)
    if change == 0:
        entry["dtype"] = rng.choice(_DTYPES)
    elif change == 1 and isinstance(shape, list) and shape:
        rng.shuffle(shape)
        entry["shape"] = rng.choice((shape, [*shape, 1], [0, *shape], [1, *shape], shape[:-1]))
    elif change == 2 and isinstance(shape, list) and shape:
        shape[rng.randrange(len(shape))] = rng.choice(INTEGERS)
    elif isinstance(where, list) and where:
        where[rng.randrange(len(where))] = rng.choice(INTEGERS)
