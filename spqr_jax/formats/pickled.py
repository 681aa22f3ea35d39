"""Pickles as data: a small language that is read opcode by opcode, never run.

Python's own unpickler calls what a pickle names, and even with nothing harmful to call, a
short pickle can make it fill the memory or hash for hours. This reader knows containers,
numbers, texts, references to storages, and calls of the functions that it is given; it keeps
nothing but what stands in the pickle, so its memory is bounded by the pickle's size.
Opcodes are explained in Python's `pickletools`.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from typing import Any

from spqr_jax.errors import CheckpointError

Function = Callable[..., Any]

_PUSHES = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_NUMBERS_AND_TEXTS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "BINSTRING", "SHORT_BINSTRING"),
}
_EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_PUTS, _GETS = {"PUT", "BINPUT", "LONG_BINPUT"}, {"GET", "BINGET", "LONG_BINGET"}
_IGNORED = {"PROTO", "FRAME"}
_MARK = object()


class Name:
    """A global name that is no function: a storage type or a dtype."""

    def __init__(self, name: str) -> None:
        self.name = name


def read_pickle(data: bytes, functions: Mapping[str, Function], names: Mapping[str, Name], load: Function) -> Any:
    """What a pickle holds.

    Args:
      data: the pickle.
      functions: that it may call, by ``module.name``; they check what they are given.
      names: that it may mention.
      load: given what a persistent reference holds, what it refers to.

    Raises:
      CheckpointError: damaged, or it does anything else.
    """
    machine = _Machine(functions, names, load)
    opcodes = pickletools.genops(data)
    while True:
        try:
            opcode, argument, _ = next(opcodes)
        except Exception:  # StopIteration, ValueError, struct.error, UnicodeError, ...
            raise CheckpointError("its pickle is cut off or invalid: is the file damaged?") from None
        if opcode.name == "STOP":
            return machine.pop()
        machine.do(opcode.name, argument)


class _Machine:
    """A stack, and what was remembered of it."""

    def __init__(self, functions: Mapping[str, Function], names: Mapping[str, Name], load: Function) -> None:
        self._functions, self._names, self._load = functions, names, load
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def pop(self) -> Any:
        """The last value."""
        if not self._stack or self._stack[-1] is _MARK:
            raise CheckpointError("its pickle uses a value where there is none: is the file damaged?")
        return self._stack.pop()

    def do(self, name: str, argument: Any) -> None:
        """Carries out one opcode."""
        push = self._stack.append
        if name in _NUMBERS_AND_TEXTS:
            push(argument)
        elif name in _PUSHES:
            push(_PUSHES[name])
        elif name in _EMPTY:
            push(_EMPTY[name]())
        elif name == "MARK":
            push(_MARK)
        elif name in _TUPLES:
            push(tuple([self.pop() for _ in range(_TUPLES[name])][::-1]))
        elif name in _PUTS or name == "MEMOIZE":
            self._memo[len(self._memo) if name == "MEMOIZE" else argument] = self._last()
        elif name in _GETS:
            if argument not in self._memo:
                raise CheckpointError("its pickle refers to a value that it does not contain: is the file damaged?")
            push(self._memo[argument])
        elif name in ("POP", "POP_MARK"):
            marked = bool(self._stack) and self._stack[-1] is _MARK
            self._from_mark() if name == "POP_MARK" or marked else self.pop()
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            push(self._named(".".join(argument.split(" ")) if name == "GLOBAL" else self._stack_name()))
        elif name == "BINPERSID":
            push(self._load(self.pop()))
        elif name == "REDUCE":
            arguments, function = self.pop(), self.pop()
            if not callable(function) or not isinstance(arguments, tuple):
                raise CheckpointError("its pickle calls something that is not a function: is the file damaged?")
            push(function(*arguments))
        elif name not in _IGNORED:
            self._fill(name)

    def _fill(self, name: str) -> None:
        """Opcodes that make or fill containers."""
        if name in ("TUPLE", "LIST", "DICT"):
            values = self._from_mark()
            self._stack.append(tuple(values) if name == "TUPLE" else values if name == "LIST" else _pairs(values))
        elif name in ("APPEND", "APPENDS"):
            values = [self.pop()] if name == "APPEND" else self._from_mark()
            if not isinstance(self._last(), list):
                raise CheckpointError("its pickle appends to something that is not a list: is the file damaged?")
            self._last().extend(values)
        elif name in ("SETITEM", "SETITEMS"):
            values = [self.pop(), self.pop()][::-1] if name == "SETITEM" else self._from_mark()
            if not isinstance(self._last(), dict):
                raise CheckpointError(
                    "its pickle sets an item of something that is not a dictionary: is the file damaged?"
                )
            self._last().update(_pairs(values))
        else:
            raise CheckpointError(f"its pickle uses the operation {name}, but only building containers is allowed")

    def _last(self) -> Any:
        self._stack.append(value := self.pop())
        return value

    def _from_mark(self) -> list[Any]:
        """The values since the last mark, which is taken away."""
        for index in range(len(self._stack) - 1, -1, -1):
            if self._stack[index] is _MARK:
                values = self._stack[index + 1 :]
                del self._stack[index:]
                return values
        raise CheckpointError("its pickle ends a list that it never started: is the file damaged?")

    def _stack_name(self) -> str:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise CheckpointError("its pickle asks for an object whose name is not a string")
        return f"{module}.{name}"

    def _named(self, name: str) -> Any:
        if name in self._functions:
            return self._functions[name]
        if name in self._names:
            return self._names[name]
        raise CheckpointError(f"it asks for {name[:100]!r}, which is not part of a saved tensor")


def _pairs(values: list[Any]) -> dict[Any, Any]:
    """A dictionary. Its keys are texts and numbers: those of others could take for ever to hash."""
    keys = values[::2]
    if len(values) % 2 or not all(isinstance(key, (str, int, float, type(None))) for key in keys):
        raise CheckpointError(
            "its pickle has a dictionary with keys that are not strings or numbers: is the file damaged?"
        )
    return dict(zip(keys, values[1::2], strict=True))
