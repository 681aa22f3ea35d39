#!/usr/bin/env python3
"""Quantizes one model in several ways and measures each on several texts: the rows of docs/explanation/quality.md.

    scripts/quality.py demo --calib IDS.npy --nsamples 16 --seqlen 1024 \\
        --data "WikiText-2" wikitext2 2048 10 --data "PTB" ptb 2048 3 \\
        --row "--target-bits 4.3" --row "--target-bits 4.3 --tune logits" --out quality

A row is what you would say to `spqr quantize`, which is run for it in a process of
its own: CPU seconds and peak memory are that process's, compilation included. The
first row is the dense model. Rows that are done are kept in OUT and not run again.
Writes table.md and, with every window's loss, one JSON file for each row. `--csv FILE`
writes the rows in the format of benchmarks/results/quality.csv (see quality_csv.py), too.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import shlex
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from kept_rows import file_name, kept_or_made, markdown_table, measured
from measured_texts import Text, add_texts, texts_of
from quality_csv import write_rows

from spqr_jax import SpQRError
from spqr_jax.evaluate.perplexity import perplexity
from spqr_jax.resolve import open_model
from spqr_jax.stream.blocks import collect
from spqr_jax.terminal.display import console, number, say, table

DENSE = "dense"


def quantize(model: str, options: list[str], out: Path) -> dict[str, Any]:
    """Runs `spqr quantize`; returns its summary, CPU and wall seconds and peak GiB."""
    report = out.with_suffix(".json")
    command = [sys.executable, "-m", "spqr_jax", "quantize", model, "--out", str(out), "--json", str(report), *options]
    cost = measured(command)
    summary = json.loads(report.read_text())
    return {name: summary[name] for name in ("ideal_bits", "stored_bits", "outlier_percent")} | cost


def measure(model: str, texts: list[Text]) -> dict[str, Any]:
    """Perplexity on each text, with every window's loss."""
    opened = open_model(model, "float32", say)
    params = collect(opened.source)
    results = {}
    for text in texts:
        result = perplexity(params, text.windows(opened))
        results[text.label] = {
            "perplexity": result.perplexity,
            "stderr": result.stderr,
            "window_losses": result.window_losses.tolist(),
        }
    return results


def run(model: str, row: str, calibration: list[str], texts: list[Text]) -> dict[str, Any]:
    """One row; the quantized model is not kept."""
    if row == DENSE:
        nothing = math.nan
        values = {"ideal_bits": 32.0, "stored_bits": 32.0, "outlier_percent": nothing}
        values |= {"wall_seconds": nothing, "cpu_seconds": nothing, "peak_gib": nothing}
        return values | {"texts": measure(model, texts)}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "model"
        values = quantize(model, calibration + shlex.split(row), out)
        return values | {"texts": measure(str(out), texts)}


def rise(values: dict[str, Any], dense: dict[str, Any], label: str) -> tuple[float, float] | None:
    """Loss above the dense model's on one text, window by window: mean and standard error in nats."""
    ours, theirs = (np.array(row["texts"][label]["window_losses"]) for row in (values, dense))
    difference = ours - theirs
    if values is dense or len(difference) < 2:
        return None
    return float(difference.mean()), float(difference.std(ddof=1) / math.sqrt(len(difference)))


def cells(row: str, values: dict[str, Any], dense: dict[str, Any], texts: list[Text]) -> list[str]:
    """One line of the table."""
    measured = [number(values["texts"][text.label]["perplexity"]) for text in texts]
    sizes = [number(values["ideal_bits"], 3), number(values["stored_bits"], 3)]
    spent = [number(values["cpu_seconds"], 0), number(values["wall_seconds"], 0), number(values["peak_gib"])]
    outliers = [number(values["outlier_percent"])]
    loss = rise(values, dense, texts[0].label)
    return [row, *sizes, *outliers, *measured, f"{loss[0]:+.4f} ± {loss[1]:.4f}" if loss else "–", *spent]


