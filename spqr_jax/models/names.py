"""Other formats' tensor names, as tables, and the source that reads by them.

A table maps a regular expression to a path of ours (`embed_tokens`,
`layers.3.q_proj`, ...) and, where the numbers differ, a transform. Each tensor of
the model must be matched by exactly one tensor of the file; whatever is missing,
left over or misshapen is reported at once, before any weight is read.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from spqr_jax.errors import ModelError
from spqr_jax.models.config import DecoderConfig
from spqr_jax.models.decoder import Block, Outer, abstract_decoder

Transform = Callable[[np.ndarray, DecoderConfig], np.ndarray]

OUTER_NAMES = tuple(field.name for field in dataclasses.fields(Outer))
BLOCK_NAMES = tuple(field.name for field in dataclasses.fields(Block))


@dataclasses.dataclass(frozen=True)
class Name:
    """One row of a table.

    Attributes:
      pattern: matches the whole name in the file.
      path: ours, with ``\\1`` for the pattern's groups; None to leave the tensor out.
      transform: applied to the tensor as read.
    """

    pattern: str
    path: str | None
    transform: Transform | None = None


class TensorReader(Protocol):
    """A file (or several) of named tensors, read one at a time."""

    label: str

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor as `read` gives it, without reading it."""
        ...

    def read(self, name: str) -> np.ndarray:
        """One tensor, in a float type."""
        ...


def weight_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Path and shape of every weight of a model."""
    abstract = abstract_decoder(config)
    shapes = {name: getattr(abstract.outer, name) for name in OUTER_NAMES}
    for index, block in enumerate(abstract.layers):
        shapes |= {f"layers.{index}.{name}": getattr(block, name) for name in BLOCK_NAMES}
    return {path: tuple(spec.shape) for path, spec in shapes.items() if spec is not None}


class TensorSource:
    """A `BlockSource` over named tensors, read lazily, block by block.

    Raises:
      ModelError: at construction, tensors missing, unexpected or misshapen; on
        reading a part, all of its tensors that hold non-finite values.
    """

    def __init__(self, reader: TensorReader, table: Sequence[Name], config: DecoderConfig, dtype: Any) -> None:
        self._reader, self._config, self._dtype = reader, config, dtype
        self._found = _match(reader, table, config)

    @property
    def config(self) -> DecoderConfig:
        return self._config

    def outer(self) -> Outer:
        return Outer(**self._read({name: name for name in OUTER_NAMES}))

    def block(self, index: int) -> Block:
        return Block(**self._read({name: f"layers.{index}.{name}" for name in BLOCK_NAMES}))

    def _read(self, paths: dict[str, str]) -> dict[str, jax.Array | None]:
        weights: dict[str, jax.Array | None] = {}
        bad = []
        for name, path in paths.items():
            if path not in self._found:  # an absent head; anything else was refused above
                weights[name] = None
                continue
            tensor, row = self._found[path]
            value = self._reader.read(tensor)
            if not np.all(np.isfinite(value)):
                bad.append(tensor)
            if row.transform is not None:
                value = row.transform(value, self._config)
            weights[name] = jnp.asarray(value, self._dtype)
        if bad:
            raise ModelError(f"{self._reader.label}: tensors with values that are not finite: {', '.join(bad)}")
        return weights


def _match(reader: TensorReader, table: Sequence[Name], config: DecoderConfig) -> dict[str, tuple[str, Name]]:
    """Path -> (tensor, row of the table), or every problem in one error."""
    expected = weight_shapes(config)
    found: dict[str, tuple[str, Name]] = {}
    problems = []
    for tensor, shape in reader.shapes().items():
        rows = [(row, match) for row in table if (match := re.fullmatch(row.pattern, tensor))]
        if len(rows) != 1:
            problems.append(f"unexpected tensor {tensor} {shape}")
            continue
        row, match = rows[0]
        path = None if row.path is None else match.expand(row.path)
        if path is None or (path == "lm_head" and config.tied_head):
            continue
        if path not in expected:
            problems.append(f"unexpected tensor {tensor} {shape}: the configuration has no {path}")
        elif expected[path] != shape:
            problems.append(f"tensor {tensor} has shape {shape}, expected {expected[path]}")
        elif path in found:
            problems.append(f"tensors {found[path][0]} and {tensor} are both {path}")
        else:
            found[path] = (tensor, row)
    mentioned = {path for path in expected for problem in problems if path in problem}
    problems += [
        f"missing {path} {shape}" for path, shape in expected.items() if path not in found and path not in mentioned
    ]
    if problems:
        shown = "\n  ".join(problems[:40]) + (f"\n  ... and {len(problems) - 40} more" if len(problems) > 40 else "")
        raise ModelError(f"{reader.label} does not hold the model that its configuration describes:\n  {shown}")
    return found
