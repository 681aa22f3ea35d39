"""`spqr export` and `spqr import`: quantized models to and from other programs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import jax.numpy as jnp
import typer

from spqr_jax.checkpoint import CheckpointSink, CheckpointSource
from spqr_jax.cli.display import EventView, progress_bar, say, size, tell
from spqr_jax.cli.help import argument, flag, option
from spqr_jax.cli.next_step import after_export, after_writing
from spqr_jax.cli.options import Dtype, Out, Overwrite
from spqr_jax.cli.outlook import say_next
from spqr_jax.errors import DataError, ModelError, SpQRError
from spqr_jax.estimate import exported_bytes, quantized_bytes
from spqr_jax.files.companions import origin_config, origin_files, origin_generation_config
from spqr_jax.formats.card import model_card
from spqr_jax.formats.directory import HFDirectory
from spqr_jax.formats.export import export_dense, export_hf_spqr
from spqr_jax.formats.legacy import LegacySource, Outliers
from spqr_jax.inspection import summarize
from spqr_jax.models.decoder import Block
from spqr_jax.models.tokenizer import load_tokenizer, tokenizer_files
from spqr_jax.output import Claim
from spqr_jax.report import read_result
from spqr_jax.resolve import DTYPES, default_dtype
from spqr_jax.stream import sweep

FORMATS = ("dense", "hf-spqr")
FORMAT, HUB, ORIGIN = "Format", "Model card and hub", "Original model"


def export(
    context: typer.Context,
    directory: Annotated[Path, argument("MODEL", "A directory that spqr wrote.")],
    out: Out,
    overwrite: Overwrite = False,
    form: Annotated[
        str,
        option(
            FORMAT,
            "FORMAT",
            "dense: a Hugging Face directory with dequantized weights, for any program. hf-spqr: the quantized format "
            "that transformers runs with the public CUDA kernel; needs 3 bits and 16 × 16 groups.",
            "--format",
        ),
    ] = "dense",
    dtype: Annotated[
        str, option(FORMAT, "TYPE", f"Type of the dense weights: {', '.join(DTYPES)}. hf-spqr: float16 only.")
    ] = "float16",
    perplexity: Annotated[
        list[Path] | None,
        option(HUB, "FILE", "A result of 'spqr perplexity --json' to show in the model card. Repeatable."),
    ] = None,
    push: Annotated[
        str | None,
        option(HUB, "REPO", "After writing, upload to this repository of the Hugging Face hub, such as you/name."),
    ] = None,
    private: Annotated[bool, flag(HUB, "--private", "Make the repository private if it is new.")] = False,
) -> None:
    """Convert a quantized model for other programs, with a model card."""
    if form not in FORMATS:
        raise SpQRError(f"--format must be one of {', '.join(FORMATS)}, got {form!r}")
    if dtype not in DTYPES or (form == "hf-spqr" and dtype != "float16"):
        raise SpQRError(f"--dtype must be one of {', '.join(DTYPES)} (hf-spqr: float16 only), got {dtype!r}")
    claim = context.with_resource(Claim(out, overwrite))
    results = [_read_result(path) for path in perplexity or ()]
    source = CheckpointSource(directory)
    claim.need(exported_bytes(source.config, form, jnp.dtype(dtype).itemsize))
    with HFDirectory(claim) as target:
        with EventView() as events:
            origin = origin_config(directory)
            if form == "dense":
                export_dense(source, target, jnp.dtype(dtype), events, origin)
            else:
                export_hf_spqr(source, target, events, origin)
        _write_companions(target, source, directory)
        card = model_card(push or out.name, form, summarize(source), results, source.config.family)
        target.write_text("README.md", card)
    files = sorted(path for path in target.path.iterdir() if path.is_file())
    total = sum(path.stat().st_size for path in files)
    tell((str(target.path), "bold"), f": {', '.join(path.name for path in files)}; {size(total)}")
    if push is not None:
        _push(target.path, push, private)
    say_next(after_export(push or str(out), form))


def import_original(
    context: typer.Context,
    folder: Annotated[Path, argument("FOLDER", "The folder that the original code's 'main.py --save' wrote.")],
    base: Annotated[
        Path, option(ORIGIN, "DIR", "Directory of the dense model: its config.json and tokenizer are needed.")
    ],
    out: Out,
    overwrite: Overwrite = False,
    outliers: Annotated[
        str,
        option(
            ORIGIN,
            "HOW",
            "replaced: outliers replace dense weights, as in the original loader. added: outliers are added to dense "
            "weights, as in the original converter.",
        ),
    ] = "replaced",
    dtype: Dtype = None,
) -> None:
    """Convert a model that the original SpQR code saved. Runs no code from its files."""
    if outliers not in get_args(Outliers):
        raise SpQRError(f"--outliers must be one of {', '.join(get_args(Outliers))}, got {outliers!r}")
    claim = context.with_resource(Claim(out, overwrite))
    source = LegacySource(folder, base, jnp.dtype(dtype or default_dtype()), cast(Outliers, outliers))
    claim.need(quantized_bytes(source.config, source.settings(), jnp.dtype(dtype or default_dtype()).itemsize))
    files = origin_files(base)
    try:
        load_tokenizer(base)
        files |= tokenizer_files(base)
    except ModelError as error:
        say(f"the tokenizer is not copied: {error}")
    provenance = {"model": str(base), "method": "original", "calibration": None, "folder": str(folder)}
    with (
        CheckpointSink(claim, source.config, source.settings(), provenance=provenance, files=files) as sink,
        progress_bar("importing", source.config.num_layers) as advance,
    ):

        def keep(index: int, block: Block) -> None:
            sink.put_block(index, block)
            advance(f"block {index}")

        sweep.forward(source, keep)
        sink.put_outer(source.outer())
    summary = summarize(CheckpointSource(sink.path))
    tell(
        (str(sink.path), "bold"),
        f": {summary['stored_bits']:.3f} stored bits per weight (ideal: {summary['ideal_bits']:.3f}), "
        f"{summary['outlier_percent']:.2f}% outliers; {size(summary['bytes'])} in total",
    )
    say_next(after_writing(out))


def _write_companions(target: HFDirectory, source: CheckpointSource, directory: Path) -> None:
    """generation_config.json and the tokenizer's files, as the model came with them."""
    if (generation := origin_generation_config(directory)) is not None:
        target.write_files({"generation_config.json": generation})
    else:
        target.write_json("generation_config.json", _generation_config(source))
    try:
        load_tokenizer(directory)
        target.write_files(tokenizer_files(directory))
    except ModelError as error:
        say(f"the tokenizer is not exported: {error}")


