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
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from spqr_jax.array import SpQRArray
from spqr_jax.config import SpQRConfig
from spqr_jax.errors import CheckpointError, ModelError, SpQRError
from spqr_jax.files import read_json
from spqr_jax.formats.torch_file import SparseTensor, read_torch_file
from spqr_jax.layout import array_layout, column_dtype
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


def array_from_saved(saved: dict[str, Any], bits: int, stats_bits: int, outliers: Outliers = "replaced") -> SpQRArray:
    """One saved matrix.

    Args:
      saved: the dictionary that the original saves.
      bits: of a code.
      stats_bits: of a scale's or zero's code; 16 if they were not quantized.
      outliers: see `Outliers`.

    Raises:
      SpQRError: entries are missing, misshapen or beyond their range.
    """
    try:
        out, inner = (int(n) for n in saved["weight_shape"])
        group_size, perm = int(saved["groupsize"]), np.asarray(saved["perm"], np.int64)
        codes = np.asarray(saved["quant_weights"])
        second_level = len(saved["quant_layer_scale_qq_scale"]) > 0
        if saved["keep_last_columns"]:
            raise SpQRError("columns that were left dense (keep_last_columns) are not supported")
        first = [np.stack([np.ravel(one) for one in saved[f"quant_layer_{kind}"]]) for kind in ("scale", "zeros")]
        second = [
            np.stack([np.ravel(one) for one in saved[f"quant_layer_{kind}_qq_{part}"]], axis=1)
            for kind in ("scale", "zero")
            for part in ("scale", "zero")
            if second_level
        ]
        sparse = saved["outliers_matrix"]
    except (KeyError, TypeError, ValueError) as error:
        raise SpQRError(f"no matrix as the original saves it: {type(error).__name__}: {error}") from None
    if codes.shape != (out, inner) or codes.min() < 0 or codes.max() >= 1 << bits:
        raise SpQRError(f"codes must be [{out}, {inner}] of {bits} bits, are {codes.shape} up to {codes.max()}")
    tile = out // second[0].shape[0] if second_level else 16
    layout = array_layout((out, inner), group_size, tile if second_level else None)
    padded = np.zeros((out, layout.padded_in), np.uint8)
    padded[:, :inner] = codes
    scale_codes = zero_codes = None
    if second_level:
        scale_codes, zero_codes = (_packed_statistics(each, layout.padded_out, stats_bits) for each in first)
        stats = np.stack(second, axis=-1)
    else:
        stats = np.stack([each.T for each in first], axis=-1)
    dense = SpQRArray(
        codes=jnp.asarray(pack_codes(padded, bits)),
        scale_codes=scale_codes,
        zero_codes=zero_codes,
        tile_stats=jnp.asarray(stats.astype(np.float16)),
        outlier_cols=jnp.zeros(1, column_dtype(inner)),
        outlier_values=jnp.zeros(1, jnp.float16),
        outlier_row_ptr=jnp.zeros(out + 1, jnp.int32),
        perm=jnp.asarray(perm.astype(column_dtype(inner))),
        shape=(out, inner),
        bits=bits,
        group_size=group_size,
        stats_group_size=tile,
        scale_bits=stats_bits,
        zero_bits=stats_bits,
        nnz=0,
    ).validate()
    return _with_outliers(dense, sparse, outliers)


def _packed_statistics(codes: np.ndarray, padded_out: int, bits: int) -> Any:
    if codes.min() < 0 or codes.max() >= 1 << bits:
        raise SpQRError(f"scale and zero codes must have {bits} bits, reach from {codes.min()} to {codes.max()}")
    padded = np.zeros((codes.shape[0], padded_out), np.uint8)
    padded[:, : codes.shape[1]] = codes
    return jnp.asarray(pack_codes(padded, bits))


