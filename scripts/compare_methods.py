#!/usr/bin/env python3
"""SpQR and the methods it stands against, on one model at equal bits, in one table.

    scripts/compare_methods.py demo --calib IDS.npy --nsamples 16 --seqlen 1024 \\
        --data IDS.npy --windows 10 --eval-seqlen 2048 --bits 3 --group-size 64

Every method sees the same calibration text and fills the same kind of array. Those without
outliers have groups of the same size and 16-bit statistics, so their bits are equal; SpQR is
given the stored bits that they take as its target. A row is quantized in a process of its own
(`spqr quantize`), so seconds and peak memory are that method's, compilation included, and is
then compared with the dense model (`spqr compare`). Rows that are done are kept in OUT and not
run again. Writes table.md and one JSON file a row into OUT.

OBQ takes time in the cube of a row's inputs: matrices of more than 1024 are left to GPTQ. The
methods that learn are given the steps in `spqr_jax.config.DEFAULT_STEPS`, fewer than their papers.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

from kept_rows import file_name, kept_or_made, markdown_table, measured

from spqr_jax import SpQRError
from spqr_jax.terminal.display import console, number, table

METHODS = ("rtn", "gptq", "obq", "adaround", "adaquant", "bit-split", "brecq")


@dataclasses.dataclass(frozen=True)
class Row:
    """One line: its name, and what is said to `spqr quantize`."""

    name: str
    options: str


def rows(bits: int, group_size: int, only: list[str]) -> list[Row]:
    """All rows but SpQR's, whose target is known when these are done."""
    grid = f"--bits {bits} --group-size {group_size} --stats-bits 16"
    return [Row(method, f"--method {method} {grid}") for method in METHODS if method in only]


def run(row: Row, given: argparse.Namespace) -> dict[str, Any]:
    """Quantizes by one method and compares with the dense model."""
    spqr = [sys.executable, "-m", "spqr_jax"]
    with tempfile.TemporaryDirectory(dir=given.out) as folder:
        made, summary, found = (str(Path(folder) / name) for name in ("model", "summary.json", "compared.json"))
        command = [*spqr, "quantize", given.model, "--out", made, "--json", summary, *shlex.split(row.options)]
        command += ["--head-bits", "none"]
        command += [] if row.name == "rtn" else ["--calib", given.calib, "--seed", str(given.seed)]
        command += ["--nsamples", str(given.nsamples), "--seqlen", str(given.seqlen)]
        cost = measured(command)
        command = [*spqr, "compare", given.model, made, "--data", given.data, "--json", found]
        measured([*command, "--seqlen", str(given.eval_seqlen), "--windows", str(given.windows)])
        bits = {key: json.loads(Path(summary).read_text())[key] for key in ("ideal_bits", "stored_bits")}
        return {"row": row.name, "options": row.options, **cost, **bits, **json.loads(Path(found).read_text())}


def kept_or_run(row: Row, given: argparse.Namespace) -> dict[str, Any]:
    """A finished row's result, or a new one."""
    setting = [given.model, given.calib, given.nsamples, given.seqlen, given.seed, given.data, given.windows]
    path = given.out / file_name(row.name, *setting, given.eval_seqlen, row.options)
    return kept_or_made(path, lambda: run(row, given))


COLUMNS = [
    "method",
    "ideal bits",
    "stored bits",
    "perplexity",
    "loss above dense",
    "KL",
    "same top",
    "s",
    "CPU s",
    "GiB",
]


def cells(values: dict[str, Any]) -> list[str]:
    """One line as text."""
    return [
        values["row"],
        number(values["ideal_bits"], 3),
        number(values["stored_bits"], 3),
        number(values["perplexity"]),
        f"{values['loss_increase']:.4f} ± {number(values['loss_increase_stderr'] or float('nan'), 4)}",
        number(values["kl_mean"], 4),
        f"{100 * values['same_top']:.1f}%",
        number(values["wall_seconds"], 0),
        number(values["cpu_seconds"], 0),
        number(values["peak_gib"], 2),
    ]


def write_table(given: argparse.Namespace, done: list[dict[str, Any]]) -> None:
    """table.md."""
    header = (
        f"{given.model} (dense perplexity {done[0]['dense_perplexity']:.2f}); calibrated on {given.nsamples} x "
        f"{given.seqlen} tokens of {given.calib} (seed {given.seed}); compared on {done[0]['windows']} x "
        f"{given.eval_seqlen} tokens of {given.data}."
    )
    (given.out / "table.md").write_text(f"{header}\n\n{markdown_table(COLUMNS, [cells(values) for values in done])}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="demo, a GGUF file, a Hugging Face directory or hub id")
    parser.add_argument("--out", type=Path, default=Path("methods"), help="where results are kept")
    parser.add_argument("--methods", default=",".join(METHODS), help="which, separated by commas; SpQR is always there")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--calib", default="pydoc", help="calibration text; as for spqr quantize")
    parser.add_argument("--data", default="pydoc", help="evaluation text; as for spqr perplexity")
    parser.add_argument("--nsamples", type=int, default=16, help="calibration windows")
    parser.add_argument("--seqlen", type=int, default=1024, help="tokens a calibration window")
    parser.add_argument("--windows", type=int, default=10, help="evaluation windows")
    parser.add_argument("--eval-seqlen", type=int, default=1024, help="tokens an evaluation window")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    only = [name.strip() for name in given.methods.split(",")]
    if unknown := set(only) - set(METHODS):
        raise SpQRError(f"no method {', '.join(sorted(unknown))}: there are {', '.join(METHODS)}")
    given.out.mkdir(parents=True, exist_ok=True)
    done: list[dict[str, Any]] = []
    for row in rows(given.bits, given.group_size, only):
        done.append(kept_or_run(row, given))
        write_table(given, done)
    target = round(max(values["stored_bits"] for values in done), 3)
    done.append(kept_or_run(Row("spqr", f"--target-bits {target}"), given))
    write_table(given, done)
    table(f"{given.model} at {target} stored bits", COLUMNS, [cells(values) for values in done])
    console.print(str(given.out / "table.md"))


if __name__ == "__main__":
    try:
        main()
    except SpQRError as error:
        sys.exit(f"compare_methods: {error}")
