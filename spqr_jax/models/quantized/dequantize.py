"""Codes and scales become a dense weight: the arithmetic that all methods share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

_WEIGHTS_AT_ONCE = 1 << 20


@dataclasses.dataclass(frozen=True)
class Grid:
    """Scales (and zeros) of a weight [out, in], each for some rows and some columns.

    Attributes:
      scales: [row groups, column groups], any float type.
      height: rows that share scales.
      columns: int [in], the column group of each column.
      zeros: the codes that mean zero, [row groups, column groups]; None for 0.
    """

    scales: np.ndarray
    height: int
    columns: np.ndarray
    zeros: np.ndarray | None = None


def dequantize(codes: Callable[[int, int], np.ndarray], grid: Grid, shape: tuple[int, int], dtype: Any) -> np.ndarray:
    """(code - zero) * scale in float32, some rows at a time.

    Args:
      codes: rows `first` to `last` of the codes, [last - first, in]; `first` is a multiple of 32.
      grid: scales and zeros.
      shape: [out, in] of the weight.
      dtype: of the result.
    """
    weight = np.empty(shape, dtype)
    step = max(1, _WEIGHTS_AT_ONCE // shape[1] // 32) * 32
    scales = grid.scales.astype(np.float32)
    zeros = None if grid.zeros is None else grid.zeros.astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # whoever reads the weight looks for what is not finite
        for first in range(0, shape[0], step):
            last = min(first + step, shape[0])
            rows = np.arange(first, last) // grid.height
            values = codes(first, last).astype(np.float32)
            if zeros is not None:
                values -= zeros[rows][:, grid.columns]
            values *= scales[rows][:, grid.columns]
            weight[first:last] = values
    return weight


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """Codes out of 32-bit words, along the last axis, the lowest bits first; a code may go on in the next word.

    Args:
      words: int32 [..., n].
      bits: of a code, 1..8.

    Returns:
      uint8 [..., 32 * n // bits].
    """
    data = np.ascontiguousarray(words).view(np.uint8)
    if 8 % bits == 0:
        fields = (data[..., None] >> np.arange(0, 8, bits, dtype=np.uint8)) & np.uint8((1 << bits) - 1)
        return fields.reshape(*words.shape[:-1], -1)
    stream = np.unpackbits(data, axis=-1, bitorder="little")
    whole = stream.shape[-1] // bits * bits
    fields = stream[..., :whole].reshape(*words.shape[:-1], -1, bits)
    return np.packbits(fields, axis=-1, bitorder="little")[..., 0]
