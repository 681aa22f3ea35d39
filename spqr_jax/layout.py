"""Sizes of a quantized matrix's parts, and so of the whole, that follow from its shape and settings."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from spqr_jax.errors import SpQRError
from spqr_jax.packing import CODES_PER_RUN, packed_words

MAX_UINT16_COLUMNS = 1 << 16
"""Column indices are uint16 up to this many inputs, int32 above."""


def round_up(size: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `size`."""
    return -(-size // multiple) * multiple


def column_dtype(num_columns: int) -> np.dtype:
    """The smallest index type we store that holds columns 0..num_columns-1."""
    return np.dtype(np.uint16 if num_columns <= MAX_UINT16_COLUMNS else np.int32)


def entry_capacity(nnz: int) -> int:
    """Entries that an outlier list in memory holds for `nnz` outliers: rounded up, by at most 1/8, to few lengths.

    Matrices of one shape then share compiled programs although their outlier counts differ.
    """
    if nnz <= 128:
        return max(round_up(nnz, 16), 16)
    return round_up(nnz, 1 << ((nnz - 1).bit_length() - 4))


@dataclasses.dataclass(frozen=True)
class ArrayLayout:
    """Sizes that follow from a matrix's shape and its quantization.

    Attributes:
      shape: (out, in) of the matrix.
      group_size: inputs a group; one group a row is `in` rounded up to 16.
      padded_out: rows, rounded up to whole tiles (and runs of 16 statistics codes).
      padded_in: columns, rounded up to whole groups and runs of 16 codes.
    """

    shape: tuple[int, int]
    group_size: int
    padded_out: int
    padded_in: int

    @property
    def groups(self) -> int:
        """Groups a row, those of padding alone not counted."""
        return -(-self.shape[1] // self.group_size)


def array_layout(shape: tuple[int, int], group_size: int | None, stats_group_size: int | None) -> ArrayLayout:
    """Derives the padded sizes; `stats_group_size` None means no second level."""
    out, inner = shape
    group = group_size if group_size is not None else round_up(inner, CODES_PER_RUN)
    padded_out = out if stats_group_size is None else round_up(out, math.lcm(stats_group_size, CODES_PER_RUN))
    return ArrayLayout(shape, group, padded_out, round_up(inner, math.lcm(group, CODES_PER_RUN)))


def check_input_shards(inputs: int, group_size: int | None, shards: int) -> None:
    """Refuses ranges of inputs that are not whole groups and whole runs of 16 codes.

    Args:
      inputs: of the matrix.
      group_size: inputs of a group; None for one group per row, which any range may cut.
      shards: equal ranges that the inputs are cut into.

    Raises:
      SpQRError: the ranges are not whole; names the numbers of ranges that fit.
    """
    unit = math.lcm(group_size or CODES_PER_RUN, CODES_PER_RUN)
    if inputs % (shards * unit) == 0:
        return
    groups, rest = divmod(inputs, unit)
    fitting = [1] if rest else [count for count in range(1, groups + 1) if groups % count == 0]
    raise SpQRError(
        f"input_shards={shards} cuts {inputs} inputs into ranges that are not whole groups of {unit}: "
        f"input_shards may be {', '.join(map(str, fitting))} for this matrix"
    )


def leaf_specs(
    shape: tuple[int, int],
    *,
    bits: int,
    group_size: int,
    stats_group_size: int,
    stats_bits: tuple[int, int] | None,
    entries: int,
    permuted: bool,
) -> dict[str, tuple[tuple[int, ...], Any] | None]:
    """Shape and dtype of each leaf; None for one that is absent."""
    out, inner = shape
    layout = array_layout(shape, group_size, stats_group_size if stats_bits else None)
    specs: dict[str, tuple[tuple[int, ...], Any] | None] = {
        "codes": ((out, packed_words(layout.padded_in, bits)), np.uint16),
        "scale_codes": None,
        "zero_codes": None,
        "tile_stats": ((out, layout.groups, 2), np.float16),
        "outlier_cols": ((entries,), column_dtype(inner)),
        "outlier_values": ((entries,), np.float16),
        "outlier_row_ptr": ((out + 1,), np.int32),
        "perm": ((inner,), column_dtype(inner)) if permuted else None,
    }
    if stats_bits is not None:
        for name, width in zip(("scale_codes", "zero_codes"), stats_bits, strict=True):
            specs[name] = ((layout.groups, packed_words(layout.padded_out, width)), np.uint16)
        specs["tile_stats"] = ((layout.padded_out // stats_group_size, layout.groups, 4), np.float16)
    return specs


def predicted_bytes(
    shape: tuple[int, int],
    *,
    bits: int,
    group_size: int | None,
    stats_group_size: int,
    stats_bits: int | None,
    nnz: float,
    permuted: bool,
) -> float:
    """`SpQRArray.nbytes` of a matrix before it is quantized, if it will have `nnz` outliers (a fraction will do).

    `stats_bits` None means no second level.
    """
    specs = leaf_specs(
        shape,
        bits=bits,
        group_size=array_layout(shape, group_size, None).group_size,
        stats_group_size=stats_group_size,
        stats_bits=(stats_bits, stats_bits) if stats_bits else None,
        entries=0,
        permuted=permuted,
    )
    fixed = sum(math.prod(spec[0]) * np.dtype(spec[1]).itemsize for spec in specs.values() if spec is not None)
    return fixed + nnz * bytes_of_outlier(shape[1])


def bytes_of_outlier(inner: int) -> int:
    """Bytes of an outlier's value and column in a matrix with `inner` inputs."""
    return np.dtype(np.float16).itemsize + column_dtype(inner).itemsize
