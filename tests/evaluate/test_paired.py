"""Two models on the same questions."""

from __future__ import annotations

import numpy as np
import pytest

from spqr_jax.evaluate.paired import mcnemar, paired


def test_differences_of_the_same_questions():
    rng = np.random.default_rng(0)
    first, second = (dict(enumerate(rng.integers(0, 2, 200).astype(float))) for _ in range(2))
    del second[7]  # not answered: does not count
    result = paired(first, second)
    both = [number for number in first if number != 7]
    differences = np.array([second[number] - first[number] for number in both])
    assert result.questions == 199
    assert result.difference == pytest.approx(differences.mean())
    assert result.error == pytest.approx(differences.std(ddof=1) / np.sqrt(199))
    assert (result.lost, result.gained) == ((differences < 0).sum(), (differences > 0).sum())
    assert result.second - result.first == pytest.approx(result.difference)


@pytest.mark.parametrize(
    ("lost", "gained", "p"),
    [(0, 0, 1.0), (5, 5, 1.0), (0, 5, 2 / 32), (1, 9, 2 * 11 / 1024), (9, 1, 2 * 11 / 1024)],
)
def test_mcnemar_is_the_binomial_test(lost, gained, p):
    assert mcnemar(lost, gained) == pytest.approx(p)


def test_thousands_of_flips():
    assert 0 < mcnemar(900, 1100) < 1e-5
    assert mcnemar(1000, 1000) == 1.0
