"""What differs between systems."""

from __future__ import annotations

import os

from spqr_jax._compat import few_lapack_threads


def test_lapack_has_one_thread_for_small_matrices_only(monkeypatch):
    variable = "OPENBLAS_NUM_THREADS"
    monkeypatch.setenv(variable, "3")
    few_lapack_threads(576)
    assert os.environ[variable] == "3"  # what the user sets stays
    monkeypatch.delenv(variable)
    few_lapack_threads(11008)
    assert variable not in os.environ
    few_lapack_threads(576)
    assert os.environ[variable] == "1"
