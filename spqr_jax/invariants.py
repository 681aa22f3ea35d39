"""The invariants of `SpQRArray`, which its docstring lists, as checks.

Each function returns the problems as text, an empty list if there are none.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from spqr_jax.layout import leaf_specs


def layout_problems(array: Any) -> list[str]:
    """Leaves of the wrong shape or type, and formats that are not supported."""
    out, inner = array.shape
    if out < 1 or inner < 1:
        return [f"shape {array.shape} has no weights"]
    if not 1 <= array.bits <= 8 or array.group_size < 8 or array.group_size % 8 or array.stats_group_size < 8:
        return [
            f"bits={array.bits}, group_size={array.group_size}, stats_group_size={array.stats_group_size} "
            "is not a supported format"
        ]
    if len(array.outlier_cols.shape) != 1 or array.outlier_cols.shape[0] < 1:
        return [f"outlier_cols should have at least one entry, but has the shape {tuple(array.outlier_cols.shape)}"]
    second_level = array.quantized_stats
    expected = leaf_specs(
        array.shape,
        bits=array.bits,
        group_size=array.group_size,
        stats_group_size=array.stats_group_size,
        stats_bits=(array.scale_bits, array.zero_bits) if second_level else None,
        entries=array.outlier_cols.shape[0],
        permuted=array.perm is not None,
    )
    problems = []
    for name, want in expected.items():
        leaf = getattr(array, name)
        have = None if leaf is None else (tuple(leaf.shape), np.dtype(leaf.dtype))
        if want is None:
            if have is not None:
                problems.append(f"{name} should be absent, but is {have}")
        elif have != (want[0], np.dtype(want[1])):
            problems.append(f"{name} should be {np.dtype(want[1])} {want[0]}, but is {have}")
    return problems


def value_problems(array: Any) -> list[str]:
    """Values that break an invariant; the layout must be right."""
    out, inner = array.shape
    problems = []
    row_ptr = np.asarray(array.outlier_row_ptr)
    cols = np.asarray(array.outlier_cols).astype(np.int64)
    values = np.asarray(array.outlier_values)
    nnz = int(row_ptr[out])
    if row_ptr[0] != 0 or nnz > len(cols) or np.any(row_ptr[1:] < row_ptr[:-1]):  # differences may overflow
        return [f"outlier_row_ptr does not rise from 0 to at most {len(cols)}, the length of outlier_cols"]
    if cols.min() < 0 or cols.max() >= inner:
        problems.append(f"outlier_cols are not all in 0..{inner - 1}")
    if not problems and nnz > 1:
        rising = np.diff(cols[:nnz]) > 0
        first_of_row = np.zeros(nnz + 1, bool)
        first_of_row[row_ptr] = True
        if not np.all(rising | first_of_row[1:nnz]):
            problems.append("outlier_cols do not rise within a row")
    if np.any(values[nnz:] != 0):
        problems.append("an outlier entry past nnz is not zero")
    if not np.all(np.isfinite(values)):
        problems.append("an outlier value is not finite")
    if not np.all(np.isfinite(np.asarray(array.tile_stats))):
        problems.append("a statistic in tile_stats is not finite")
    if array.perm is not None and not np.array_equal(np.sort(np.asarray(array.perm)), np.arange(inner)):
        problems.append("perm is not a permutation")
    return problems