def _generation_config(source: CheckpointSource) -> dict[str, Any]:
    """Where texts begin and end, as transformers' generate looks it up."""
    config = source.config
    values = {"bos_token_id": config.bos_token_id, "eos_token_id": list(config.eos_token_ids) or None}
    return {name: value for name, value in values.items() if value is not None}


def _read_result(path: Path) -> dict[str, Any]:
    """What a model card says of a measured perplexity."""
    result = read_result(path)
    if "perplexity" not in result:
        raise DataError(f"{path} was not written by 'spqr perplexity --json': it has no perplexity")
    result.setdefault("stderr", math.nan)  # there was one window
    return result


def _push(folder: Path, repository: str, private: bool) -> None:
    import huggingface_hub  # the hub's own client: tokens, large files, resuming

    say(f"uploading {folder} to {repository}")
    try:
        hub = huggingface_hub.HfApi()
        hub.create_repo(repository, exist_ok=True, private=private)
        found = hub.upload_folder(repo_id=repository, folder_path=folder)
    except Exception as error:  # the network and the hub fail in many ways
        raise SpQRError(
            f"{folder} was written but could not be uploaded to {repository!r}: {type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''}; log in with 'hf auth login', then upload it with "
            f"'hf upload {repository} {folder}'"
        ) from None
    tell(f"uploaded: {found}")
