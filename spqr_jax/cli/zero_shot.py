"""`spqr eval`: tasks of the LM Evaluation Harness."""

from __future__ import annotations

import dataclasses
import hashlib
import json as json_format
import os
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from spqr_jax.cli.display import EventView, number, say, table, tell, write_json
from spqr_jax.cli.help import COMPUTATION, OUTPUT, flag, option
from spqr_jax.cli.next_step import after_eval
from spqr_jax.cli.options import Dtype, Json, Model
from spqr_jax.cli.outlook import before_eval, say_next
from spqr_jax.errors import ModelError, SpQRError
from spqr_jax.evaluate.continuations import PRODUCTS
from spqr_jax.evaluate.paired import Paired, paired
from spqr_jax.integrations import import_harness
from spqr_jax.integrations.answers import Answers
from spqr_jax.journal.identity import NUMERICS_VERSION
from spqr_jax.models.packaged import is_fetched
from spqr_jax.resolve import OpenedModel, open_model
from spqr_jax.stream.blocks import collect

TASKS = "Tasks"


def _checked_seed(seed: int) -> int:
    if seed >= 2**32:  # NumPy's generator takes no more
        raise typer.BadParameter(f"{seed} is not below 2**32")
    return seed


def evaluate(
    model: Model,
    tasks: Annotated[
        str,
        option(
            TASKS,
            "NAMES",
            "Tasks, separated by commas. paper: the SpQR paper's 5. extended: 7 more. Their questions come from the "
            "package index. Other names are tasks or groups of the harness, from the Hugging Face hub.",
            show_default="paper",
        ),
    ] = "paper",
    limit: Annotated[
        float | None,
        option(
            TASKS,
            "N",
            "Questions per task, drawn at random over the whole task; below 1, a fraction of the questions.",
            show_default="all",
        ),
    ] = None,
    num_fewshot: Annotated[
        int | None,
        option(TASKS, "N", "Solved examples before each question.", min=0, show_default="the task's own number"),
    ] = None,
    include_path: Annotated[Path | None, option(TASKS, "DIR", "Directory with task files of your own.")] = None,
    apply_chat_template: Annotated[
        bool, flag(TASKS, "--apply-chat-template", "Send questions as a user's messages, in the model's chat template.")
    ] = False,
    gen_kwargs: Annotated[
        str | None, option(TASKS, "SETTINGS", "Settings for tasks that generate text, such as max_gen_toks=64.")
    ] = None,
    seed: Annotated[
        int,
        option(TASKS, "N", "Seed for the choice of questions and solved examples.", min=0, callback=_checked_seed),
    ] = 0,
    offline: Annotated[bool, flag(TASKS, "--offline", "Fetch nothing. Say what is missing.")] = False,
    compare: Annotated[
        str | None,
        option(TASKS, "MODEL", "Also score this model, such as the dense one, and compare both question by question."),
    ] = None,
    batch_tokens: Annotated[
        int | None,
        option(
            COMPUTATION,
            "N",
            "Tokens to compute at the same time, approximately.",
            min=1,
            show_default="1024 on a CPU, 4096 on a GPU or TPU",
        ),
    ] = None,
    dtype: Dtype = None,
    products: Annotated[
        str,
        option(
            COMPUTATION,
            "TYPE",
            "Type that the blocks' matrix products round their factors to. bfloat16 is faster on CPUs that have "
            "instructions for it; sums stay float32.",
        ),
    ] = "float32",
    resume: Annotated[
        bool, flag(OUTPUT, "--resume", "Use the answers that a run of the same command left, finished or stopped.")
    ] = False,
    json: Json = None,
) -> None:
    """Score a model on tasks of the LM Evaluation Harness (pip install 'spqr-jax[eval]')."""
    if offline:
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}  # read when the harness is imported
    harness = import_harness()
    names = [task.strip() for task in tasks.split(",") if task.strip()]
    loaded = harness.loaded_tasks(names, include_path, say, offline=offline)
    if products not in PRODUCTS:
        raise SpQRError(f"--products: expected {' or '.join(PRODUCTS)}, got {products!r}")
    settings = {
        "num_fewshot": num_fewshot,
        "limit": int(limit) if limit is not None and limit >= 1 else limit,
        "apply_chat_template": apply_chat_template,
        "gen_kwargs": gen_kwargs,
        "seed": seed,
    }
    runs: dict[str, Any] = {}
    for spec in [model, *([] if compare is None else [compare])]:
        opened = _opened(spec, dtype, offline)
        before_eval(opened, tasks, limit, dtype)
        runs[spec] = _run(harness, opened, loaded, names, settings, batch_tokens, resume, dtype, products)
        show(spec, runs[spec])
        if runs[spec].partial:
            break
    run = runs[model]
    tell((f"lm-eval {run.values['harness']}; ± is the standard error that the harness reports", "dim"))
    values: dict[str, Any] = {
        "model": model,
        "tasks": names,
        "num_fewshot": num_fewshot,
        "limit": limit,
        "seed": seed,
        "products": products,
    }
    values |= run.values
    if compare is not None and compare in runs:
        pairs = compared(runs[compare], run)
        show_compared(compare, model, pairs)
        values |= {"compare": {"model": compare, **runs[compare].values, "paired": [pair_json(pair) for pair in pairs]}}
    write_json(json, values)
    if any(run.partial for run in runs.values()):
        warnings.warn("the answers so far are kept: --resume goes on from them", stacklevel=1)
        raise KeyboardInterrupt
    opened = _opened(model, dtype, offline)
    say_next(after_eval(opened, "--tasks", tasks, *(() if limit is None else ("--limit", f"{limit:g}"))))


