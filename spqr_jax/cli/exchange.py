"""`spqr export` and `spqr import`: quantized models to and from other programs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import jax.numpy as jnp
import typer

from spqr_jax.checkpoint import CheckpointSink, CheckpointSource
from spqr_jax.cli.display import progress_bar, say, size, tell
from spqr_jax.cli.next_step import after_export, after_writing
from spqr_jax.cli.options import Dtype
from spqr_jax.cli.outlook import say_next
from spqr_jax.errors import DataError, ModelError, SpQRError
from spqr_jax.estimate import exported_bytes, quantized_bytes
from spqr_jax.files.companions import origin_config, origin_files, origin_generation_config
from spqr_jax.formats.card import model_card
from spqr_jax.formats.directory import HFDirectory
from spqr_jax.formats.export import export_dense, export_hf_spqr
from spqr_jax.formats.legacy import LegacySource, Outliers
from spqr_jax.inspection import summarize
from spqr_jax.models.tokenizer import load_tokenizer, tokenizer_files
from spqr_jax.output import Claim
from spqr_jax.report import read_result
from spqr_jax.resolve import DTYPES, default_dtype

FORMATS = ("dense", "hf-spqr")


def export(
    context: typer.Context,
    directory: Annotated[Path, typer.Argument(help="A directory that spqr wrote.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Directory to write to.")],
    form: Annotated[
        str,
        typer.Option(
            "--format",
            help="dense: a Hugging Face directory of dequantized weights, for any program; hf-spqr: the format that "
            "transformers runs by the public CUDA kernel (3 bits, 16 x 16 tiles).",
        ),
    ] = "dense",
    dtype: Annotated[
        str, typer.Option(help=f"Of dense weights: {', '.join(DTYPES)}. hf-spqr has float16.")
    ] = "float16",
    perplexity: Annotated[
        list[Path] | None,
        typer.Option(help="What 'spqr perplexity --json' wrote, for the model card; repeatable."),
    ] = None,
    push: Annotated[
        str | None, typer.Option(help="Upload to this repository of the Hugging Face hub, such as you/name.")
    ] = None,
    private: Annotated[bool, typer.Option(help="Make that repository a private one.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace OUT if it exists.")] = False,
) -> None:
    """Write a quantized model for other programs, with a model card."""
    if form not in FORMATS:
        raise SpQRError(f"--format must be one of {', '.join(FORMATS)}, got {form!r}")
    if dtype not in DTYPES or (form == "hf-spqr" and dtype != "float16"):
        raise SpQRError(f"--dtype must be one of {', '.join(DTYPES)}, and float16 for hf-spqr, got {dtype!r}")
    claim = context.with_resource(Claim(out, overwrite))
    results = [_read_result(path) for path in perplexity or ()]
    source = CheckpointSource(directory)
    claim.need(exported_bytes(source, form, jnp.dtype(dtype).itemsize))
    with HFDirectory(claim) as target:
        with progress_bar("exporting", source.config.num_layers + 1) as advance:
            origin = origin_config(directory)
            if form == "dense":
                export_dense(source, target, jnp.dtype(dtype), advance, origin)
            else:
                export_hf_spqr(source, target, advance, origin)
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
    folder: Annotated[
        Path, typer.Argument(help="A folder that the original's main.py --save wrote.", show_default=False)
    ],
    base: Annotated[Path, typer.Option(help="Directory of the model that it was made from: config.json, tokenizer.")],
    out: Annotated[Path, typer.Option(help="Directory to write to.")],
    outliers: Annotated[
        str,
        typer.Option(
            help="replaced: outliers take the place of dense weights, as the folder's own loader has it; added: they "
            "are added to them, as its converter has it."
        ),
    ] = "replaced",
    dtype: Dtype = None,
    overwrite: Annotated[bool, typer.Option(help="Replace OUT if it exists.")] = False,
) -> None:
    """Read a folder of the original implementation, safely, and write it as a model of ours."""
    if outliers not in get_args(Outliers):
        raise SpQRError(f"--outliers must be one of {', '.join(get_args(Outliers))}, got {outliers!r}")
    claim = context.with_resource(Claim(out, overwrite))
    source = LegacySource(folder, base, jnp.dtype(dtype or default_dtype()), cast(Outliers, outliers))
    claim.need(quantized_bytes(source, source.settings(), jnp.dtype(dtype or default_dtype()).itemsize))
    files = origin_files(base)
    try:
        load_tokenizer(base)
        files |= tokenizer_files(base)
    except ModelError as error:
        say(f"no tokenizer is kept: {error}")
    provenance = {"model": str(base), "method": "original", "calibration": None, "folder": str(folder)}
    with (
        CheckpointSink(claim, source.config, source.settings(), provenance=provenance, files=files) as sink,
        progress_bar("importing", source.config.num_layers) as advance,
    ):
        for index in range(source.config.num_layers):
            sink.put_block(index, source.block(index))
            advance(f"block {index}")
        sink.put_outer(source.outer())
    summary = summarize(CheckpointSource(sink.path))
    tell(
        (str(sink.path), "bold"),
        f": {summary['ideal_bits']:.3f} ideal and {summary['stored_bits']:.3f} stored bits a weight, "
        f"{summary['outlier_percent']:.2f}% outliers; {size(summary['bytes'])} in all",
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
        say(f"no tokenizer is exported: {error}")


def _generation_config(source: CheckpointSource) -> dict[str, Any]:
    """Where texts begin and end, as transformers' generate looks it up."""
    config = source.config
    values = {"bos_token_id": config.bos_token_id, "eos_token_id": list(config.eos_token_ids) or None}
    return {name: value for name, value in values.items() if value is not None}


def _read_result(path: Path) -> dict[str, Any]:
    """What a model card says of a measured perplexity."""
    result = read_result(path)
    if "perplexity" not in result:
        raise DataError(f"{path} is not what 'spqr perplexity --json' writes: it has no perplexity")
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
            f"{folder} is written, but could not be uploaded to {repository!r}: {type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''}; log in with 'hf auth login' and upload it with "
            f"'hf upload {repository} {folder}'"
        ) from None
    tell(f"uploaded: {found}")
