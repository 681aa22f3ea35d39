"""Changes to JSON: of the tree, so that what comes out is JSON still, and now and then of its bytes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

from support.fuzz.mutate_bytes import mutate_bytes

_DEEP, _DIGITS, _TWICE = "\x01deep", "\x01digits", "\x01twice"  # written as what JSON's writer cannot write

EXTREMES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 127, 256, 4097, 2**31 - 1, 2**31, 2**32, 2**63, -(2**63), 2**64, 10**30,
    0.0, -0.0, 0.5, 1.5, 1e-30, 1e30, 1e308, -1e308, float("nan"), float("inf"), float("-inf"),
    "", " ", "0", "16", "true", "null", "\ud800", "\x00", "\x1b[31m", "é", "𝒳", "x" * 5000, "../../etc/passwd",
    [], {}, [[]], [{}], {"": None}, [None], [0] * 1000, ["x"] * 3, {"a": {"b": [1, {"c": None}]}}, _DEEP, _DIGITS,
)  # fmt: skip


def mutate_json(data: bytes, rng: random.Random, other: bytes = b"") -> bytes:
    """One to four changes of the tree; `other` is a second sound file, of which parts may be taken."""
    if rng.random() < 0.12:
        return mutate_bytes(data, rng, other)
    tree = json.loads(data)
    donor = json.loads(other) if other else tree
    for _ in range(rng.choice((1, 1, 1, 2, 2, 4))):
        tree = mutate_tree(tree, rng, donor)
    return write_json(tree, rng)


def mutate_tree(tree: Any, rng: random.Random, donor: Any = None) -> Any:
    """One change of a tree, in place where that is possible."""
    places = _places(tree)
    if not places:
        return _changed(tree, rng, tree)
    parent, key = rng.choice(places)
    if rng.random() < 0.6:
        parent[key] = _changed(parent[key], rng, donor if donor is not None else tree)
    elif isinstance(parent, dict):
        rng.choice(_DICT_CHANGES)(parent, key, rng, donor)
    else:
        rng.choice(_LIST_CHANGES)(parent, key, rng)
    return tree


def write_json(tree: Any, rng: random.Random) -> bytes:
    text = json.dumps(tree, ensure_ascii=True)
    if _DEEP[1:] in text:
        depth = rng.choice((50, 500, rng.randrange(900, 1000), 5000, 100_000))
        text = text.replace(
            json.dumps(_DEEP), rng.choice(("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth))
        )
    text = text.replace(json.dumps(_DIGITS), "9" * 5000).replace(json.dumps(_TWICE)[1:-1], "")
    if rng.random() < 0.01:
        return text.encode("utf-16" if rng.random() < 0.5 else "utf-8-sig")
    return text.encode()


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Every place of a tree that holds a value, as (its container, its key or index)."""
    places: list[tuple[Any, Any]] = []
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, value in items:
            places.append((node, key))
            if isinstance(value, (dict, list)):
                waiting.append(value)
    return places


def _changed(value: Any, rng: random.Random, donor: Any) -> Any:
    """Another value in the place of one."""
    how = rng.random()
    if how < 0.5:
        return _copied(rng.choice(EXTREMES))
    if how < 0.62:
        places = _places(donor)
        if places:
            parent, key = rng.choice(places)
            return _copied(parent[key])
    if how < 0.7:
        return [value] if rng.random() < 0.7 else {"value": value}
    if isinstance(value, bool):
        return rng.choice((not value, int(value), str(value).lower()))
    if isinstance(value, (int, float)):
        near = (value + 1, value - 1, -value, value * 2, value * 1000, value / 2, str(value), [value, value])
        return rng.choice(near)
    if isinstance(value, str):
        near = (value.upper(), value + "x", value[:-1], value * 50, value[::-1], "0x" + value, [value], 5)
        return rng.choice(near)
    if isinstance(value, list):
        return rng.choice(
            (
                value[:-1],
                value + value[:1],
                value * 2,
                value[::-1],
                {str(index): item for index, item in enumerate(value)},
            )
        )
    if isinstance(value, dict):
        return rng.choice((list(value), list(value.values()), {}, str(value)[:100]))
    return rng.choice(EXTREMES)


def _copied(value: Any) -> Any:
    """Containers must not be shared between places."""
    return json.loads(json.dumps(value)) if isinstance(value, (dict, list)) else value


def _delete(parent: Any, key: Any, rng: random.Random, donor: Any) -> None:
    del parent[key]


def _rename(parent: Any, key: str, rng: random.Random, donor: Any) -> None:
    names = [k for p, k in _places(donor) if isinstance(k, str)] or [key]
    parent[rng.choice((rng.choice(names), key + "_", key.upper(), key[:-1], "", "\ud800", "x" * 3000))] = parent.pop(
        key
    )


def _add(parent: Any, key: str, rng: random.Random, donor: Any) -> None:
    parent[rng.choice(("added", "__class__", "0", "\ud800" + key, key + "." + key))] = _copied(rng.choice(EXTREMES))


def _double(parent: Any, key: str, rng: random.Random, donor: Any) -> None:
    """The same name a second time in one object."""
    parent[key + _TWICE] = _copied(rng.choice(EXTREMES))


def _swap(parent: Any, key: str, rng: random.Random, donor: Any) -> None:
    second = rng.choice(list(parent))
    parent[key], parent[second] = parent[second], parent[key]


def _list_delete(parent: Any, index: int, rng: random.Random) -> None:
    del parent[index]


def _list_insert(parent: Any, index: int, rng: random.Random) -> None:
    parent.insert(index, _copied(rng.choice(EXTREMES)))


def _list_double(parent: Any, index: int, rng: random.Random) -> None:
    parent.insert(index, _copied(parent[index]))


_DICT_CHANGES: tuple[Callable[..., None], ...] = (_delete, _delete, _rename, _add, _double, _swap)
_LIST_CHANGES: tuple[Callable[..., None], ...] = (_list_delete, _list_insert, _list_double)
