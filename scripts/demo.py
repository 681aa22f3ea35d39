"""The comparison that `scripts/demo` shows: each step is a `spqr` command that you can run yourself.

All steps run in this process, so that a later step finds the programs that an earlier one compiled.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from spqr_jax.__main__ import main as run_spqr
from spqr_jax.terminal.display import console, number, size, table, tell

SPQR = Path(sys.executable).with_name("spqr")
CALIBRATION = "--calib pydoc --nsamples 8 --seqlen 1024 --seed 0"
EVALUATION = "--data pydoc --seqlen 1024 --windows 4"
METHODS = {
    "SpQR 4.3 bits": f"--preset 4bit {CALIBRATION}",
    "GPTQ 3-bit g16": f"--method gptq --bits 3 --group-size 16 --head-bits 8 {CALIBRATION}",
    "GPTQ 3-bit g64": f"--method gptq --bits 3 --group-size 64 --head-bits 8 {CALIBRATION}",
    "RTN 3-bit g16": "--method rtn --bits 3 --group-size 16 --head-bits 8",
}
PROMPTS = ["Why is the sky blue? Answer in two sentences.", "Write one sentence about a small but clever robot."]


def spqr(command: str, *extra: str) -> dict[str, Any]:
    """Runs a `spqr` command in view and returns its JSON result."""
    words = [*shlex.split(command), *extra]
    tell(("\n$ ", "bold cyan"), (f"spqr {shlex.join(words)}", "bold"))
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "result.json"
        sys.argv = ["spqr", *words, "--json", str(result)]
        try:
            run_spqr()
        except SystemExit as end:
            if end.code:
                sys.exit("demo: the command above failed; finished models are kept")
        values: dict[str, Any] = json.loads(result.read_text())
        return values


def directory_of(out: Path, name: str) -> Path:
    """Where the model that `name` stands for goes."""
    return out / name.replace(" ", "-").lower()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="where the quantized models go")
    out = parser.parse_args().out
    rows = []
    for name, options in METHODS.items():
        directory = directory_of(out, name)
        if directory.exists():
            shutil.rmtree(directory)
        quantized = spqr(f"quantize demo {options}", "--out", str(directory))
        if not rows:
            for prompt in PROMPTS:
                spqr("generate --chat --max-new-tokens 80", str(directory), "--prompt", prompt)
        measured = spqr(f"perplexity {EVALUATION}", str(directory))
        rows.append((name, quantized, measured))
    dense = spqr(f"perplexity demo {EVALUATION}")
    dense_bytes = rows[0][1]["dense_bytes"]
    lines = [["dense float32", number(dense["perplexity"]), "32", "32", size(dense_bytes), "–"]]
    for name, quantized, measured in rows:
        lines.append(
            [
                name,
                number(measured["perplexity"]),
                number(quantized["ideal_bits"]),
                number(quantized["stored_bits"]),
                size(quantized["bytes"]),
                number(quantized["seconds"], 0),
            ]
        )
    console.print()
    table(
        "SmolLM2-135M-Instruct, quantized in four ways",
        ["", "perplexity", "ideal bits", "stored bits", "size", "seconds"],
        lines,
        notes="RTN: round to nearest. g16: groups of 16. Perplexity on 4 windows of 1024 tokens of pydoc, "
        "calibrated on 8 windows of its other half: little text, so that the demo is short. Bits count the blocks "
        "only. Size is the whole model: its embedding has 8-bit codes in all four (30 MB). Seconds include "
        "compilation; later rows find some programs compiled.",
    )
    command = f"{SPQR} generate {directory_of(out, next(iter(METHODS)))} --chat --prompt 'Hello!'"
    tell("\nTalk to it: ", (command, "bold"))


if __name__ == "__main__":
    main()
