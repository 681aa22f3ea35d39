"""`spqr export`: a quantized model for other programs."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated, Any

import jax.numpy as jnp
import typer

from spqr_jax.atomic import refuse_existing
from spqr_jax.checkpoint import CheckpointSource
from spqr_jax.cli.display import console, progress_bar, say
from spqr_jax.errors import DataError, ModelError, SpQRError
from spqr_jax.formats.card import model_card
from spqr_jax.formats.directory import HFDirectory
from spqr_jax.formats.export import export_dense, export_hf_spqr
from spqr_jax.inspection import summarize
from spqr_jax.models.tokenizer import load_tokenizer
from spqr_jax.resolve import DTYPES

FORMATS = ("dense", "hf-spqr")


def export(
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
    refuse_existing(out, overwrite)
    results = [_read_result(path) for path in perplexity or ()]
    source = CheckpointSource(directory)
    with HFDirectory(out, overwrite=overwrite) as target:
        with progress_bar("exporting", source.config.num_layers + 1) as advance:
            if form == "dense":
                export_dense(source, target, jnp.dtype(dtype), advance)
            else:
                export_hf_spqr(source, target, advance)
        target.write_json("generation_config.json", _generation_config(source))
        try:
            target.save_tokenizer(load_tokenizer(directory))
        except ModelError as error:
            say(f"no tokenizer is exported: {error}")
        card = model_card(push or out.name, form, summarize(source), results, source.config.family)
        target.write_text("README.md", card)
    files = sorted(path for path in out.iterdir() if path.is_file())
    total = sum(path.stat().st_size for path in files)
    console.print(f"[bold]{out}[/bold]: {', '.join(path.name for path in files)}; {total / 1e6:.1f} MB")
    if push is not None:
        _push(out, push, private)


def _generation_config(source: CheckpointSource) -> dict[str, Any]:
    """Where texts begin and end, as transformers' generate looks it up."""
    config = source.config
    values = {"bos_token_id": config.bos_token_id, "eos_token_id": list(config.eos_token_ids) or None}
    return {name: value for name, value in values.items() if value is not None}


def _read_result(path: Path) -> dict[str, Any]:
    wanted = ("data", "windows", "seqlen", "perplexity", "stderr")
    try:
        result = json_module.loads(path.read_text(encoding="utf-8"))
        return {name: result[name] for name in wanted}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not what 'spqr perplexity --json' writes: {type(error).__name__} {error}") from None


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
    console.print(f"uploaded: {found}")
