#!/usr/bin/env python3
"""SpQR and its rivals on one model: KL divergence from the dense model against stored bits, on several texts.

    scripts/rivals_gguf.py dense demo dense.gguf --off-grid
    scripts/rivals.py dense.gguf --calib IDS.npy --nsamples 16 --seqlen 1024 --seeds 0 1 2 \\
        --data prose wikitext2 1024 6 --data code sources.txt 1024 6 --out rivals

All methods quantize the matrices of blocks only and see the same calibration windows, drawn anew for each seed:
llama.cpp reads them as an importance matrix, the mean square of what each matrix reads in the dense model. Bits are
counted from stored bytes, so llama.cpp's larger types for rows that its type does not divide count as what they are.
Methods without text have one seed. A row is quantized in a process of its own, so its seconds, compilation included,
are that method's; for llama.cpp the importance matrix is counted once for each seed, by itself.

`--tasks` also asks the quantized models zero-shot questions, and compares their answers with the dense model's,
question by question (the `eval` extra; names as for `spqr eval`).

Rows that are done are kept in OUT and not run again. Writes table.md, rivals.csv, rivals_tasks.csv and rivals.png into
OUT.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from kept_rows import file_name, kept_or_made, measured
from measured_texts import add_texts, texts_of
from rivals_gguf import stored_bits, tensor_name
from rivals_plot import plot
from rivals_scaled import bits_per_weight
from rivals_table import write_csv, write_table, write_tasks
from task_scores import TaskScores, against, answers

from spqr_jax import SpQRError
from spqr_jax.evaluate.continuations import PRODUCTS
from spqr_jax.evaluate.fidelity import DenseStreams, compare
from spqr_jax.models.decoder import STAGES, Block
from spqr_jax.resolve import OpenedModel, open_model
from spqr_jax.stream import sweep
from spqr_jax.stream.activations import Activations
from spqr_jax.stream.blocks import collect
from spqr_jax.stream.stages import stage_groups
from spqr_jax.stream.windows import batched
from spqr_jax.terminal.display import console, say
from spqr_jax.texts import read_calibration

SCRIPTS = Path(__file__).parent
SPQR_BITS = (2.9, 3.1, 3.4, 3.75, 4.0, 4.3, 4.75, 5.0)
LLAMA_TYPES = (
    "IQ2_M", "Q2_K", "IQ3_XXS", "Q3_K_S", "IQ3_M", "Q3_K_M", "IQ4_XS", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M",
)  # fmt: skip
SCALED = ((3, 64), (3, 32), (4, 64), (4, 32))
"""Bits and group size of the other methods."""
SEEDLESS = ("RTN", "HQQ")


@dataclasses.dataclass(frozen=True)
class Row:
    """A way to quantize.

    Attributes:
      method: its line in the plot.
      name: of the row.
      command: "spqr", "scaled" or "llama.cpp".
      options: said to it.
    """

    method: str
    name: str
    command: str
    options: str


def rows(spqr_bits: Sequence[float] = SPQR_BITS) -> Iterator[Row]:
    """All rows, in the table's order."""
    for bits in spqr_bits:
        yield Row("SpQR", f"SpQR {bits:g}", "spqr", f"--target-bits {bits:g}")
    for bits in spqr_bits:
        yield Row("SpQR, tuned", f"SpQR {bits:g}, tuned", "spqr", f"--target-bits {bits:g} --tune logits")
    yield Row("SpQR, one width", "SpQR, 3 bits, threshold 0.2", "spqr", "--bits 3 --outlier-threshold 0.2")
    for kind in LLAMA_TYPES:
        yield Row("llama.cpp", kind, "llama.cpp", kind)
    for method, name in (("GPTQ", "gptq"), ("RTN", "rtn")):
        for bits, size in SCALED:
            options = f"--method {name} --bits {bits} --group-size {size}"
            yield Row(method, f"{method} {bits} bits, groups of {size}", "spqr", options)
    for method, name in (("AWQ", "awq"), ("HQQ", "hqq")):
        for bits, size in SCALED:
            yield Row(method, f"{method} {bits} bits, groups of {size}", "scaled", f"{name} {bits} {size}")


