"""Patterns among the costliest weights, as the paper's section 3.2 names them.

Only the costliest 1% of a matrix's weights are looked at. Were they scattered at random,
each row would hold about 1% of them. A *row* or *column* is a pattern if a tenth of it
is among them, ten times its share. What is left is then looked at by attention head,
three times its share, and, in queries and keys, by rotary pair: dimensions i and i + d/2
of a head are turned together, so they are sensitive together, whichever the head. What
belongs to none of these is unstructured.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

TOP_SHARE = 0.01
_LINE_SHARE = 0.1  # of a row or column among the costliest
_TIMES_SHARE = 3.0  # how many times its share a head or a rotary pair holds
_LEAST_CORRELATION = 0.5  # between a head's two halves, to speak of a rotary pattern

HeadAxis = Literal["rows", "columns"]


@dataclasses.dataclass(frozen=True)
class Structures:
    """What was found in one matrix.

    Attributes:
      top_share: share of the whole cost that the costliest 1% of weights carry.
      rows, columns: indices of those that are patterns.
      heads: indices of attention heads that are, rows and columns left out.
      rotary_correlation: between the halves of a head in how many of the costliest each
        dimension holds, over all heads; None where there are no rotary pairs.
      rotary_pairs: indices i of pairs that are patterns; none where the halves do not correlate.
      shares: share of the costliest weights that lie in ``rows``, ``columns``, ``heads``,
        ``rotary`` and in none, ``unstructured``; each is counted once, in this order.
    """

    top_share: float
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    heads: tuple[int, ...]
    rotary_correlation: float | None
    rotary_pairs: tuple[int, ...]
    shares: dict[str, float]


def find_structures(
    costs: np.ndarray, *, head_dim: int | None = None, head_axis: HeadAxis | None = None, rotary: bool = False
) -> Structures:
    """Finds patterns in the costs [out, in] of a matrix's weights.

    Args:
      costs: such as `sensitivity_map` gives.
      head_dim: dimensions of an attention head; None where there are no heads.
      head_axis: along which axis heads lie: ``rows`` (queries, keys, values) or
        ``columns`` (the attention output).
      rotary: whether rotary embedding turns the rows.
    """
    top = _costliest(costs)
    total, count = float(costs.sum(dtype=np.float64)), int(top.sum())
    top_share = float(costs[top].sum(dtype=np.float64)) / total if total > 0 else 0.0
    left = top.copy()
    counts: dict[str, int] = {}

    def take(name: str, mask: np.ndarray) -> None:
        counts[name] = int((left & mask).sum())
        left[mask] = False

    rows, columns = (np.flatnonzero(top.mean(axis=axis) >= _LINE_SHARE) for axis in (1, 0))
    take("rows", _lines(costs.shape, rows, 0))
    take("columns", _lines(costs.shape, columns, 1))
    heads: np.ndarray = np.array([], int)
    if head_dim is not None and head_axis is not None:
        axis = 0 if head_axis == "rows" else 1
        by_line = left.mean(axis=1 - axis)
        by_head = by_line.reshape(-1, head_dim).mean(axis=1)
        if len(by_head) > 1:
            heads = np.flatnonzero((by_head >= _TIMES_SHARE * by_head.mean()) & (by_head >= TOP_SHARE))
        members = (heads[:, None] * head_dim + np.arange(head_dim)).reshape(-1)
        take("heads", _lines(costs.shape, members, axis))
    correlation, pairs = None, np.array([], int)
    if rotary and head_dim is not None:
        correlation, pairs = _rotary_pairs(left, head_dim)
        half = head_dim // 2
        members = np.arange(costs.shape[0])
        take("rotary", _lines(costs.shape, members[np.isin(members % half, pairs)], 0))
    counts["unstructured"] = int(left.sum())
    return Structures(
        top_share=top_share,
        rows=tuple(rows.tolist()),
        columns=tuple(columns.tolist()),
        heads=tuple(heads.tolist()),
        rotary_correlation=correlation,
        rotary_pairs=tuple(pairs.tolist()),
        shares={name: found / count for name, found in counts.items()},
    )


def _costliest(costs: np.ndarray) -> np.ndarray:
    """bool like `costs`: the costliest 1%, at least one."""
    count = max(1, round(TOP_SHARE * costs.size))
    found = np.zeros(costs.size, bool)
    found[np.argpartition(costs.reshape(-1), -count)[-count:]] = True
    return found.reshape(costs.shape)


def _lines(shape: tuple[int, ...], which: np.ndarray, axis: int) -> np.ndarray:
    """bool of this shape, true in some rows (axis 0) or columns (axis 1)."""
    found = np.zeros(shape, bool)
    if axis == 0:
        found[which] = True
    else:
        found[:, which] = True
    return found


def _rotary_pairs(left: np.ndarray, head_dim: int) -> tuple[float, np.ndarray]:
    """How alike a head's halves are, and the pairs that hold several times their share."""
    profile = left.mean(axis=1).reshape(-1, 2, head_dim // 2).mean(axis=0)  # [halves, pairs]
    first, second = profile - profile.mean(axis=1, keepdims=True)
    size = float(np.sqrt(np.sum(first**2) * np.sum(second**2)))
    correlation = float(np.sum(first * second)) / size if size > 0 else 0.0
    if correlation < _LEAST_CORRELATION:
        return correlation, np.array([], int)
    by_pair = profile.mean(axis=0)
    return correlation, np.flatnonzero((by_pair >= _TIMES_SHARE * by_pair.mean()) & (by_pair >= TOP_SHARE))
