"""Folders that the original implementation writes (``main.py --save``), as models.

FOLDER/<block>/<module> holds one matrix: int8 codes [out, in] in permuted order, and
for each group of columns, in lists, the codes of scales and zeros [out/16, 16] and
their second-level statistics [out/16, 1]. Outliers are kept as *whole* weights and
take the place of the dense ones (its loader), where `SpQRArray` keeps what they add.
FOLDER/not_quantized_weights.pt holds the rest, FOLDER/args.pt the settings.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from spqr_jax.array import SpQRArray
from spqr_jax.config import UNQUANTIZED_STATS_BITS, SpQRConfig
from spqr_jax.errors import CheckpointError, ModelError, SpQRError
from spqr_jax.files.content import digest_of_files, digest_of_values
from spqr_jax.files.entries import Entries, shown
from spqr_jax.files.json_file import read_object
from spqr_jax.formats.dense_part import dense_part
from spqr_jax.formats.torch_file import SparseTensor, read_torch_file
from spqr_jax.layout import array_layout, column_dtype, round_up
from spqr_jax.models.config import DecoderConfig
from spqr_jax.models.families import family_of_hf
from spqr_jax.models.names import Row
from spqr_jax.models.stops import with_named_tokens
from spqr_jax.models.weights import Block, Outer, block_shapes, outer_shapes, weight_shapes
from spqr_jax.packing import pack_codes

Outliers = Literal["replaced", "added"]
"""What a saved outlier does to the dense weight: the folder's own loader replaces it, its converter adds to it."""

_REST, _ARGS = "not_quantized_weights.pt", "args.pt"


def is_legacy(folder: Path) -> bool:
    """Whether a folder looks like one of the original's."""
    return (folder / _REST).is_file() and (folder / _ARGS).is_file()


def array_from_saved(saved: Any, bits: int, stats_bits: int, outliers: Outliers = "replaced") -> SpQRArray:
    """One saved matrix.

    Args:
      saved: what the original saves: a dictionary of tensors.
      bits: of a code.
      stats_bits: of a scale's or zero's code; 16 if they were not quantized.
      outliers: see `Outliers`.

    Raises:
      SpQRError: entries are missing, misshapen or beyond their range.
    """
    if not isinstance(saved, Mapping):
        raise SpQRError(f"{shown(saved)} is not a matrix in the original SpQR format")
    entries = Entries(saved, "the saved matrix", error=SpQRError)
    sizes = entries.integers("weight_shape", least=1)
    if len(sizes) != 2:
        entries.refuse("weight_shape", "two sizes: [out, in]")
    out, inner = sizes
    group_size = entries.integer("groupsize", least=8, most=round_up(inner, 16))
    if entries.maybe_integer("keep_last_columns"):
        raise SpQRError("columns that were left dense (keep_last_columns) are not supported")
    layout = array_layout((out, inner), group_size, None)
    codes = _whole_numbers(entries, "quant_weights", (out, inner), 1 << bits)
    perm = _whole_numbers(entries, "perm", (inner,), inner)
    second_level = isinstance(entries.raw(_SECOND[0]), list) and len(entries.raw(_SECOND[0])) > 0
    first = [_by_groups(entries, name, layout.groups) for name in ("quant_layer_scale", "quant_layer_zeros")]
    if any(each.shape[1] != out for each in first):
        raise SpQRError(
            f"scales and zero points have {[each.shape[1] for each in first]} rows, but the matrix has {out}"
        )
    tile, scale_codes, zero_codes = 16, None, None
    if second_level:
        second = [_by_groups(entries, name, layout.groups) for name in _SECOND]
        tiles = second[0].shape[1]
        if any(each.shape[1] != tiles for each in second) or not tiles or out % tiles or out // tiles < 8:
            raise SpQRError(
                f"the second-level statistics have {[each.shape[1] for each in second]} tiles, which do not fit {out} "
                "rows"
            )
        tile = out // tiles
        layout = array_layout((out, inner), group_size, tile)
        scale_codes, zero_codes = (_packed_statistics(each, layout.padded_out, stats_bits) for each in first)
        stats = np.stack([each.T for each in second], axis=-1)
    else:
        stats = np.stack([each.T for each in first], axis=-1)
    padded = np.zeros((out, layout.padded_in), np.uint8)
    padded[:, :inner] = codes
    with np.errstate(over="ignore"):  # infinities are refused below
        stats = stats.astype(np.float16)
    dense = SpQRArray(
        codes=pack_codes(padded, bits),
        scale_codes=scale_codes,
        zero_codes=zero_codes,
        tile_stats=stats,
        outlier_cols=np.zeros(1, column_dtype(inner)),
        outlier_values=np.zeros(1, np.float16),
        outlier_row_ptr=np.zeros(out + 1, np.int32),
        perm=perm.astype(column_dtype(inner)),
        shape=(out, inner),
        bits=bits,
        group_size=group_size,
        stats_group_size=tile,
        scale_bits=stats_bits,
        zero_bits=stats_bits,
    ).validate()
    return jax.device_put(_with_outliers(dense, codes, entries.raw("outliers_matrix"), outliers))


