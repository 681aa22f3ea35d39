"""Typed getters for what files say of themselves: config.json, GGUF headers, tokenizer settings, checkpoints' JSON.

Nothing in such a file can be trusted to be there, or to have the type that it should
have. Each getter returns a value of its type or raises one error that names the file,
the key, what was found, what was expected and what to do. `null` is absent, and says
so: an owner's default does not take its place, as transformers has it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from spqr_jax.errors import ModelError, SpQRError

LARGEST = 2**31 - 1
"""Sizes and token ids are 32-bit numbers."""

_SHOWN = 60  # characters of a value in a message


class Entries:
    """Entries of a file by name, with typed getters.

    Args:
      values: as they were read.
      label: the file, for messages.
      defaults: what its owner takes for entries that the file does not name.
      prefix: of the keys, for entries inside an entry.
      error: what is raised.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        label: str,
        *,
        defaults: Mapping[str, Any] | None = None,
        prefix: str = "",
        error: type[SpQRError] = ModelError,
    ) -> None:
        self._values, self._defaults = dict(values), dict(defaults or {})
        self.label, self._prefix, self._error = label, prefix, error

    # ---- what is there --------------------------------------------------------------------------

    def __contains__(self, name: object) -> bool:
        """Whether the file itself has the entry; a default does not count."""
        return self._values.get(str(name)) is not None

    def __iter__(self) -> Iterator[str]:
        return (name for name, value in self._values.items() if value is not None)

    def raw(self, name: str) -> Any:
        """The value as it was read, of any type; its default or None where there is none."""
        return self._values[name] if name in self._values else self._defaults.get(name)

    def to_dict(self) -> dict[str, Any]:
        """The entries of the file as they were read, without defaults."""
        return dict(self._values)

    def changed(self, changes: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> Entries:
        """The same file with other values for some entries, and further defaults below its own."""
        return Entries(
            {**self._values, **changes},
            self.label,
            defaults={**(defaults or {}), **self._defaults},
            prefix=self._prefix,
            error=self._error,
        )

    # ---- one value ------------------------------------------------------------------------------

    def maybe_integer(self, name: str, *, least: int = 0, most: int = LARGEST) -> int | None:
        """A whole number of at least `least` and at most `most`, or None where there is none."""
        value = self.raw(name)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():  # 4096.0, as some programs write it
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            self.refuse(name, f"a whole number from {least} to {most}")
        return value

    def integer(self, name: str, default: int | None = None, *, least: int = 0, most: int = LARGEST) -> int:
        """As :meth:`maybe_integer`; an absent one is `default`, or an error where that is None."""
        return self._given(name, self.maybe_integer(name, least=least, most=most), default, "a whole number")

    def maybe_number(self, name: str, *, least: float = -math.inf) -> float | None:
        """A finite number of at least `least`, or None where there is none."""
        value = self.raw(name)
        if value is None:
            return None
        if not is_number(value) or not math.isfinite(value) or value < least:
            self.refuse(name, "a finite number" + ("" if least == -math.inf else f" of at least {least:g}"))
        return float(value)

    def number(self, name: str, default: float | None = None, *, least: float = -math.inf) -> float:
        """As :meth:`maybe_number`; an absent one is `default`, or an error where that is None."""
        return self._given(name, self.maybe_number(name, least=least), default, "a number")

    def maybe_text(self, name: str) -> str | None:
        """A text, or None where there is none."""
        value = self.raw(name)
        if value is not None and not _is_text(value):
            self.refuse(name, "a string")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """As :meth:`maybe_text`; an absent one is `default`, or an error where that is None."""
        return self._given(name, self.maybe_text(name), default, "a string")

    def maybe_flag(self, name: str) -> bool | None:
        """True or false, or None where there is none."""
        value = self.raw(name)
        if value is not None and not isinstance(value, bool):
            self.refuse(name, "true or false")
        return value

    def flag(self, name: str, default: bool | None = None) -> bool:
        """As :meth:`maybe_flag`; an absent one is `default`, or an error where that is None."""
        return self._given(name, self.maybe_flag(name), default, "true or false")

    # ---- several values -------------------------------------------------------------------------

    def integers(self, name: str, *, least: int = 0, most: int = LARGEST) -> list[int]:
        """Whole numbers; one alone counts as a list of one, an absent entry as an empty list."""
        values = self._list(name)
        for value in values:
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                self.refuse(name, f"whole numbers from {least} to {most}", value)
        return values

    def numbers(self, name: str) -> list[float]:
        """Finite numbers; one alone counts as a list of one, an absent entry as an empty list."""
        values = self._list(name)
        for value in values:
            if not is_number(value) or not math.isfinite(value):
                self.refuse(name, "finite numbers", value)
        return [float(value) for value in values]

    def texts(self, name: str) -> list[str]:
        """Texts; one alone counts as a list of one, an absent entry as an empty list."""
        values = self._list(name)
        for value in values:
            if not _is_text(value):
                self.refuse(name, "strings", value)
        return values

    def nested(self, name: str, defaults: Mapping[str, Any] | None = None) -> Entries:
        """Entries inside an entry; an absent one has none."""
        value = self.raw(name)
        if value is not None and not isinstance(value, Mapping):
            self.refuse(name, "an object with entries")
        return Entries(
            value or {}, self.label, defaults=defaults, prefix=f"{self._prefix}{plain(name)}.", error=self._error
        )

    # ---- errors ---------------------------------------------------------------------------------

    def refuse(self, name: str, expected: str, value: Any = None) -> None:
        """Raises the error of an entry that is there and is not what it should be.

        Args:
          name: of the entry.
          expected: what it should be.
          value: what in it is wrong; None for all of it.
        """
        value = self.raw(name) if value is None else value
        raise self._error(
            f"{self.label}: {self._prefix}{plain(name)} is {shown(value)}, expected {expected}: "
            "correct the entry, or fetch the file again"
        )

    def lacks(self, name: str, expected: str) -> SpQRError:
        """The error of an entry that is absent and has no default."""
        return self._error(
            f"{self.label} lacks {self._prefix}{plain(name)} ({expected}): add the entry, or fetch the file again"
        )

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """Errors that are raised inside name this file, if they do not yet."""
        try:
            yield
        except SpQRError as error:
            if self.label in str(error):
                raise
            raise type(error)(f"{self.label}: {error}") from None

    def _given(self, name: str, value: Any, default: Any, expected: str) -> Any:
        if value is not None:
            return value
        if default is None:
            raise self.lacks(name, expected)
        return default

    def _list(self, name: str) -> list[Any]:
        value = self.raw(name)
        if value is None:
            return []
        if isinstance(value, Mapping):
            self.refuse(name, "a list")
        if isinstance(value, np.ndarray):  # of a GGUF header
            return value.tolist()
        return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]


