"""`spqr eval`: tasks of the LM Evaluation Harness."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from spqr_jax.blocks import collect
from spqr_jax.cli.display import number, progress_bar, say, table, tell, write_json
from spqr_jax.cli.next_step import after_eval
from spqr_jax.cli.options import Dtype, Json, Model
from spqr_jax.cli.outlook import before_eval, say_next
from spqr_jax.errors import SpQRError
from spqr_jax.resolve import open_model

PAPER_TASKS = "winogrande,piqa,hellaswag,arc_easy,arc_challenge"
"""The five tasks of the paper's tables."""


def evaluate(
    model: Model,
    tasks: Annotated[
        str, typer.Option(help="Tasks or groups of the harness, separated by commas. Default: the paper's five.")
    ] = PAPER_TASKS,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Worked examples before each question. Default: the task's own number.", min=0)
    ] = None,
    limit: Annotated[float | None, typer.Option(help="Only N questions a task, or below 1 this share of them.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder of task files of your own.")] = None,
    apply_chat_template: Annotated[bool, typer.Option(help="Put questions as a user's messages.")] = False,
    gen_kwargs: Annotated[
        str | None, typer.Option(help="Settings of generation tasks, such as max_gen_toks=64.")
    ] = None,
    batch_tokens: Annotated[int, typer.Option(help="About how many tokens to read at a time.", min=1)] = 4096,
    seed: Annotated[int, typer.Option(help="Of the choice of worked examples.", min=0, max=2**32 - 1)] = 0,
    dtype: Dtype = None,
    json: Json = None,
) -> None:
    """Answer the tasks of EleutherAI's LM Evaluation Harness (pip install 'spqr-jax[eval]')."""
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
    tell((f"lm-eval {found['harness']}; ± is the harness's standard error", "dim"))
    write_json(json, {"model": model, "num_fewshot": num_fewshot, "limit": limit, "seed": seed, **found})
    say_next(after_eval(opened, "--tasks", tasks, *(() if limit is None else ("--limit", f"{limit:g}"))))


def import_harness() -> Any:
    """The adapter's module, which imports the harness.

    Raises:
      SpQRError: the harness is not installed.
    """
    try:
        from spqr_jax.integrations import harness
    except ImportError as error:
        raise SpQRError(f"the LM Evaluation Harness is not there ({error}): pip install 'spqr-jax[eval]'") from None
    return harness


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