_SECOND = tuple(f"quant_layer_{kind}_qq_{part}" for kind in ("scale", "zero") for part in ("scale", "zero"))


def _whole_numbers(entries: Entries, name: str, shape: tuple[int, ...], end: int) -> np.ndarray:
    """A tensor of whole numbers from 0 to `end` - 1."""
    value = entries.raw(name)
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu" or value.shape != shape:
        found = (
            f"a tensor of type {value.dtype} and shape {value.shape}" if isinstance(value, np.ndarray) else shown(value)
        )
        raise SpQRError(f"{name} is {found}, expected a tensor of integers of shape {shape}")
    if value.min() < 0 or value.max() >= end:
        raise SpQRError(f"{name} must lie in 0..{end - 1}, but ranges from {value.min()} to {value.max()}")
    return value


def _by_groups(entries: Entries, name: str, groups: int) -> np.ndarray:
    """A list of a tensor for each group of columns, [groups, elements], in float32."""
    values = entries.raw(name)
    arrays = values if isinstance(values, list) else []
    if len(arrays) != groups or not all(isinstance(each, np.ndarray) for each in arrays):
        entries.refuse(name, f"a list of {groups} tensors")
    if len({each.size for each in arrays}) != 1:
        raise SpQRError(f"{name} holds tensors of different sizes")
    return np.stack([each.reshape(-1).astype(np.float32) for each in arrays])


def _packed_statistics(codes: np.ndarray, padded_out: int, bits: int) -> np.ndarray:
    """Codes [groups, rows], which stand there as floats, packed along the rows."""
    if not np.all((codes >= 0) & (codes < 1 << bits)):  # NaN is none either
        raise SpQRError(
            f"scale and zero-point codes must fit in {bits} bits, but range from {codes.min()} to {codes.max()}"
        )
    padded = np.zeros((codes.shape[0], padded_out), np.uint8)
    padded[:, : codes.shape[1]] = codes
    return pack_codes(padded, bits)


