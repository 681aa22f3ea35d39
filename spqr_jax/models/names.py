"""Other formats' tensor names, as tables that are read in both directions, and the source that reads by them.

A row pairs a tensor's name with one or several paths of ours (`embed_tokens`,
`layers.3.q_proj`, ...), and says how its numbers lie. Each weight of the model must
be matched by exactly one tensor of the file; whatever is missing, left over or
misshapen is reported at once, before any weight is read.
"""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from spqr_jax.errors import ModelError
from spqr_jax.files.content import digest_of_files, digest_of_values
from spqr_jax.models.config import DecoderConfig
from spqr_jax.models.finite import advice
from spqr_jax.models.weights import OUTER_NAMES, Block, Outer, block_shapes, weight_shapes


@dataclasses.dataclass(frozen=True)
class Packing:
    """How a tensor holds one or several weights. Both functions must not change types.

    Attributes:
      split: a tensor to the weights in it.
      join: the weights to the tensor.
      in_float32: it changes numbers, and is done before these are rounded.
    """

    split: Callable[[np.ndarray, DecoderConfig], Sequence[np.ndarray]]
    join: Callable[[Sequence[np.ndarray], DecoderConfig], np.ndarray]
    in_float32: bool = False


AS_IT_IS = Packing(lambda tensor, config: [tensor], lambda weights, config: weights[0])


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
      tensor: a name, with ``{layer}`` and ``{expert}`` for numbers.
      paths: ours, with the same, and with ``{every}`` for the numbers of all experts.
      packing: how the tensor holds them.
      when: whether a model has the tensor; None for every model that has the weights.
    """

    tensor: str
    paths: tuple[str, ...]
    packing: Packing = AS_IT_IS
    when: Callable[[DecoderConfig], bool] | None = None


def outer_rows(names: Mapping[str, str]) -> tuple[Row, ...]:
    """Rows of tensors that are weights outside of blocks: tensor -> path."""
    return tuple(Row(tensor, (path,)) for tensor, path in names.items())


def with_biases(names: Mapping[str, str]) -> dict[str, str]:
    """``x`` -> name becomes ``x.weight`` -> name and ``x.bias`` -> name_bias."""
    return {f"{t}.{kind}": name + end for t, name in names.items() for kind, end in (("weight", ""), ("bias", "_bias"))}


def block_rows(
    prefix: str,
    names: Mapping[str, str] | Mapping[str, tuple[str, ...]],
    packing: Packing = AS_IT_IS,
    when: Callable[[DecoderConfig], bool] | None = None,
) -> tuple[Row, ...]:
    """Rows of one packing in every block: tensor, after `prefix`, -> name or names of ours."""
    each = {tensor: (found,) if isinstance(found, str) else found for tensor, found in names.items()}
    return tuple(
        Row(prefix + tensor, tuple("layers.{layer}." + name for name in found), packing, when)
        for tensor, found in each.items()
    )


@dataclasses.dataclass(frozen=True)
class Table:
    """A format's names for a family's weights.

    Attributes:
      rows: of the table. Two may stand for one path, if no file has both.
      prefixes: that names in files may have or lack.
      ignored: regular expressions of tensors that are no weights.
    """

    rows: tuple[Row, ...]
    prefixes: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    def bare(self, tensor: str) -> str:
        """A name without its prefix."""
        for prefix in self.prefixes:
            if tensor.startswith(prefix):
                return tensor.removeprefix(prefix)
        return tensor

    def expand(self, config: DecoderConfig) -> dict[str, Row]:
        """The rows that a model has use for, by tensor, with numbers in place of the braces."""
        known = weight_shapes(config)
        expanded: dict[str, Row] = {}
        for row in self.rows:
            if row.when is not None and not row.when(config):
                continue
            layers = range(config.num_layers) if "{layer}" in row.tensor else (0,)
            experts = range(config.num_experts) if "{expert}" in row.tensor else (0,)
            for layer in layers:
                for expert in experts:
                    put = partial(str.format, layer=layer, expert=expert)
                    paths = [path for each in row.paths for path in _for_every_expert(each, config)]
                    own = Row(put(row.tensor), tuple(put(path) for path in paths), row.packing)
                    if all(path in known for path in own.paths):
                        expanded[own.tensor] = own
        return expanded


def _for_every_expert(path: str, config: DecoderConfig) -> list[str]:
    if "{every}" not in path:
        return [path]
    return [path.replace("{every}", str(expert)) for expert in range(config.num_experts)]


class TensorReader(Protocol):
    """A file (or several) of named tensors, read one at a time."""

    label: str

    def files(self) -> list[Path]:
        """All files that say what `read` gives."""
        ...

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor as `read` gives it, without reading it."""
        ...

    def read(self, name: str, dtype: Any) -> np.ndarray:
        """One tensor in a float type, an array of its own; what was mapped for it is let go."""
        ...


