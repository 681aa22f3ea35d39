#!/usr/bin/env python3
"""The questions researchers ask of SpQR, answered on one model in one table.

    scripts/ablations.py demo                                  all rows (an hour or two on two cores)
    scripts/ablations.py demo --quick                          the main rows on little text (under 15 minutes)
    scripts/ablations.py demo --paper --seeds 0 1 2 --tasks paper --limit 400 \\
        --data WikiText-2 wikitext2 2048 10 --data PTB ptb 2048 3

Each row differs from SpQR's defaults in one thing, or is another method. `--paper` runs the paper's two ablations
only: outliers removed, and 16-bit statistics in place of the second level. Rows that are done are kept in OUT and not
run again, so a run can be stopped and resumed. Writes table.md, table.csv and perplexity_by_bits.png into OUT.

`--seeds` draws the calibration windows anew for each seed; ± is then the standard deviation over the seeds, else the
standard error over windows or questions. `--tasks` adds a column for each zero-shot task (the `eval` extra; names as
for `spqr eval`).
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from ablations_table import BASE, DENSE, columns, lines, plot, write_tables
from kept_rows import file_name, kept_or_made
from measured_texts import Text, add_texts, texts_of
from task_scores import TaskScores, scores

from spqr_jax import SpQRConfig, SpQRError
from spqr_jax.data import calibration_windows
from spqr_jax.evaluate.continuations import PRODUCTS
from spqr_jax.evaluate.perplexity import perplexity
from spqr_jax.job.job import Job
from spqr_jax.quantized import quantized_leaves
from spqr_jax.resolve import OpenedModel, open_model
from spqr_jax.stream.blocks import TreeSink, collect
from spqr_jax.stream.windows import batched
from spqr_jax.terminal.display import console, say, table
from spqr_jax.texts import default_corpus, read_tokens


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
      question: what it asks.
      name: of the row.
      config: the configuration that answers; None for the dense model.
      quick: whether `--quick` runs it.
      paper: whether it belongs to the paper's ablations.
    """

    question: str
    name: str
    config: SpQRConfig | None
    quick: bool = False
    paper: bool = False


def rows() -> list[Row]:
    """All rows, in the table's order."""

    def spqr(**changes: Any) -> SpQRConfig:
        return dataclasses.replace(SpQRConfig(), **changes)

    plain: dict[str, Any] = {"stats_bits": 16}
    return [
        Row("", DENSE, None, True, True),
        Row("", BASE, spqr(), True, True),
        Row("outliers", "no outliers", spqr(outlier_threshold=math.inf), True, True),
        Row("outliers", "simplified (no leave-one-out)", spqr(leave_one_out=False), True),
        *(Row("outliers", f"tau {tau:g}", spqr(outlier_threshold=tau), tau == 1) for tau in (0.05, 0.1, 0.5, 1.0)),
        Row("statistics", "16-bit statistics (plain groups)", spqr(**plain), True, True),
        Row("statistics", "standard: one group a row, 16-bit", spqr(group_size=None, **plain), True, True),
        *(Row("statistics", f"{bits}-bit statistics", spqr(stats_bits=bits), bits == 2) for bits in (2, 4)),
        *(Row("group size", f"groups of {size}", spqr(group_size=size), size == 32) for size in (8, 32, 64, 128)),
        Row("order", "identity order", spqr(order="identity"), True),
        Row("order", "all of a block's inputs dense", spqr(sequential=False)),
        Row("fit", "min-max fit", spqr(fit="minmax"), True),
        Row("fit", "the original's choices", SpQRConfig.reference()),
        *(Row("bits", f"{bits} bits", spqr(bits=bits), True) for bits in (2, 4)),
        *(
            Row("budget", f"{name}, a threshold for each weight", spqr(target_bits=4.15, bit_choices=widths), quick)
            for name, widths, quick in (("2 to 4 bits", (2, 3, 4), True), ("3 bits", (3,), False))
        ),
        Row("other methods", "GPTQ 3-bit g16", SpQRConfig.gptq(3, 16), True),
        Row("other methods", "GPTQ 3-bit g64", SpQRConfig.gptq(3, 64)),
        Row("other methods", "GPTQ 4-bit g64", SpQRConfig.gptq(4, 64)),
        Row("other methods", "RTN 3-bit g16", SpQRConfig.rtn(3, 16), True),
        Row("other methods", "RTN 4-bit g16", SpQRConfig.rtn(4, 16)),
    ]


@dataclasses.dataclass(frozen=True)
class Setup:
    """What all rows share; it is part of every kept result's name."""

    model: str
    calib: str
    nsamples: int
    seqlen: int
    texts: tuple[Text, ...]
    tasks: tuple[str, ...] = ()
    limit: float | None = None
    include_path: str | None = None
    products: str | None = None