def _with_outliers(array: SpQRArray, codes: np.ndarray, sparse: Any, meaning: Outliers) -> SpQRArray:
    """The array with outliers; `codes` [out, in] are its own."""
    out, inner = array.shape
    if not isinstance(sparse, SparseTensor) or sparse.shape != (out, inner):
        found = f"a sparse tensor of shape {sparse.shape}" if isinstance(sparse, SparseTensor) else shown(sparse)
        raise SpQRError(f"the outliers are {found}, but the matrix has shape {array.shape}")
    (rows, cols), values = sparse.indices, sparse.values.astype(np.float32)
    if len(rows) and (min(rows.min(), cols.min()) < 0 or rows.max() >= out or cols.max() >= inner):
        raise SpQRError(f"some outliers are outside the matrix of shape {array.shape}")
    order = np.lexsort((cols, rows))
    order = order[values[order] != 0]  # an entry of 0 replaces nothing in the original either
    rows, cols, values = rows[order], cols[order], values[order]
    if not len(rows):
        return array
    if meaning == "replaced":
        scale, zero = (part[rows, cols // array.group_size] for part in array.statistics())
        values = values - scale * (codes[rows, cols].astype(np.float32) - zero)
    with np.errstate(over="ignore"):  # infinities are refused below
        values = values.astype(np.float16)
    return dataclasses.replace(
        array,
        outlier_cols=cols.astype(column_dtype(inner)),
        outlier_values=values,
        outlier_row_ptr=np.searchsorted(rows, np.arange(out + 1)).astype(np.int32),
    ).validate()


class LegacySource:
    """A `BlockSource` over a folder of the original.

    Args:
      folder: with numbered folders, `args.pt` and `not_quantized_weights.pt`.
      base: a directory with the original model's config.json.
      dtype: of the weights that were not quantized.
      outliers: see `Outliers`.

    Raises:
      CheckpointError: a file is damaged, or asks for anything but tensors and containers.
      ModelError: files that are missing or do not fit the model.
    """

    def __init__(self, folder: Path, base: Path, dtype: Any, outliers: Outliers = "replaced") -> None:
        if not is_legacy(folder):
            raise ModelError(
                f"{folder} was not written by the original SpQR's main.py --save: expected {_REST} and {_ARGS} in it"
            )
        values = read_object(base / "config.json")
        family = family_of_hf(values)
        self._folder, self._dtype, self._outliers = folder, dtype, outliers
        self._config = with_named_tokens(family.from_hf(values), base)
        self._rest = _named_tensors(folder / _REST)
        self.arguments = _arguments(folder / _ARGS)
        self._bits = self.arguments.integer("wbits", least=2, most=8)
        scale_bits, zero_bits = (self.arguments.maybe_integer(f"qq_{kind}_bits", least=1) for kind in ("scale", "zero"))
        if scale_bits != zero_bits:
            raise ModelError(
                f"{folder}: scales ({scale_bits} bits) and zero points ({zero_bits} bits) must have the same width"
            )
        self._stats_bits = UNQUANTIZED_STATS_BITS if scale_bits is None else scale_bits
        self._rows = {path: row for row in family.table.expand(self._config).values() for path in row.paths}
        self._shapes = weight_shapes(self._config)

    @property
    def config(self) -> DecoderConfig:
        return self._config

    def settings(self) -> SpQRConfig:
        """How the folder says that it was quantized.

        Raises:
          SpQRError: entries of another type, or out of range.
        """
        given = self.arguments
        threshold = given.raw("outlier_threshold")
        with given.blamed():
            return SpQRConfig.reference(
                bits=self._bits,
                group_size=given.maybe_integer("groupsize"),
                stats_bits=self._stats_bits,
                stats_group_size=given.maybe_integer("qq_groupsize") or 16,
                outlier_threshold=math.inf if threshold in (None, math.inf) else given.number("outlier_threshold"),
                damping=given.number("percdamp", 1.0),
                order="activation" if given.maybe_text("permutation_order") == "act_order" else "identity",
            )

    def identity(self) -> str:
        """SHA-256 of the files' content, with the model's configuration and how they are read."""
        files = [path for path in self._folder.rglob("*") if path.is_file()]
        names = [str(path.relative_to(self._folder)) for path in sorted(files)]
        how = [str(np.dtype(self._dtype)), self._outliers, self._config.to_json()]
        return digest_of_values([names, digest_of_files(files), how])

    def outer(self) -> Outer:
        return Outer(**{name: self._weight(name) for name in outer_shapes(self._config)})

    def block(self, index: int) -> Block:
        kind = self._config.kind(index)
        return Block({n: self._weight(f"layers.{index}.{n}") for n in block_shapes(self._config, kind)}, kind)

    def _weight(self, path: str) -> Any:
        row, shape = self._rows[path], self._shapes[path]
        if row.tensor in self._rest:
            tensor, label = self._rest[row.tensor], str(self._folder / _REST)
            return dense_part(tensor, row, path, shape, self._config, self._dtype, label)
        return self._quantized(path, row, shape)

    def _quantized(self, path: str, row: Row, shape: tuple[int, ...]) -> SpQRArray:
        if not path.startswith("layers."):
            raise ModelError(f"{self._folder / _REST} lacks {row.tensor}: does the folder belong to another model?")
        layer = path.split(".")[1]
        module = row.tensor.removesuffix(".weight").partition(f".{layer}.")[2]
        file = self._folder / layer / module
        if not file.is_file() or len(row.paths) > 1:
            reason = "several weights in one matrix are not supported" if file.is_file() else f"{file} does not exist"
            raise ModelError(f"{self._folder} lacks {row.tensor}: {reason}")
        try:
            array = array_from_saved(read_torch_file(file), self._bits, self._stats_bits, self._outliers)
        except CheckpointError:
            raise
        except SpQRError as error:
            raise ModelError(f"{file}: {error}") from None
        if array.shape != shape:
            raise ModelError(f"{file} holds a matrix of shape {array.shape}, expected {shape}")
        return array


def _named_tensors(path: Path) -> dict[str, np.ndarray]:
    saved = read_torch_file(path)
    if not isinstance(saved, dict) or not all(isinstance(each, np.ndarray) for each in saved.values()):
        raise ModelError(f"{path} is not a dictionary of named tensors: was it written by the original SpQR?")
    return saved


def _arguments(path: Path) -> Entries:
    saved = read_torch_file(path)
    if not isinstance(saved, dict) or not all(isinstance(name, str) for name in saved):
        raise ModelError(f"{path} is not a dictionary of named options: was it written by the original SpQR?")
    return Entries(saved, str(path))