def _with_outliers(array: SpQRArray, sparse: SparseTensor, meaning: Outliers) -> SpQRArray:
    out, inner = array.shape
    indices, values = np.asarray(sparse.indices, np.int64), np.asarray(sparse.values, np.float32)
    if sparse.shape != (out, inner) or indices.shape != (2, len(values)):
        raise SpQRError(f"outliers of shape {sparse.shape} for a matrix {array.shape}")
    order = np.lexsort((indices[1], indices[0]))
    rows, cols, values = indices[0, order], indices[1, order], values[order]
    there = values != 0  # an entry of 0 replaces nothing in the original either
    rows, cols, values = rows[there], cols[there], values[there]
    if len(rows) and (indices.min() < 0 or rows.max() >= out or cols.max() >= inner):
        raise SpQRError(f"outliers lie outside of a matrix {array.shape}")
    if meaning == "replaced":
        values = values - np.asarray(array.to_dense())[:, np.asarray(array.perm)][rows, cols]
    nnz = len(rows)
    if not nnz:
        return array
    return dataclasses.replace(
        array,
        outlier_cols=jnp.asarray(cols.astype(column_dtype(inner))),
        outlier_values=jnp.asarray(values.astype(np.float16)),
        outlier_row_ptr=jnp.asarray(np.searchsorted(rows, np.arange(out + 1)), jnp.int32),
        nnz=nnz,
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
            raise ModelError(f"{folder} is no folder of the original's main.py --save: no {_REST} and {_ARGS} in it")
        values = read_json(base / "config.json")
        family = family_of_hf(values)
        self._folder, self._dtype, self._outliers = folder, dtype, outliers
        self._config = with_named_tokens(family.from_hf(values), base)
        self._rest: dict[str, np.ndarray] = read_torch_file(folder / _REST)
        arguments = read_torch_file(folder / _ARGS)
        if not isinstance(arguments, dict) or "wbits" not in arguments:
            raise ModelError(f"{folder / _ARGS} does not name the bits of a code (wbits)")
        self._bits = int(arguments["wbits"])
        levels = {arguments.get("qq_scale_bits"), arguments.get("qq_zero_bits")}
        if len(levels) > 1:
            raise ModelError(f"{folder}: scales and zeros of different widths {levels} are not supported")
        (level,) = levels
        self._stats_bits = 16 if level is None else int(level)
        self._rows = {path: row for row in family.table.expand(self._config).values() for path in row.paths}
        self._shapes = weight_shapes(self._config)
        self.arguments: dict[str, Any] = arguments

    @property
    def config(self) -> DecoderConfig:
        return self._config

    def settings(self) -> SpQRConfig:
        """How the folder says that it was quantized."""
        given = self.arguments
        return SpQRConfig.reference(
            bits=self._bits,
            group_size=given.get("groupsize"),
            stats_bits=self._stats_bits,
            stats_group_size=given.get("qq_groupsize") or 16,
            outlier_threshold=float(given.get("outlier_threshold", math.inf)),
            damping=float(given.get("percdamp", 1.0)),
            order="activation" if given.get("permutation_order") == "act_order" else "identity",
        )

    def outer(self) -> Outer:
        return Outer(**{name: self._weight(name) for name in outer_shapes(self._config)})

    def block(self, index: int) -> Block:
        kind = self._config.kind(index)
        return Block({n: self._weight(f"layers.{index}.{n}") for n in block_shapes(self._config, kind)}, kind)

    def _weight(self, path: str) -> Any:
        row, shape = self._rows[path], self._shapes[path]
        if row.tensor in self._rest:
            part = row.packing.split(self._rest[row.tensor], self._config)[row.paths.index(path)]
            if part.shape != shape:
                raise ModelError(f"{self._folder / _REST}: {row.tensor} has shape {part.shape}, expected {shape}")
            return jnp.asarray(part, self._dtype)
        return self._quantized(path, row, shape)

    def _quantized(self, path: str, row: Row, shape: tuple[int, ...]) -> SpQRArray:
        layer = path.split(".")[1]
        module = row.tensor.removesuffix(".weight").partition(f".{layer}.")[2]
        file = self._folder / layer / module
        if not file.is_file() or len(row.paths) > 1:
            reason = "several weights in one are not supported" if file.is_file() else f"{file} does not exist"
            raise ModelError(f"{self._folder} lacks {row.tensor}: {reason}")
        try:
            array = array_from_saved(read_torch_file(file), self._bits, self._stats_bits, self._outliers)
        except CheckpointError:
            raise
        except SpQRError as error:
            raise ModelError(f"{file}: {error}") from None
        if array.shape != shape:
            raise ModelError(f"{file} holds a matrix {array.shape}, expected {shape}")
        return array
