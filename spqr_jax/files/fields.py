"""Dataclasses out of JSON: every entry is checked by the annotation of the field that it becomes."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from spqr_jax.errors import ModelError, SpQRError
from spqr_jax.files.entries import LARGEST, Entries, shown


def read_fields(kind: type, values: Any, label: str, error: type[SpQRError] = ModelError) -> dict[str, Any]:
    """Arguments of a dataclass, from what `dataclasses.asdict` and JSON made of one.

    A field may be an int, a float, a text, true or false, one of some texts (`Literal`), a tuple of ints or of
    floats, or any of these or None.

    Args:
      kind: the dataclass.
      values: as they were read from JSON.
      label: the file, for messages.
      error: what is raised.

    Raises:
      SpQRError: of type `error`: no object, or an entry that is unknown, of another type, or absent and needed.
    """
    if not isinstance(values, Mapping):
        raise error(f"{label} is {shown(values)}, expected an object with entries")
    entries = Entries(values, label, error=error)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if unknown := [name for name in values if name not in fields]:
        names = ", ".join(shown(name) for name in unknown[:5])
        raise error(
            f"{label}: unknown entries {names}, expected {', '.join(fields)}: was it written by another version?"
        )
    read: dict[str, Any] = {}
    for name, hint in _hints(kind).items():
        inner, optional = _without_none(hint)
        if name not in values:
            if fields[name].default is dataclasses.MISSING and fields[name].default_factory is dataclasses.MISSING:
                raise entries.lacks(name, "required")
        elif values[name] is not None:
            read[name] = _value(entries, name, inner)
        elif optional:
            read[name] = None
        else:
            entries.refuse(name, "a value other than null")
    return read


@lru_cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _without_none(hint: Any) -> tuple[Any, bool]:
    """A type, and whether None may stand in its place."""
    if get_origin(hint) not in (Union, types.UnionType):
        return hint, False
    (inner,) = (part for part in get_args(hint) if part is not type(None))
    return inner, True


def _value(entries: Entries, name: str, hint: Any) -> Any:
    if hint is bool:
        return entries.flag(name)
    if hint is int:
        return entries.integer(name, least=-LARGEST)
    if hint is float:
        return entries.number(name)
    if hint is str:
        return entries.text(name)
    if get_origin(hint) is Literal:
        if entries.text(name) not in get_args(hint):
            entries.refuse(name, f"one of {', '.join(get_args(hint))}")
        return entries.text(name)
    return _values(entries, name, get_args(hint)[0])


def _values(entries: Entries, name: str, item: Any) -> tuple[Any, ...]:
    if not isinstance(entries.raw(name), (list, tuple)):
        entries.refuse(name, "a list")
    return tuple(entries.integers(name, least=-LARGEST) if item is int else entries.numbers(name))