class TensorSource:
    """A `BlockSource` over named tensors, read lazily, block by block.

    A head that is there and differs from the embedding is kept, with a warning, whatever
    `config` says of tying (as transformers and llama.cpp do).

    Raises:
      ModelError: at construction, tensors missing, unexpected or misshapen; on
        reading a part, all of its tensors that hold non-finite values.
    """

    def __init__(self, reader: TensorReader, table: Table, config: DecoderConfig, dtype: Any) -> None:
        config = with_the_head_that_is_there(reader, table, config)
        self._reader, self._config, self._dtype = reader, config, dtype
        self._found = _match(reader, table, config)
        self.note: str | None = getattr(reader, "note", None)  # what the user should know of the tensors
        self.quantized_by: str | None = getattr(reader, "quantized_by", None)

    @property
    def config(self) -> DecoderConfig:
        return self._config

    def identity(self) -> str:
        """SHA-256 of the files' content, with the model's configuration and the type of the weights."""
        return digest_of_values(
            [digest_of_files(self._reader.files()), self._config.to_json(), str(np.dtype(self._dtype))]
        )

    def outer(self) -> Outer:
        return Outer(**self._read({name: name for name in OUTER_NAMES if name in self._found}))

    def block(self, index: int) -> Block:
        kind = self._config.kind(index)
        return Block(self._read({n: f"layers.{index}.{n}" for n in block_shapes(self._config, kind)}), kind)

    def _read(self, paths: dict[str, str]) -> dict[str, jax.Array]:
        names = {path: name for name, path in paths.items()}
        weights: dict[str, jax.Array] = {}
        bad = []
        for tensor, row in dict.fromkeys(self._found[path] for path in names):
            with np.errstate(over="ignore", invalid="ignore"):  # what does not fit is reported below
                value = self._reader.read(tensor, np.float32 if row.packing.in_float32 else self._dtype)
            if not _all_finite(value):
                bad.append(tensor)
            for path, part in zip(row.paths, row.packing.split(value, self._config), strict=True):
                weights[names[path]] = jnp.asarray(part, self._dtype)
        if bad:
            raise ModelError(self._why_not_finite(bad))
        return {name: weights[name] for name in paths}

    def _why_not_finite(self, tensors: Sequence[str]) -> str:
        """Whether the file's own values are not finite, or only their cast to a narrower type."""
        listed = f"{self._reader.label}: {', '.join(tensors)}"
        if all(_all_finite(self._reader.read(tensor, np.float32)) for tensor in tensors):
            return f"{listed}: {np.dtype(self._dtype)} cannot hold some of the values; {advice(self._dtype)}"
        return f"{listed}: some values are not finite: fetch or convert the model again"


