#!/usr/bin/env python3
"""The SpQR paper's perplexity tables by its protocol, with what it reports beside: for a GPU or TPU host.

    scripts/paper_tables.py llama-7b                     or several of llama-7b llama-65b falcon-7b
    scripts/paper_tables.py --model DIR --calib redpajama   a model of your own, nothing to compare with
    scripts/paper_tables.py --dry-run                    the same steps on the demo model, in minutes, with little text

Protocol: 128 windows of 2048 tokens of RedPajama (LLaMA) or RefinedWeb (Falcon) to calibrate; perplexity over windows
of 2048 tokens of WikiText-2's test text, C4's validation text (256 windows) and Penn Treebank's. Each step is a `spqr`
command, shown before it runs. Finished steps are kept in OUT and not run again, so a run can be stopped and resumed.
Writes table.md into OUT.

The paper's values are those of its WikiText-2 columns that we could check against a second source; where there is a
dash, look into the paper (arXiv 2306.03078, tables 1, 2 and 5). Its bits are those of its formula, "ideal bits" here.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from kept_rows import file_name, kept_or_made, markdown_table, measured
from rich.text import Text

from spqr_jax import SpQRError
from spqr_jax.terminal.display import console, number, table


@dataclasses.dataclass(frozen=True)
class Row:
    """One line: what is said to `spqr quantize` (None: the dense model), and which of the paper's it repeats."""

    name: str
    options: str | None
    repeats: str = ""


ROWS = (
    Row("dense, 16 bits", None, "dense"),
    Row("RTN, 4 bits", "--method rtn --bits 4 --group-size 0", "RTN 4"),
    Row("GPTQ, 4 bits", "--method gptq --bits 4 --group-size 0", "GPTQ 4"),
    Row("SpQR, the original's choices, 4 bits", "--method reference --bits 4", "SpQR 4.6"),
    Row("SpQR, 4 bits", "--bits 4 --outlier-threshold 0.2", "SpQR 4.6"),
    Row("SpQR, 3 bits", "--target-bits 3.94", "SpQR 3.9"),
)


@dataclasses.dataclass(frozen=True)
class Published:
    """A model of the paper: where it is, what calibrates it, and WikiText-2 perplexities (with bits) as reported."""

    model: str
    calib: str
    wikitext2: dict[str, tuple[float, float]]  # row of the paper -> (perplexity, bits)


