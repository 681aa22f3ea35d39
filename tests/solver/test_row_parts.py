"""A large matrix that is rounded some rows at a time is the same matrix."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from support.problems import correlated_problem

from spqr_jax import SpQRConfig, SpQRError
from spqr_jax.solver import quantize_weights, row_parts


@pytest.mark.parametrize("rows", [288, 301])  # whole parts, and a last one that is padded
@pytest.mark.parametrize(
    "config", [SpQRConfig.rtn(3, 16), SpQRConfig(target_bits=4.3, head_bits=8).for_head("lm_head")]
)
def test_parts_of_rows_give_the_bytes_of_the_whole(rows, config, monkeypatch):
    w, _ = correlated_problem(rows, 80)
    (whole,) = quantize_weights([w], None, [config])
    shapes = []
    solve_columns = row_parts.columns.solve_columns
    monkeypatch.setattr(row_parts, "ROWS", 144)
    monkeypatch.setattr(
        row_parts.columns, "solve_columns", lambda w, *rest: shapes.append(w.shape) or solve_columns(w, *rest)
    )
    (parts,) = quantize_weights([w], None, [config])
    assert len(shapes) == -(-rows // 144)
    assert len(set(shapes)) == 1  # one program
    for mine, theirs in zip(jax.tree.leaves(parts.array), jax.tree.leaves(whole.array), strict=True):
        assert isinstance(mine, jax.Array)
        np.testing.assert_array_equal(mine, theirs)
    np.testing.assert_array_equal(parts.dense, whole.dense)
    assert parts.stats.output_error == pytest.approx(whole.stats.output_error, rel=1e-6)
    assert dataclasses.replace(parts.stats, output_error=whole.stats.output_error) == whole.stats


def test_a_part_that_is_not_finite_is_an_error(monkeypatch):
    monkeypatch.setattr(row_parts, "ROWS", 32)
    w, _ = correlated_problem(64, 64)
    with pytest.raises(SpQRError, match="values that are not finite"):
        quantize_weights([w.at[40, 3].set(np.nan)], None, [SpQRConfig.rtn(3, 16)])