def _all_finite(value: np.ndarray) -> bool:
    """A sum of some rows at a time is finite only if all of them are; that takes no memory."""
    rows = value.reshape(len(value), -1) if value.ndim else value.reshape(1, 1)
    step = max(1, (1 << 20) // rows.shape[1])
    return all(np.isfinite(rows[first : first + step]).all() for first in range(0, len(rows), step))


def _in_words(row: Row, parts: tuple[tuple[int, ...], ...]) -> str:
    if row.packing is AS_IT_IS:
        return f"{parts[0]} for {row.paths[0]}"
    return "a tensor that holds " + ", ".join(
        f"{path} {shape}" for path, shape in zip(row.paths[:4], parts, strict=False)
    )


@lru_cache(maxsize=512)
def _joined_shape(packing: Packing, shapes: tuple[tuple[int, ...], ...], config: DecoderConfig) -> tuple[int, ...]:
    """Shape of the tensor that holds weights of these shapes."""
    if packing is AS_IT_IS:
        return shapes[0]
    return packing.join([np.empty(shape, np.int8) for shape in shapes], config).shape


def with_the_head_that_is_there(reader: TensorReader, table: Table, config: DecoderConfig) -> DecoderConfig:
    """The configuration with `tied_head` as the weights have it: a different head in the file goes before the flag."""
    if not config.tied_head:
        return config
    names = {
        row.paths[0]: table.bare(row.tensor) for row in table.rows if row.paths in (("lm_head",), ("embed_tokens",))
    }
    tensors = {table.bare(tensor): tensor for tensor in reader.shapes()}
    head, embedding = (tensors.get(names.get(path, "")) for path in ("lm_head", "embed_tokens"))
    if head is None or embedding is None or _same(reader, head, embedding):
        return config
    warnings.warn(
        f"{reader.label}: the configuration ties the output head to the embedding, but {head} is there and differs "
        f"from {embedding}: {head} is used",
        stacklevel=4,
    )
    return dataclasses.replace(config, tied_head=False)


def _same(reader: TensorReader, first: str, second: str) -> bool:
    shapes = reader.shapes()
    return shapes[first] == shapes[second] and np.array_equal(
        reader.read(first, np.float32), reader.read(second, np.float32)
    )


def _match(reader: TensorReader, table: Table, config: DecoderConfig) -> dict[str, tuple[str, Row]]:
    """Path -> (tensor, row of the table), or every problem in one error."""
    if config.num_layers > len(reader.shapes()):  # names are not made for blocks that cannot be there
        raise ModelError(
            f"{reader.label} holds {len(reader.shapes())} tensors, fewer than the {config.num_layers} blocks of its "
            "configuration: a part of the model is missing, or the configuration belongs to another model"
        )
    expected = weight_shapes(config)
    rows = {table.bare(tensor): row for tensor, row in table.expand(config).items()}
    heads = {table.bare(row.tensor) for row in table.rows if row.paths == ("lm_head",)}
    ignored = re.compile("|".join(table.ignored) or "(?!)")
    found: dict[str, tuple[str, Row]] = {}
    problems = []
    for tensor, shape in reader.shapes().items():
        bare = table.bare(tensor)
        if bare not in rows and tensor in getattr(reader, "spare", ()):
            continue
        if ignored.fullmatch(tensor) or (config.tied_head and bare in heads):
            continue
        if bare not in rows:
            problems.append(f"unexpected tensor {tensor} {shape}")
            continue
        row = rows[bare]
        parts = tuple(expected[path] for path in row.paths)
        if sum(map(math.prod, parts)) != math.prod(shape):  # not joined: they may be too large for any memory
            problems.append(f"tensor {tensor} has shape {shape}, expected {_in_words(row, parts)}")
        elif (wanted := _joined_shape(row.packing, parts, config)) != shape:
            problems.append(f"tensor {tensor} has shape {shape}, expected {wanted} for {', '.join(row.paths)}")
        for path in row.paths:
            if path in found:
                problems.append(f"tensors {found[path][0]} and {tensor} both provide {path}")
            found[path] = (tensor, row)
    problems += [f"missing {path} {shape}" for path, shape in expected.items() if path not in found]
    if problems:
        shown = "\n  ".join(problems[:40]) + (f"\n  ... and {len(problems) - 40} more" if len(problems) > 40 else "")
        raise ModelError(f"{reader.label} does not hold the model that its configuration describes:\n  {shown}")
    return found
