"""`spqr eval`: tasks of the LM Evaluation Harness."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from spqr_jax.cli.display import number, progress_bar, say, table, tell, write_json
from spqr_jax.cli.help import COMPUTATION, flag, option
from spqr_jax.cli.next_step import after_eval
from spqr_jax.cli.options import Dtype, Json, Model
from spqr_jax.cli.outlook import before_eval, say_next
from spqr_jax.integrations import import_harness
from spqr_jax.resolve import open_model
from spqr_jax.stream.blocks import collect

TASKS = "Tasks"
PAPER_TASKS = "winogrande,piqa,hellaswag,arc_easy,arc_challenge"
"""The five tasks of the paper's tables."""


def _checked_seed(seed: int) -> int:
    if seed >= 2**32:  # NumPy's generator takes no more
        raise typer.BadParameter(f"{seed} is not below 2**32")
    return seed


def evaluate(
    model: Model,
    tasks: Annotated[
        str,
        option(
            TASKS, "NAMES", "Tasks or groups of the harness, separated by commas.", show_default="the SpQR paper's 5"
        ),
    ] = PAPER_TASKS,
    limit: Annotated[
        float | None,
        option(TASKS, "N", "Questions per task; below 1, a fraction of the questions.", show_default="all"),
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
        int, option(TASKS, "N", "Seed for the choice of solved examples.", min=0, callback=_checked_seed)
    ] = 0,
    batch_tokens: Annotated[
        int, option(COMPUTATION, "N", "Tokens to compute at the same time, approximately.", min=1)
    ] = 4096,
    dtype: Dtype = None,
    json: Json = None,
) -> None:
    """Score a model on tasks of the LM Evaluation Harness (pip install 'spqr-jax[eval]')."""
    harness = import_harness()
    opened = open_model(model, dtype, say)
    before_eval(opened, tasks, limit, dtype)
    adapter = harness.HarnessModel(
        collect(opened.source), opened.tokenizer(), batch_tokens=batch_tokens, progress=progress_bar
    )
    found = harness.evaluate_tasks(
        adapter,
        [task.strip() for task in tasks.split(",") if task.strip()],
        num_fewshot=num_fewshot,
        limit=int(limit) if limit is not None and limit >= 1 else limit,
        include_path=include_path,
        apply_chat_template=apply_chat_template,
        gen_kwargs=gen_kwargs,
        seed=seed,
    )
    table(model, ["task", "metric", "value", "±", "questions"], task_rows(found))
    tell((f"lm-eval {found['harness']}; ± is the standard error that the harness reports", "dim"))
    write_json(json, {"model": model, "num_fewshot": num_fewshot, "limit": limit, "seed": seed, **found})
    say_next(after_eval(opened, "--tasks", tasks, *(() if limit is None else ("--limit", f"{limit:g}"))))


def task_rows(found: dict[str, Any]) -> list[list[str]]:
    """One line a task and metric of what `evaluate_tasks` returned."""
    rows = []
    for task, metrics in found["results"].items():
        for key, value in metrics.items():
            metric, _, which = key.partition(",")
            if metric.endswith("_stderr") or not isinstance(value, (int, float)) or metric == "sample_len":
                continue
            error = metrics.get(f"{metric}_stderr,{which}")
            shown = metric if which in ("", "none") else f"{metric} ({which})"
            known = isinstance(error, (int, float))
            samples = found["n-samples"].get(task, {}).get("effective", "")
            rows.append([task, shown, number(value, 4), number(error, 4) if known else "", str(samples)])
    return rows
