"""`spqr perplexity` and `spqr compare`: what a model predicts, alone and beside the dense one."""

from __future__ import annotations

import math
from typing import Annotated, Any

import numpy as np

from spqr_jax.cli.display import EventView, number, say, table, tell, write_json
from spqr_jax.cli.help import COMPUTATION, TEXT, argument, option
from spqr_jax.cli.next_step import after_compare, after_perplexity
from spqr_jax.cli.options import Data, Dtype, Json, Model, SeqLen
from spqr_jax.cli.outlook import before_compare, before_perplexity
from spqr_jax.data import evaluation_windows
from spqr_jax.evaluate.fidelity import Fidelity
from spqr_jax.evaluate.fidelity import compare as compare_models
from spqr_jax.evaluate.perplexity import perplexity as measure_perplexity
from spqr_jax.resolve import MODEL_HELP, OpenedModel, open_model
from spqr_jax.texts import default_corpus, read_tokens

Windows = Annotated[int | None, option(TEXT, "N", "Use only the first N windows.", min=1, show_default="all")]
BatchSize = Annotated[int, option(COMPUTATION, "N", "Windows to compute at the same time.", min=1)]


def perplexity(
    model: Model,
    data: Data = None,
    seqlen: SeqLen = 2048,
    windows: Windows = None,
    against: Annotated[
        str | None,
        option(
            "Comparison", "MODEL", "The dense model. Also show how far the predictions differ from its predictions."
        ),
    ] = None,
    batch_size: BatchSize = 1,
    dtype: Dtype = None,
    json: Json = None,
) -> None:
    """Measure a model's perplexity on a text."""
    opened = open_model(model, dtype, say)
    dense = None if against is None else open_model(against, dtype, say)
    data = data or default_corpus()
    tokens = _windows(opened, data, seqlen, windows)
    if dense is not None and against is not None:
        outlook = before_compare(dense, opened, tokens, data, batch_size, dtype)
        result = _compare(dense, opened, tokens, batch_size)
        tell(
            "perplexity ",
            (f"{result.perplexity:.4f}", "bold"),
            f" ± {number(result.perplexity_stderr, 4)} on {data}, "
            f"{result.windows} windows of {tokens.shape[1]} tokens, {result.seconds:.1f} s\n"
            f"{against}: {result.dense_perplexity:.4f}; ratio {result.perplexity_ratio:.4f} ± "
            f"{number(result.perplexity_ratio_stderr, 4)}, KL {result.kl_mean:.4f} nats, "
            f"same top token {100 * result.same_top:.2f}%",
        )
        write_json(json, result.to_json() | _setting(model, data, tokens) | {"against": against})
        outlook.end(after_compare(against, model))
        return
    outlook = before_perplexity(opened, tokens, data, batch_size, dtype)
    with EventView() as events:
        alone = measure_perplexity(opened.source, tokens, batch_size=batch_size, events=events)
    tell(
        "perplexity ",
        (f"{alone.perplexity:.4f}", "bold"),
        f" ± {number(alone.stderr, 4)} on {data}, {alone.windows} windows of {tokens.shape[1]} tokens, "
        f"{alone.seconds:.1f} s",
    )
    write_json(
        json,
        {
            "perplexity": alone.perplexity,
            "stderr": alone.stderr,
            "tokens": alone.tokens,
            "windows": alone.windows,
            "seconds": alone.seconds,
            "window_losses": alone.window_losses.tolist(),
            **_setting(model, data, tokens),
        },
    )
    limit = [] if windows is None else ["--windows", windows]
    outlook.end(after_perplexity(opened, "--data", data, "--seqlen", tokens.shape[1], *limit))


def compare(
    dense: Annotated[str, argument("DENSE", f"The dense model: {MODEL_HELP}.")],
    quantized: Annotated[str, argument("QUANTIZED", "The model that was made from it.")],
    data: Data = None,
    seqlen: SeqLen = 2048,
    windows: Windows = None,
    batch_size: BatchSize = 1,
    dtype: Dtype = None,
    json: Json = None,
) -> None:
    """Compare a quantized model's predictions with the dense model's, token by token."""
    reference, opened = open_model(dense, dtype, say), open_model(quantized, dtype, say)
    data = data or default_corpus()
    tokens = _windows(reference, data, seqlen, windows)
    outlook = before_compare(reference, opened, tokens, data, batch_size, dtype)
    result = _compare(reference, opened, tokens, batch_size)
    title = f"{quantized} compared with {dense}: {result.windows} windows of {tokens.shape[1]} tokens of {data}"
    table(title, ["", "", "±"], fidelity_rows(result))
    text = "±: standard error over the windows. Sure: the dense model gives its top token at least 50%."
    tell((f"{text} {result.tokens} tokens predicted in {result.seconds:.1f} s.", "dim"))
    write_json(json, result.to_json() | _setting(quantized, data, tokens) | {"against": dense})
    outlook.end(after_compare(dense, quantized))


def fidelity_rows(result: Fidelity) -> list[list[str]]:
    """The table of `spqr compare`: what, value, standard error."""

    def percent(share: float, digits: int = 2) -> str:
        return f"{100 * share:.{digits}f}%" if math.isfinite(share) else "–"

    rows = [
        ["perplexity", number(result.perplexity, 4), number(result.perplexity_stderr, 4)],
        ["perplexity, dense", number(result.dense_perplexity, 4), ""],
        ["perplexity ratio", number(result.perplexity_ratio, 5), number(result.perplexity_ratio_stderr, 5)],
        ["loss increase, nats per token", f"{result.loss_increase:+.5f}", number(result.loss_increase_stderr, 5)],
        ["KL divergence, mean, nats per token", number(result.kl_mean, 5), number(result.kl_stderr, 5)],
    ]
    names = {50.0: "median"}
    for which, value in result.kl_percentiles.items():
        rows.append([f"KL divergence, {names.get(which, f'{which:g}%')}", number(value, 5), ""])
    rows += [
        ["KL divergence, largest", number(result.kl_max, 4), ""],
        ["same top token", percent(result.same_top), percent(result.same_top_stderr)],
        [f"  where the dense model is sure ({percent(result.sure, 0)})", percent(result.same_top_sure), ""],
        ["flips", percent(result.flips), ""],
        ["  right before, wrong now", percent(result.lost), ""],
        ["  wrong before, right now", percent(result.gained), ""],
        ["Δp of the true token, mean", f"{100 * result.delta_p_mean:+.3f}%", ""],
        ["Δp, root mean square", percent(result.delta_p_rms, 3), ""],
    ]
    for which, value in result.delta_p_percentiles.items():
        rows.append([f"Δp, {names.get(which, f'{which:g}%')}", f"{100 * value:+.3f}%", ""])
    return rows


def _windows(opened: OpenedModel, data: str, seqlen: int, count: int | None) -> np.ndarray:
    return evaluation_windows(read_tokens(data, "evaluation", opened), seqlen, count, data, opened.first_token)


def _compare(dense: OpenedModel, opened: OpenedModel, tokens: np.ndarray, batch_size: int) -> Fidelity:
    with EventView() as events:
        return compare_models(dense.source, opened.source, tokens, batch_size=batch_size, events=events)


def _setting(model: str, data: str, tokens: np.ndarray) -> dict[str, Any]:
    return {"model": model, "data": data, "seqlen": int(tokens.shape[1])}
