"""Changes to GGUF files by their fields: counts, lengths, types, texts, numbers, sizes and places of tensors."""

from __future__ import annotations

import dataclasses
import random
import struct
from typing import Any

from support.fuzz.mutate_bytes import INTEGERS, mutate_bytes, packed_integer

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
_FORMATS = {4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}


@dataclasses.dataclass
class Field:
    """A run of bytes and what it is: count, length, text, type, number, size, place or rest."""

    kind: str
    data: bytes


Group = list[Field]


@dataclasses.dataclass
class GGUFFields:
    """A file in pieces: how it begins, entries, tensors, all that follows."""

    begin: Group
    entries: list[Group]
    tensors: list[Group]
    rest: bytes
    end: int
    """Where the header ends in the file as it was read."""

    def to_bytes(self, padded: bool = True) -> bytes:
        """The file; with `padded` the tensors' bytes begin at a multiple of 32 again."""
        groups = [self.begin, *self.entries, *self.tensors]
        header = b"".join(field.data for group in groups for field in group)
        return header + (b"\0" * (-len(header) % 32) if padded else b"") + self.rest

    def count(self) -> None:
        """Says in the header how many tensors and entries there are."""
        self.begin[2:] = [Field("count", packed_integer(len(part), 8)) for part in (self.tensors, self.entries)]


class _Cursor:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, kind: str, count: int) -> Field:
        field = Field(kind, self.data[self.at : self.at + count])
        self.at += count
        return field

    def text(self) -> Group:
        length = self.take("length", 8)
        return [length, self.take("text", _number(length))]

    def value(self, kind: int) -> Group:
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return [self.take("number", _SIZES[kind])]
        inner, count = self.take("type", 4), self.take("count", 8)
        if _number(inner) in _SIZES:
            return [inner, count, self.take("numbers", _SIZES[_number(inner)] * _number(count))]
        return [inner, count, *(field for _ in range(_number(count)) for field in self.value(_number(inner)))]


def _number(field: Field) -> int:
    return int.from_bytes(field.data, "little")


def parse(data: bytes) -> GGUFFields:
    """A sound file in pieces."""
    cursor = _Cursor(data)
    begin = [cursor.take("magic", 4), cursor.take("number", 4), cursor.take("count", 8), cursor.take("count", 8)]
    entries, tensors = [], []
    for _ in range(_number(begin[3])):
        key, kind = cursor.text(), cursor.take("type", 4)
        entries.append([*key, kind, *cursor.value(_number(kind))])
    for _ in range(_number(begin[2])):
        name, axes = cursor.text(), cursor.take("count", 4)
        sizes = [cursor.take("size", 8) for _ in range(_number(axes))]
        tensors.append([*name, axes, *sizes, cursor.take("type", 4), cursor.take("place", 8)])
    return GGUFFields(begin, entries, tensors, data[-(-cursor.at // 32) * 32 :], cursor.at)


def text_fields(text: str | bytes) -> Group:
    data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    return [Field("length", packed_integer(len(data), 8)), Field("text", data)]


def place_field(offset: int) -> Field:
    """Where a tensor begins, behind the header."""
    return Field("place", packed_integer(offset, 8))


def value_fields(kind: int, value: Any) -> Group:
    """A value of a type: `_FORMATS`, a text, or an array as (inner type, values)."""
    if kind == _STRING:
        return text_fields(value)
    if kind == _ARRAY:
        inner, values = value
        head = [Field("type", packed_integer(inner, 4)), Field("count", packed_integer(len(values), 8))]
        return head + [field for each in values for field in value_fields(inner, each)]
    return [Field("number", struct.pack(_FORMATS[kind], value))]


def entry_fields(key: str, kind: int, value: Any) -> Group:
    return [*text_fields(key), Field("type", packed_integer(kind, 4)), *value_fields(kind, value)]


_VALUES: tuple[tuple[int, Any], ...] = (
    (4, 0), (4, 1), (4, 3), (4, 2**31), (4, 2**32 - 1), (5, -1), (10, 2**63), (10, 2**64 - 1), (11, -(2**63)),
    (6, float("nan")), (6, float("inf")), (6, 0.0), (6, -1.0), (12, 1e308), (12, 0.5), (7, True), (7, False),
    (8, ""), (8, "x"), (8, "llama"), (8, b"\xff\xfe\x00"), (8, "x" * 5000), (8, "{% for"),
    (9, (4, [])), (9, (4, [1, 2, 3])), (9, (8, [])), (9, (8, ["a", "a"])), (9, (9, [(4, [1]), (4, [2])])),
    (9, (7, [True, False])), (9, (6, [float("nan")] * 4)), (9, (5, [-1] * 300)),
)  # fmt: skip


def mutate_gguf(data: bytes, rng: random.Random, other: bytes = b"") -> bytes:
    if rng.random() < 0.15:
        return mutate_bytes(data, rng, other)
    fields = parse(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        rng.choice((_change_value, _change_value, _change_groups, _change_field, _change_field))(fields, rng)
    result = fields.to_bytes(padded=rng.random() < 0.97)
    return mutate_bytes(result, rng) if rng.random() < 0.03 else result


def _change_value(fields: GGUFFields, rng: random.Random) -> None:
    """An entry gets another value, of any type."""
    if not fields.entries:
        return
    group = rng.choice(fields.entries)
    kind, value = rng.choice(_VALUES)
    if rng.random() < 0.4:  # a number near the one there
        last = group[-1]
        if last.kind == "number":
            last.data = packed_integer(_number(last) + rng.choice((-1, 1, 2, 16)), len(last.data))
            return
    group[2:] = [Field("type", packed_integer(kind, 4)), *value_fields(kind, value)]


def _change_groups(fields: GGUFFields, rng: random.Random) -> None:
    """Entries or tensors are lost, doubled, renamed or put elsewhere."""
    groups = rng.choice((fields.entries, fields.tensors))
    if not groups:
        return
    change, at = rng.randrange(5), rng.randrange(len(groups))
    if change == 0:
        del groups[at]
    elif change == 1:
        groups.insert(rng.randrange(len(groups)), [Field(f.kind, f.data) for f in groups[at]])
    elif change == 2:
        groups[at][:2] = [Field(f.kind, f.data) for f in rng.choice(groups)[:2]]
    elif change == 3:
        rng.shuffle(groups)
    else:
        groups[at][:2] = text_fields(
            rng.choice(("", "x" * 3000, b"\xff\xff", "token_embd.weight", "general.alignment"))
        )
    if rng.random() < 0.9:
        fields.count()


def _change_field(fields: GGUFFields, rng: random.Random) -> None:
    groups = [fields.begin, *fields.entries, *fields.tensors]
    group = rng.choice(groups) if rng.random() < 0.5 else rng.choice(fields.tensors or groups)
    field = rng.choice(group)
    if field.kind in ("text", "numbers"):
        field.data = mutate_bytes(field.data, rng)
        if field.kind == "text" and rng.random() < 0.8:
            group[group.index(field) - 1].data = packed_integer(len(field.data), 8)
    elif field.kind == "type":
        field.data = packed_integer(rng.choice((*range(42), 255, 2**31, 2**32 - 1)), 4)
    else:
        now = _number(field)
        value = rng.choice((*INTEGERS, now + 1, now - 1, now * 2, now // 2))
        field.data = packed_integer(value, len(field.data))