def csv_rows(row: str, values: dict[str, Any], dense: dict[str, Any], texts: list[Text]) -> Iterator[dict[str, str]]:
    """One configuration's rows of the CSV file: one for each text."""
    options = dict(itertools.pairwise(shlex.split(row)))
    calibration = dict(itertools.pairwise(values["calibration"]))
    settings = {"name": row, "model": values["model"], "options": "" if row == DENSE else row, "bits_of": "blocks"}
    settings |= {
        "method": options.get("--method", DENSE if row == DENSE else "spqr"),
        "tuned": options.get("--tune", ""),
    }
    settings |= {"calibration": calibration.get("--calib", ""), "seed": calibration.get("--seed", "")}
    if "--nsamples" in calibration and "--seqlen" in calibration:
        settings["calibration_windows"] = f"{calibration['--nsamples']} x {calibration['--seqlen']}"
    digits = {
        "ideal_bits": 3,
        "stored_bits": 3,
        "outlier_percent": 2,
        "cpu_seconds": 0,
        "wall_seconds": 0,
        "peak_gib": 2,
    }
    settings |= {name: f"{values[name]:.{count}f}" for name, count in digits.items() if not math.isnan(values[name])}
    for text in texts:
        result, loss = values["texts"][text.label], rise(values, dense, text.label)
        losses = {"loss_above_dense": f"{loss[0]:.4f}", "loss_stderr": f"{loss[1]:.4f}"} if loss else {}
        size = f"{len(result['window_losses'])} x {text.seqlen}"
        yield (
            settings | losses | {"text": text.label, "text_windows": size, "perplexity": f"{result['perplexity']:.2f}"}
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="demo, a GGUF file, a Hugging Face directory or hub id")
    parser.add_argument("--row", action="append", required=True, help="options of spqr quantize; repeatable")
    add_texts(parser, required=True)
    parser.add_argument("--out", type=Path, default=Path("quality"), help="where results are kept")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the rows here, too, as CSV")
    for option in ("calib", "nsamples", "seqlen", "seed"):
        parser.add_argument(f"--{option}", help="as for spqr quantize")
    given = parser.parse_args()
    texts = list(texts_of(given.data))
    calibration: list[str] = []
    for option in ("calib", "nsamples", "seqlen", "seed"):
        if (value := getattr(given, option)) is not None:
            calibration += [f"--{option}", value]
    given.out.mkdir(parents=True, exist_ok=True)
    done = []
    for row in [DENSE, *given.row]:
        shared = [] if row == DENSE else calibration
        path = given.out / file_name("row", given.model, row, shared, [dataclasses.asdict(text) for text in texts])
        setting = {"model": given.model, "row": row, "calibration": shared}
        make = partial(run, given.model, row, shared, texts)
        values = kept_or_made(path, lambda setting=setting, make=make: setting | make())
        done.append((row, values))
        found = "   ".join(f"{t.label} {values['texts'][t.label]['perplexity']:.2f}" for t in texts)
        console.print(f"{row}:  {values['stored_bits']:.3f} stored bits   {found}", markup=False)
    columns = ["options", "ideal bits", "stored bits", "outliers %", *(text.label for text in texts)]
    columns += [f"loss above dense, {texts[0].label}", "CPU s", "wall s", "peak GiB"]
    lines = [cells(row, values, done[0][1], texts) for row, values in done]
    title = f"{given.model}, calibrated with `{shlex.join(calibration)}`"
    table(title, columns, lines)
    if given.csv:
        write_rows(given.csv, (line for row, values in done for line in csv_rows(row, values, done[0][1], texts)))
    (given.out / "table.md").write_text(f"{title}\n\n{markdown_table(columns, lines)}")


if __name__ == "__main__":
    try:
        main()
    except SpQRError as error:
        sys.exit(f"quality: {error}")