PAPER = {
    "llama-7b": Published(
        "huggyllama/llama-7b",
        "redpajama",
        {
            "dense": (5.68, 16),
            "RTN 4": (6.43, 4),
            "GPTQ 4": (6.13, 4),
            "SpQR 4.6": (5.73, 4.63),
            "SpQR 3.9": (5.87, 3.94),
        },
    ),
    "llama-65b": Published(
        "huggyllama/llama-65b",
        "redpajama",
        {"dense": (3.53, 16), "SpQR 4.6": (3.57, 4.71), "SpQR 3.9": (3.68, 3.90)},
    ),
    "falcon-7b": Published("tiiuae/falcon-7b", "refinedweb", {"dense": (6.59, 16), "SpQR 4.6": (6.64, 4.44)}),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How much text: (name, windows) of each text measured, windows None for all; and options for every row."""

    nsamples: int
    seqlen: int
    texts: tuple[tuple[str, int | None], ...]
    options: tuple[str, ...] = ()


FULL = Protocol(128, 2048, (("wikitext2", None), ("c4", 256), ("ptb", None)))
DRY = Protocol(2, 128, (("pydoc", 2),), ("--rule", r"layers\.([2-9]|\d\d)\.=skip"))  # two blocks only


def spqr(*words: str) -> dict[str, float]:
    """Runs a `spqr` command in view."""
    console.print(Text.assemble(("$", "bold cyan"), f" spqr {shlex.join(words)}"), soft_wrap=True)
    return measured([sys.executable, "-m", "spqr_jax", *words])


def run(row: Row, model: str, calib: str, protocol: Protocol, out: Path) -> dict[str, Any]:
    """Quantizes, unless that is done, and measures on each text, unless that is done."""
    where, bits = model, {"ideal_bits": 16.0, "stored_bits": 16.0}
    if row.options is not None:
        made = out / "models" / file_name(row.name, model, calib, dataclasses.asdict(protocol), row.options)
        made = made.with_suffix("")
        where = str(made)

        def quantize() -> dict[str, Any]:
            report = out / "summary.json"
            command = ["quantize", model, "--out", where, "--overwrite", "--json", str(report)]
            command += [*shlex.split(str(row.options)), "--nsamples", str(protocol.nsamples)]
            command += ["--seqlen", str(protocol.seqlen)] + ([] if "rtn" in str(row.options) else ["--calib", calib])
            cost = spqr(*command, *protocol.options, "--head-bits", "none")
            values = json.loads(report.read_text())
            report.unlink()
            return {"ideal_bits": values["ideal_bits"], "stored_bits": values["stored_bits"], **cost}

        bits = kept_or_made(made.with_suffix(".json"), quantize)
    found: dict[str, Any] = {"row": row.name, **bits, "texts": {}}
    for text, windows in protocol.texts:

        def measure(text: str = text, windows: int | None = windows) -> dict[str, Any]:
            report = out / "perplexity.json"
            command = ["perplexity", where, "--data", text, "--seqlen", str(protocol.seqlen), "--json", str(report)]
            spqr(*command, *([] if windows is None else ["--windows", str(windows)]))
            values = json.loads(report.read_text())
            report.unlink()
            return values

        setting = [model, calib, dataclasses.asdict(protocol), row.options, text, windows]
        found["texts"][text] = kept_or_made(out / "rows" / file_name(f"{row.name}-{text}", *setting), measure)
    return found


def cells(row: Row, found: dict[str, Any], published: Published | None, protocol: Protocol) -> list[str]:
    """One line as text."""
    paper = (published.wikitext2 if published else {}).get(row.repeats)
    line = [row.name, number(found["ideal_bits"], 3), number(found["stored_bits"], 3)]
    line += [number(found["texts"][text]["perplexity"], 3) for text, _ in protocol.texts]
    return [*line, *(("–", "–") if paper is None else (number(paper[0]), f"{paper[1]:g}"))]


def table_of(name: str, model: str, published: Published | None, calib: str, protocol: Protocol, out: Path) -> str:
    """Runs all rows of a model; its table as Markdown."""
    columns = ["", "ideal bits", "stored bits", *(text for text, _ in protocol.texts), "paper, wikitext2", "its bits"]
    lines = []
    for row in ROWS:
        found = run(row, model, calib, protocol, out)
        lines.append(cells(row, found, published, protocol))
    table(name, columns, lines)
    heading = f"## {name}\n\nCalibrated on {protocol.nsamples} x {protocol.seqlen} tokens of {calib}.\n\n"
    return heading + markdown_table(columns, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of the paper: {', '.join(PAPER)}")
    parser.add_argument("--model", help="a model of your own instead: GGUF file, Hugging Face directory or hub id")
    parser.add_argument("--calib", default="redpajama", help="what calibrates --model")
    parser.add_argument("--dry-run", action="store_true", help="all steps on little text; the demo model by default")
    parser.add_argument("--out", type=Path, default=Path("paper-tables"), help="where results and models are kept")
    given = parser.parse_args()
    if unknown := set(given.names) - set(PAPER):
        raise SpQRError(f"no model {', '.join(sorted(unknown))}: the paper's are {', '.join(PAPER)}; or give --model")
    todo = [(name, PAPER[name].model, PAPER[name], PAPER[name].calib) for name in given.names]
    if given.model or (given.dry_run and not todo):
        todo.append((given.model or "demo", given.model or "demo", None, given.calib))
    if not todo:
        raise SpQRError(f"nothing to do: name {', '.join(PAPER)}, or give --model, or --dry-run")
    protocol = DRY if given.dry_run else FULL
    given.out.mkdir(parents=True, exist_ok=True)
    parts = []
    for name, model, published, calib in todo:
        parts.append(table_of(name, model, published, "pydoc" if given.dry_run else calib, protocol, given.out))
        (given.out / "table.md").write_text("\n".join(parts))
    console.print(str(given.out / "table.md"))


if __name__ == "__main__":
    try:
        main()
    except SpQRError as error:
        sys.exit(f"paper_tables: {error}")
