"""The `spqr` command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from spqr_jax.checkpoint import CheckpointSource
from spqr_jax.cli.bench import bench
from spqr_jax.cli.display import describe_head, number, size, table, tell, write_json
from spqr_jax.cli.examples import EXAMPLES, START
from spqr_jax.cli.exchange import export, import_original
from spqr_jax.cli.generate import generate
from spqr_jax.cli.help import EXCHANGE, MAKE, MEASURE, USE, PlainTyper, argument, flag
from spqr_jax.cli.main import run
from spqr_jax.cli.measure import compare, perplexity
from spqr_jax.cli.options import Json
from spqr_jax.cli.quantize import quantize
from spqr_jax.cli.report import analyze, report
from spqr_jax.cli.version import show_version
from spqr_jax.cli.zero_shot import evaluate
from spqr_jax.inspection import summarize
from spqr_jax.terminal.models import describe_products

app = PlainTyper(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Compress large language models to 3–4 bits per weight and run them, in JAX.",
    epilog=START,
)


@app.callback()
def settings(
    version: Annotated[
        bool,
        flag(
            None,
            "--version",
            "Show the versions of spqr-jax, JAX and Python, and the device.",
            is_eager=True,
            callback=show_version,
        ),
    ] = False,
) -> None:
    """What `spqr` takes before a command."""


def inspect(
    directory: Annotated[Path, argument("MODEL", "A directory that spqr wrote.")],
    json: Json = None,
) -> None:
    """Check a quantized model's files, and show each weight's bits, outliers and error.

    For a model with experts, also show how many calibration tokens each weight read.
    """
    source = CheckpointSource(directory)
    summary = summarize(source)
    with_tokens = bool(source.config.num_experts)
    rows = [
        [
            path,
            f"{layer['shape'][0]}×{layer['shape'][1]}",
            str(layer["bits"]),
            number(layer["ideal_bits"], 3),
            number(layer["stored_bits"], 3),
            f"{layer['outlier_percent']:.2f}%",
            number(layer["output_error"], 4),
            *(["–" if layer["tokens"] is None else f"{layer['tokens']:.0f}"] if with_tokens else []),
        ]
        for path, layer in summary["layers"].items()
    ]
    columns = ["weight", "shape", "code bits", "ideal bits", "stored bits", "outliers", "output error"]
    table(str(directory), [*columns, "tokens"] if with_tokens else columns, rows)
    tell(
        f"Quantized weights: {summary['stored_bits']:.3f} stored bits per weight (ideal: {summary['ideal_bits']:.3f}), "
        f"{summary['outlier_percent']:.2f}% outliers; {describe_head(summary)}.\n"
        f"Size in memory: {size(summary['bytes'])}: {size(summary['quantized_bytes'])} quantized, "
        f"{size(summary['bytes'] - summary['quantized_bytes'])} dense. "
        f"The dense model: {size(summary['dense_bytes'])}. "
        f"On disk, arrays compressed, with all files: {size(summary['disk_bytes'])}.\n"
        f"SHA-256 of the content: {summary['digest']}"
    )
    tell(describe_products())
    write_json(json, summary)


def _register(panel: str, commands: dict[str, Callable[..., Any]]) -> None:
    """Adds commands to a panel of ``spqr --help``, in this order."""
    for name, command in commands.items():
        app.command(name, rich_help_panel=panel, epilog=EXAMPLES[name])(command)


_register(MAKE, {"quantize": quantize})
_register(MEASURE, {"perplexity": perplexity, "compare": compare, "eval": evaluate, "bench": bench, "analyze": analyze})
_register(USE, {"generate": generate, "inspect": inspect, "report": report})
_register(EXCHANGE, {"export": export, "import": import_original})


def main() -> None:
    """Runs the command line: bad input exits with 2 and one message, Ctrl-C with 130; see `spqr_jax.cli.main`."""
    run(app)