def _opened(spec: str, dtype: str | None, offline: bool) -> OpenedModel:
    if offline and not is_fetched(spec):
        raise ModelError(f"the model {spec!r} is not on this machine: run once without --offline, which fetches it")
    return open_model(spec, dtype, say)


def _run(
    harness: Any,
    opened: OpenedModel,
    tasks: Any,
    names: list[str],
    settings: dict[str, Any],
    batch_tokens: int | None,
    resume: bool,
    dtype: str | None,
    products: str,
) -> Any:
    """One model's scores. Its answers are kept in a file whose name depends on all that they depend on."""
    identity = {
        "model": opened.source.identity(),
        "dtype": dtype,
        "tasks": names,
        "numerics": NUMERICS_VERSION,
        **settings,
    }
    if products != "float32":
        identity["products"] = products
    answers = Answers(_answers_file(identity), resume=resume)
    if resume:
        say(f"{len(answers)} answers of {opened.label} are known from an earlier run")
    with EventView() as view:
        adapter = harness.HarnessModel(
            collect(opened.source),
            opened.tokenizer(),
            batch_tokens=batch_tokens,
            events=view,
            answers=answers,
            linear=PRODUCTS[products],
        )
        return harness.evaluate_tasks(adapter, tasks, **settings)


def _answers_file(identity: dict[str, Any]) -> Path:
    import platformdirs  # the platform's own place for caches

    digest = hashlib.sha256(json_format.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    return Path(platformdirs.user_cache_dir("spqr-jax")) / "answers" / f"{digest}.jsonl"


# ---- tables -----------------------------------------------------------------------------


def show(model: str, run: Any) -> None:
    """A table of one model's scores."""
    rows = task_rows(run.values)
    answered = sum(count["effective"] for count in run.values["n-samples"].values())
    title = f"{model}: partial, {answered} of {run.values['asked']} questions" if run.partial else model
    table(title, ["task", "metric", "value", "±", "questions"], rows)


def task_rows(values: dict[str, Any]) -> list[list[str]]:
    """One line a task and metric of `TaskRun.values`; not for the tasks of a group, whose mean is there."""
    rows = []
    subjects = {member for group in values["groups"].values() for member in group if member in values["n-samples"]}
    for task, metrics in values["results"].items():
        if task in subjects:
            continue
        for key, value in metrics.items():
            metric, _, which = key.partition(",")
            if metric.endswith("_stderr") or not isinstance(value, (int, float)) or metric == "sample_len":
                continue
            error = metrics.get(f"{metric}_stderr,{which}")
            shown = metric if which in ("", "none") else f"{metric} ({which})"
            known = isinstance(error, (int, float))
            samples = sum(values["n-samples"][name]["effective"] for name in _members(values, task))
            rows.append([task, shown, number(value, 4), number(error, 4) if known else "", str(samples)])
    return rows


def _members(values: dict[str, Any], name: str) -> list[str]:
    """A task, or the tasks of a group and of the groups in it."""
    if name in values["n-samples"]:
        return [name]
    return [task for member in values["groups"].get(name, []) for task in _members(values, member)]


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two models on one task.

    Attributes:
      task, metric: as the harness names them.
      result: how they compare.
    """

    task: str
    metric: str
    result: Paired


def compared(first: Any, second: Any) -> list[Pair]:
    """Two `TaskRun`s, task by task and metric by metric, where a question's score is 0 or 1."""
    pairs = []
    for (task, metric), scores in first.questions.items():
        other = second.questions.get((task, metric), {})
        if {*scores.values(), *other.values()} <= {0.0, 1.0} and scores.keys() & other.keys():
            pairs.append(Pair(task, metric.removesuffix(",none"), paired(scores, other)))
    return pairs


def show_compared(first: str, second: str, pairs: list[Pair]) -> None:
    """A table of two models, question by question."""
    rows = [
        [
            pair.task,
            pair.metric,
            number(pair.result.first, 4),
            number(pair.result.second, 4),
            f"{pair.result.difference:+.4f}",
            number(pair.result.error, 4),
            str(pair.result.lost),
            str(pair.result.gained),
            f"{pair.result.p:.3g}",
        ]
        for pair in pairs
    ]
    columns = ["task", "metric", first, second, "difference", "±", "lost", "gained", "p"]
    notes = (
        f"difference: {second} less {first}, ± its standard error over the same questions. lost, gained: questions "
        f"that only {first}, or only {second} answers correctly. p: McNemar's exact test."
    )
    table("question by question", columns, rows, notes)


def pair_json(pair: Pair) -> dict[str, Any]:
    """A pair for the JSON file."""
    return {"task": pair.task, "metric": pair.metric, **dataclasses.asdict(pair.result)}