def _is_text(value: Any) -> bool:
    """Whether a value is text of whole characters; JSON's escapes can stand for halves, which nothing can encode."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_number(value: Any) -> bool:
    """Whether a value is an int or a float, and no bool; one that float can hold."""
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) < 1 << 1000
    return isinstance(value, float)


def plain(name: str) -> str:
    """A name for a message: as it is, if it is short and can be printed."""
    return name if name.isprintable() and len(name) <= _SHOWN else shown(name)


def shown(value: Any) -> str:
    """A value for a message, shortened."""
    if isinstance(value, np.ndarray) and value.ndim != 1:
        return f"an array of type {value.dtype} and shape {value.shape}"
    if isinstance(value, dict) and len(value) > 5:
        return f"an object of {len(value)} entries"
    several = isinstance(value, (list, np.ndarray))
    first = value[:5] if several else value
    if isinstance(first, np.ndarray):
        first = first.tolist()
    if _is_large(first):
        return "a value too large to show"
    try:
        text = " ".join(repr(first).split())
    except (RecursionError, ValueError):  # ValueError: a whole number too long to write
        return "a value nested too deeply or too long to show"
    if several and len(value) > 5:
        text = f"{text[:-1]}, ...] ({len(value)} values)"
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def _is_large(value: Any) -> bool:
    """Whether a thousand values and more would be written, those that stand in several places each time."""
    waiting = [value]
    for _ in range(1000):
        if not waiting:
            return False
        part = waiting.pop()
        if isinstance(part, dict):
            waiting.extend(part.values())
        elif isinstance(part, (list, tuple)):
            waiting.extend(part)
    return True
