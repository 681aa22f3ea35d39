"""One quantized module of a model: its tensors, looked at one by one, and the dense weight that they stand for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from spqr_jax.errors import ModelError
from spqr_jax.files.safetensors_file import SafetensorsReader

FLOATS = ("F16", "BF16", "F32", "F64")
FLOAT8 = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
WORDS = ("I32",)


@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """A dense weight that several tensors stand for.

    Attributes:
      shape: dense, [out, in].
      read: dequantizes it, in the type given.
      form: what was kept of it, in words: "4 bits, groups of 128".
      as_described: whether the tensors have the form that the model's configuration names.
    """

    shape: tuple[int, ...]
    read: Callable[[Any], np.ndarray]
    form: str
    as_described: bool = True


class Module:
    """A quantized module's tensors by the last part of their names (`qweight`, `scales`, ...).

    Args:
      reader: of all tensors.
      name: of the module.
      method: that quantized it, for messages.
      parts: the parts that the module has.
    """

    def __init__(self, reader: SafetensorsReader, name: str, method: str, parts: Collection[str]) -> None:
        self.name, self._reader, self._method, self._parts = name, reader, method, set(parts)

    def __contains__(self, part: str) -> bool:
        return part in self._parts

    def kind(self, part: str) -> str:
        return self._reader.kinds()[f"{self.name}.{part}"]

    def shape(self, part: str, expected: str, kinds: Collection[str]) -> tuple[int, ...]:
        """Shape of a part that must be there.

        Args:
          part: such as `qweight`.
          expected: what it should be, in words.
          kinds: types that it may have.
        """
        if part not in self._parts:
            raise self.problem(f"lacks {self.name}.{part} ({expected})")
        shape, kind = self._reader.shapes()[f"{self.name}.{part}"], self.kind(part)
        if kind not in kinds:
            raise self.problem(f"has {part} of the type {kind}, expected {' or '.join(kinds)} ({expected})")
        return shape

    def matrix(self, part: str, expected: str, kinds: Collection[str]) -> tuple[int, int]:
        """As :meth:`shape`, of a part that must be a matrix."""
        shape = self.shape(part, expected, kinds)
        if len(shape) != 2 or 0 in shape:
            raise self.unfit(part, f"a matrix ({expected})")
        return shape[0], shape[1]

    def check(self, part: str, expected: tuple[int, ...], kinds: Collection[str]) -> None:
        """A part must be there and have this shape."""
        if self.shape(part, f"shape {expected}", kinds) != expected:
            raise self.unfit(part, str(expected))

    def read(self, part: str) -> np.ndarray:
        return self._reader.read(f"{self.name}.{part}")

    def groups_of_inputs(self, part: str, inputs: int, size: int, groups: int, neighbours: bool = True) -> np.ndarray:
        """The group of each input, int [inputs].

        Args:
          part: that says it, if the module has it. Zeros alone mean neighbours (as exllamav2's `ext.py` has it), and
            so does -1 (compressed-tensors' `lifecycle/forward.py`).
          inputs: of the weight.
          size: inputs of a group where neighbours make one.
          groups: that there are.
          neighbours: whether neighbours may make a group where several groups are.
        """
        order = self.read(part) if part in self else np.zeros(0, np.int32)
        if not order.any() or (order == -1).any():
            if groups > 1 and not neighbours:
                raise self.problem(f"has no order in {part}, which desc_act requires")
            return np.arange(inputs) // size
        if order.min() < 0 or order.max() >= groups:
            raise self.problem(f"has groups {order.min()} to {order.max()} in {part}, expected 0 to {groups - 1}")
        return order

    def unfit(self, part: str, expected: str) -> ModelError:
        """The error of a part with the wrong shape."""
        shape = self._reader.shapes()[f"{self.name}.{part}"]
        return self.problem(f"has {part} of shape {shape}, expected {expected}")

    def problem(self, what: str) -> ModelError:
        """An error that names the module and its method; `what` is its predicate."""
        return ModelError(
            f"{self._reader.label}: {self.name} is quantized with {self._method}, but it {what}: fetch the model "
            "again, or give the original dense model"
        )


QuantizedModules = tuple[dict[str, Module], dict[str, QuantizedWeight]]
"""Quantized modules, and their weights, by the names of the modules."""


def find_modules(
    reader: SafetensorsReader, method: str, parts: Collection[str], if_any: Collection[str]
) -> dict[str, Module]:
    """Modules by name.

    Args:
      reader: of all tensors.
      method: that quantized the model.
      parts: that a quantized module may have.
      if_any: that only quantized modules have.
    """
    groups: dict[str, set[str]] = {}
    for tensor in reader.shapes():
        name, _, part = tensor.rpartition(".")
        if part in parts:
            groups.setdefault(name, set()).add(part)
    return {name: Module(reader, name, method, present) for name, present in groups.items() if present & set(if_any)}


def tensors_of(modules: Mapping[str, Module], parts: Collection[str]) -> frozenset[str]:
    """The names of all parts of the modules."""
    return frozenset(f"{name}.{part}" for name, module in modules.items() for part in parts if part in module)