class Bench:
    """One model, its texts, and what a row is measured with."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.model, self.out = given.model, given.out
        self.calibration = [word for spec in given.calib for word in ("--calib", spec)]
        self.calibration += ["--nsamples", str(given.nsamples), "--seqlen", str(given.seqlen)]
        self._draw = given.calib, given.nsamples, given.seqlen
        self.texts = texts_of(given.data or ())
        self._opened: OpenedModel | None = None
        self._windows: dict[str, np.ndarray] = {}
        self._streams = DenseStreams()
        names = tuple(name.strip() for name in given.tasks.split(",") if name.strip())
        self._questions = TaskScores(names, given.include_path, given.limit, given.products)
        self.asked = {"tasks": names, "limit": given.limit, "products": given.products} if names else {}

    def opened(self) -> OpenedModel:
        """The dense model, opened when it is first needed."""
        if self._opened is None:
            self._opened = open_model(self.model, "float32", say)
        return self._opened

    def compared(self, quantized: OpenedModel) -> dict[str, Any]:
        """A model against the dense one, on each text."""
        results = {}
        for text in self.texts:
            if text.label not in self._windows:
                self._windows[text.label] = text.windows(self.opened())
            dense, windows = self.opened().source, self._windows[text.label]
            results[text.label] = compare(dense, quantized.source, windows, streams=self._streams).to_json()
        return results

    def answered(self, quantized: OpenedModel) -> dict[str, Any]:
        """A model against the dense one, on each task."""
        if not self._questions:
            return {}
        path = self.out / file_name("dense-answers", self.model, self.asked)
        kept = kept_or_made(path, lambda: self._answers_of(self.opened()))
        dense = {task: {int(number): score for number, score in scores.items()} for task, scores in kept.items()}
        return against(dense, self._answers_of(quantized))

    def _answers_of(self, model: OpenedModel) -> dict[str, Any]:
        return answers(self._questions.run(collect(model.source), self.opened().tokenizer()))

    def importance(self, seed: int) -> Path:
        """Mean squares of what each matrix reads in the dense model, kept in a file; GGUF's names."""
        texts, nsamples, seqlen = self._draw
        path = self.out / file_name(f"importance-{seed}", self.model, self._draw).replace(".json", ".npz")
        if path.is_file():
            return path
        windows, _ = read_calibration(texts, self.opened(), seqlen, nsamples, seed)
        source = self.opened().source
        config, values = source.config, {}
        states = Activations(config, source.outer(), batched(windows))

        def visit(index: int, block: Block) -> None:
            for stage in range(len(STAGES)):
                groups = stage_groups(config, block.kind, stage)
                for (names, _), hessian in zip(groups, states.hessians(stage, block), strict=True):
                    squares = np.asarray(jnp.diagonal(hessian.matrix())) / 2  # H = (2/n) X Xᵀ
                    values.update({tensor_name(index, name): squares for name in names})
                states.advance(stage, block)

        sweep.forward(source, visit)
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, **values)
        partial.replace(path)
        return path

    def run(self, row: Row, seed: int) -> dict[str, Any]:
        """Quantizes and compares; the quantized model is not kept."""
        with tempfile.TemporaryDirectory(dir=self.out) as folder:
            out = Path(folder) / ("model.gguf" if row.command == "llama.cpp" else "model")
            if row.command == "spqr":
                summary = Path(folder) / "summary.json"
                command = ["-m", "spqr_jax", "quantize", self.model, "--out", str(out), "--json", str(summary)]
                command += ["--head-bits", "none", *shlex.split(row.options)]
                command += [] if row.method in SEEDLESS else [*self.calibration, "--seed", str(seed)]
                cost = measured([sys.executable, *command])
                bits = {"stored_bits": json.loads(summary.read_text())["stored_bits"]}
            elif row.command == "scaled":
                method, width, size = row.options.split()
                command = [str(SCRIPTS / "rivals_scaled.py"), self.model, str(out), method]
                command += ["--bits", width, "--group-size", size, *self.calibration, "--seed", str(seed)]
                cost = measured([sys.executable, *command])
                bits = {"stored_bits": bits_per_weight(method, int(width), int(size))}
            else:
                command = [str(SCRIPTS / "rivals_gguf.py"), "quantize", self.model, str(out), row.options]
                cost = measured([sys.executable, *command, "--importance", str(self.importance(seed))])
                count, types = stored_bits(out)
                bits = {"stored_bits": count, "types": types}
            quantized = open_model(str(out), "float32", say)
            return {**bits, **cost, "texts": self.compared(quantized), "tasks": self.answered(quantized)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a GGUF file in float32, which llama.cpp reads too")
    parser.add_argument("--calib", action="append", required=True, help="as for spqr quantize; repeatable: a mixture")
    parser.add_argument("--nsamples", type=int, default=16, help="calibration windows")
    parser.add_argument("--seqlen", type=int, default=1024, help="tokens a calibration window")
    add_texts(parser)
    parser.add_argument("--tasks", default="", help="zero-shot tasks, separated by commas; as for spqr eval")
    parser.add_argument("--limit", type=float, help="questions a task, or below 1 the share of them")
    parser.add_argument("--include-path", help="folder of task files of your own")
    parser.add_argument("--products", choices=PRODUCTS, default="float32", help="of the tasks, as for spqr eval")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--spqr-bits", type=float, nargs="+", default=SPQR_BITS, help="stored bits of SpQR, such as a rival's"
    )
    parser.add_argument("--rows", default="", help="regular expression: only rows whose name it matches")
    parser.add_argument("--out", type=Path, default=Path("rivals"), help="where results are kept")
    given = parser.parse_args()
    every = list(rows(given.spqr_bits))
    chosen = [row for row in every if re.search(given.rows, row.name)]
    if not chosen:
        raise SpQRError(f"no row matches {given.rows!r}; rows are: {', '.join(row.name for row in every)}")
    if not (given.data or given.tasks):
        raise SpQRError("nothing to measure: name texts (--data) or tasks (--tasks)")
    given.out.mkdir(parents=True, exist_ok=True)
    bench, done, failed = Bench(given), [], []
    for seed in given.seeds:  # a whole curve from the first seed on
        for row in chosen:
            if row.method in SEEDLESS and seed != given.seeds[0]:
                continue
            setting = [given.model, bench.calibration, [dataclasses.asdict(text) for text in bench.texts]]
            setting += [bench.asked] if bench.asked else []
            path = given.out / file_name(f"{row.name}-{seed}", *setting, dataclasses.asdict(row), seed)
            try:
                values = kept_or_made(path, lambda row=row, seed=seed: dataclasses.asdict(row) | bench.run(row, seed))
            except SpQRError as error:  # the other rows are worth having
                failed.append(f"{row.name}, seed {seed}")
                console.print(f"{failed[-1]}: {error}", markup=False)
                continue
            done.append(values | {"seed": seed})
            figures = [f"KL {label} {text['kl_mean']:.4f}" for label, text in values["texts"].items()]
            figures += [f"{task} {100 * result['difference']:+.1f}" for task, result in values["tasks"].items()]
            line = f"{row.name}, seed {seed}:  {values['stored_bits']:.3f} stored bits   {'   '.join(figures)}"
            console.print(line, markup=False)
            write_csv(given.out / "rivals.csv", done)
            write_tasks(given.out / "rivals_tasks.csv", done)
            write_table(given.out / "table.md", done)
    if done and bench.texts:
        plot(given.out / "rivals.png", done)
    if failed:
        raise SpQRError(f"these rows failed, see above: {'; '.join(failed)}")


if __name__ == "__main__":
    try:
        main()
    except SpQRError as error:
        sys.exit(f"rivals: {error}")
