"""Two models on the same questions: is one really better?"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Paired:
    """Scores of two models on the same questions.

    Attributes:
      questions: how many both answered.
      first, second: mean scores.
      difference: second - first.
      error: standard error of the difference, from the questions' own differences.
      lost, gained: questions that only the first, or only the second model answers correctly: the flips.
      p: McNemar's exact p-value: how likely a split of the flips is that is as uneven or more, were both models equally
        good.
    """

    questions: int
    first: float
    second: float
    difference: float
    error: float
    lost: int
    gained: int
    p: float


def paired(first: Mapping[int, float], second: Mapping[int, float]) -> Paired:
    """Compares two models' scores, 0 or 1 for each question.

    Args:
      first, second: score by the question's number. Questions that only one model answered do not count.
    """
    both = sorted(first.keys() & second.keys())
    differences = [second[question] - first[question] for question in both]
    count = len(both)
    mean = math.fsum(differences) / count if count else math.nan
    spread = math.fsum((value - mean) ** 2 for value in differences)
    error = math.sqrt(spread / (count - 1) / count) if count > 1 else math.nan
    lost, gained = (sum(bool(sign * value > 0) for value in differences) for sign in (-1, 1))
    means = [math.fsum(scores[number] for number in both) / count if count else math.nan for scores in (first, second)]
    return Paired(count, means[0], means[1], mean, error, lost, gained, mcnemar(lost, gained))


def mcnemar(lost: int, gained: int) -> float:
    """Two-sided exact p-value of McNemar's test, where each flip goes either way with probability 1/2."""
    flips = lost + gained
    tail = sum(math.comb(flips, count) for count in range(min(lost, gained) + 1))
    return min(1.0, 2 * tail / 2**flips)
