"""The factor through host memory: as exact as the plain one, and with little on the device."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.problems import correlated_problem

from spqr_jax.solver import blocked_factor
from spqr_jax.solver.hessian import factorize


@pytest.mark.parametrize("by_size", [False, True])
def test_it_is_the_plain_factor_to_rounding(by_size):
    _, x = correlated_problem(8, 200)
    h = 2 / len(x) * x.T @ x
    plain, blocked = (factorize(h, 0.01, by_size, panel=panel) for panel in (None, 48))  # 200 is not a multiple
    if by_size:
        np.testing.assert_array_equal(plain.perm, blocked.perm)
    np.testing.assert_array_equal(plain.shift, blocked.shift)
    order = np.arange(200) if plain.perm is None else plain.perm
    exact = (np.asarray(h, np.float64) + np.diag(np.asarray(plain.shift, np.float64)))[np.ix_(order, order)]
    misses = []
    for factor in (plain, blocked):
        u = np.asarray(factor.u, np.float64)
        assert np.array_equal(u, np.triu(u))
        misses.append(np.linalg.norm(u.T @ u @ exact - np.eye(200)) / np.linalg.norm(u.T @ u) / np.linalg.norm(exact))
    assert misses[1] < 2 * misses[0] + 2e-8


def test_a_matrix_that_is_not_positive_definite_is_damped_more():
    h = jnp.eye(96).at[3, 3].set(-0.5)
    assert factorize(h, 0.01, panel=32).damping == factorize(h, 0.01).damping > 0.01


def test_the_device_holds_panels_only():
    rows, panel = 4096, 256
    matrix = jax.ShapeDtypeStruct((rows, panel), jnp.float32)
    first = jax.ShapeDtypeStruct((), jnp.int32)
    for program, arguments in (
        (blocked_factor._less, (matrix, matrix, first)),
        (blocked_factor._factored, (matrix, first)),
        (blocked_factor._eliminated, (matrix, matrix, first)),
    ):
        memory = jax.jit(program.__wrapped__, donate_argnums=0).lower(*arguments).compile().memory_analysis()
        held = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
        assert held <= 6 * 4 * rows * panel, program.__name__


class _Device:
    def __init__(self, stats):
        self.stats = stats

    def memory_stats(self):
        return self.stats


def test_it_is_for_matrices_that_do_not_fit():
    assert blocked_factor.fits_plainly(10**6, _Device(None))  # a CPU does not tell
    free = {"bytes_limit": 16 * 10**9, "bytes_in_use": 2 * 10**9}
    assert blocked_factor.fits_plainly(16384, _Device(free))
    assert not blocked_factor.fits_plainly(28672, _Device(free))
