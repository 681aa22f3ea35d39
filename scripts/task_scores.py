"""Zero-shot tasks for the scripts that make tables: a model's scores, and what it gains and loses against another.

Needs the `eval` extra.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spqr_jax import SpQRError
from spqr_jax.evaluate.continuations import PRODUCTS
from spqr_jax.evaluate.paired import paired
from spqr_jax.integrations import import_harness
from spqr_jax.terminal.display import say

METRICS = ("acc_norm,none", "acc,none", "exact_match,none")
"""What counts as a task's score: the first of these that the task has."""

NAMES = {
    "winogrande@validation": "WinoGrande",
    "piqa@validation": "PIQA",
    "hellaswag@validation": "HellaSwag",
    "arc_easy@validation": "ARC easy",
    "arc_challenge@validation": "ARC challenge",
}
"""What tables call the paper's tasks."""

Answers = dict[str, dict[int, float]]
"""By task: each question's score, by the question's number."""


class TaskScores:
    """Tasks that were loaded once, for several models. None if no task was named.

    Args:
      names: of tasks, as for `spqr eval`.
      include_path: folder of task files of the user's.
      limit: questions a task, or below 1 the share of them.
      products: what the factors of the blocks' products are rounded to, as for `spqr eval`.

    Raises:
      SpQRError: the harness is not installed, or there is no such task.
    """

    def __init__(
        self, names: Sequence[str], include_path: str | None = None, limit: float | None = None, products: str = ""
    ) -> None:
        self.limit, self.products = limit, products or "float32"
        self._tasks: Any = None
        if names:  # says now what is missing
            folder = None if include_path is None else Path(include_path)
            self._tasks = import_harness().loaded_tasks(list(names), folder, say)

    def run(self, params: Any, tokenizer: Any) -> Any:
        """A model's `TaskRun`.

        Args:
          params: the model, dense or packed.
          tokenizer: its tokenizer.
        """
        harness = import_harness()
        model = harness.HarnessModel(params, tokenizer, linear=PRODUCTS[self.products])
        return harness.evaluate_tasks(model, self._tasks, num_fewshot=0, limit=self.limit)

    def __bool__(self) -> bool:
        return self._tasks is not None


def metric_of(task: str, metrics: Mapping[str, Any]) -> str:
    """The metric that counts as a task's score.

    Raises:
      SpQRError: the task has none of `METRICS`.
    """
    for name in METRICS:
        if name in metrics:
            return name
    raise SpQRError(f"task {task} has none of the metrics {', '.join(METRICS)}: it has {', '.join(metrics)}")


def scores(run: Any) -> dict[str, tuple[float, float]]:
    """(score, standard error) of each task of a `TaskRun`."""
    values = {}
    for task, metrics in run.values["results"].items():
        name = metric_of(task, metrics)
        error = metrics.get(name.replace(",", "_stderr,"), math.nan)
        values[task] = (metrics[name], error if isinstance(error, float) else math.nan)
    return values


def answers(run: Any) -> Answers:
    """The score of each question of a `TaskRun`."""
    return {task: run.questions[task, metric_of(task, metrics)] for task, metrics in run.values["results"].items()}


def against(dense: Answers, other: Answers) -> dict[str, dict[str, float]]:
    """By task, the fields of `spqr_jax.evaluate.paired.Paired`: `first` is the dense model."""
    return {task: dataclasses.asdict(paired(questions, other[task])) for task, questions in dense.items()}