class Bench:
    """The dense model and what is read with it."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.opened: OpenedModel = open_model(setup.model, "float32", say)
        self._tasks = TaskScores(setup.tasks, setup.include_path, setup.limit, setup.products or "")
        self._calibration = read_tokens(setup.calib, "calibration", self.opened)
        self._windows = {text.label: text.windows(self.opened) for text in setup.texts}

    def run(self, row: Row, seed: int) -> dict[str, Any]:
        """Quantizes (unless dense) and measures."""
        begun = time.perf_counter()
        values: dict[str, Any] = {"question": row.question, "row": row.name, "seed": seed}
        sizes = {"ideal_bits": 32.0, "stored_bits": 32.0, "outlier_percent": 0.0}
        params = collect(self.opened.source) if row.config is None else self._quantized(row.config, seed, sizes)
        values |= sizes | {"seconds": time.perf_counter() - begun, "texts": {}}
        for label, windows in self._windows.items():
            result = perplexity(params, windows)
            losses = result.window_losses.tolist()
            figures = {"perplexity": result.perplexity, "stderr": result.stderr, "window_losses": losses}
            values["texts"][label] = figures
        tasks = scores(self._tasks.run(params, self.opened.tokenizer())) if self._tasks else {}
        return values | {"tasks": tasks}

    def _quantized(self, config: SpQRConfig, seed: int, sizes: dict[str, float]) -> Any:
        """The quantized model; `sizes` is given its bits."""
        setup, arrays = self.setup, []
        windows = calibration_windows(
            self._calibration, setup.seqlen, setup.nsamples, seed, setup.calib, self.opened.first_token
        )
        sink = TreeSink(self.opened.source.config)
        Job(self.opened.source, sink, batched(windows), config).run()
        params = sink.params()
        for block in params.layers:
            arrays += quantized_leaves(block)
        size = sum(array.size for array in arrays)
        sizes["ideal_bits"] = sum(array.ideal_bits * array.size for array in arrays) / size
        sizes["stored_bits"] = 8 * sum(array.stored_bytes for array in arrays) / size
        sizes["outlier_percent"] = 100 * sum(array.nnz for array in arrays) / size
        return params


def kept_path(out: Path, setup: Setup, row: Row, seed: int) -> Path:
    """A file whose name changes with anything that changes the result. The dense model has no seed."""
    settings = {name: value for name, value in dataclasses.asdict(setup).items() if value not in (None, ())}
    drawn = [] if row.config is None else [seed]
    return out / "rows" / file_name(row.name, settings, row.config and row.config.to_json(), *drawn)


def run_all(bench: Bench, todo: list[Row], seeds: list[int], out: Path) -> dict[str, list[dict[str, Any]]]:
    """Each row's results, seed by seed; those that are kept are read."""
    done: dict[str, list[dict[str, Any]]] = {}
    for index, row in enumerate(todo):
        done[row.name] = []
        for seed in seeds[:1] if row.config is None else seeds:
            path = kept_path(out, bench.setup, row, seed)
            values = kept_or_made(path, partial(bench.run, row, seed))
            done[row.name].append(values)
            figures = "   ".join(f"{label} {text['perplexity']:.2f}" for label, text in values["texts"].items())
            console.print(
                f"{index + 1:3d}/{len(todo)}  {row.name:<36} seed {seed}   perplexity {figures}   "
                f"{values['stored_bits']:6.3f} stored bits   {values['seconds']:5.0f} s",
                markup=False,
            )
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="demo, a GGUF file, a Hugging Face directory or hub id")
    parser.add_argument("--quick", action="store_true", help="fewer rows, less text")
    parser.add_argument("--paper", action="store_true", help="only the paper's two ablations")
    parser.add_argument("--out", type=Path, default=Path("ablations"), help="where results are kept")
    parser.add_argument("--calib", help="calibration text; as for spqr quantize")
    add_texts(parser)
    parser.add_argument("--nsamples", type=int, help="calibration windows")
    parser.add_argument("--seqlen", type=int, help="tokens a calibration window")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", default="", help="regular expression: only rows whose name it matches (and SpQR)")
    parser.add_argument("--tasks", default="", help="zero-shot tasks, separated by commas; as for spqr eval")
    parser.add_argument("--limit", type=float, help="questions a task, or below 1 the share of them")
    parser.add_argument("--include-path", help="folder of task files of your own")
    parser.add_argument("--products", choices=PRODUCTS, help="of the tasks, as for spqr eval; float32 if not given")
    given = parser.parse_args()
    corpus = (given.calib and given.data) or default_corpus()
    nsamples, seqlen, windows, eval_seqlen = (4, 512, 8, 512) if given.quick else (16, 1024, 10, 2048)
    asked = given.data or [(str(corpus), str(corpus), str(eval_seqlen), str(windows))]
    setup = Setup(
        given.model,
        given.calib or str(corpus),
        given.nsamples or nsamples,
        given.seqlen or seqlen,
        texts_of(asked),
        tuple(task.strip() for task in given.tasks.split(",") if task.strip()),
        int(given.limit) if given.limit is not None and given.limit >= 1 else given.limit,
        given.include_path,
        given.products,
    )
    todo = [row for row in rows() if (row.quick or not given.quick) and (row.paper or not given.paper)]
    todo = [row for row in todo if row.name == BASE or row.config is None or re.search(given.rows, row.name)]
    done = run_all(Bench(setup), todo, given.seeds, given.out)
    seeds = ", ".join(map(str, given.seeds))
    text = "; ".join(f"{text.count} x {text.seqlen} tokens of {text.label}" for text in setup.texts)
    title = f"{setup.model}; calibrated on {setup.nsamples} x {setup.seqlen} tokens of {setup.calib} (seeds {seeds})"
    table(f"Ablations on {setup.model}", columns(done), lines(done))
    write_tables(given.out, f"{title}; perplexity on {text}.", done)
    plot(given.out, setup.model, done)
    console.print(f"{given.out}/table.md, table.csv, perplexity_by_bits.png")


if __name__ == "__main__":
    try:
        main()
    except SpQRError as error:
        sys.exit(f"ablations: {error}")
