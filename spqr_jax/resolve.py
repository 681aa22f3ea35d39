"""What `MODEL` means: the demo, a GGUF file, a model directory, a hub id or a checkpoint of ours."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from spqr_jax.checkpoint import CheckpointSource, is_checkpoint
from spqr_jax.errors import ModelError, SpQRError
from spqr_jax.files import read_object
from spqr_jax.files.companions import origin_files
from spqr_jax.files.first_bytes import first_bytes
from spqr_jax.formats.hf_spqr_source import HFSpQRSource, is_hf_spqr
from spqr_jax.formats.legacy import is_legacy
from spqr_jax.models.config import DecoderConfig
from spqr_jax.models.decoder import Decoder
from spqr_jax.models.families import family_of_hf, first_token
from spqr_jax.models.gguf import GGUFFile, is_gguf, open_gguf
from spqr_jax.models.hf import open_hf
from spqr_jax.models.packaged import PACKAGED, packaged_model
from spqr_jax.models.tokenizer import gguf_tokenizer, gguf_tokenizer_files, load_tokenizer, tokenizer_files
from spqr_jax.output import unfinished_note
from spqr_jax.stream.blocks import ModelSource, collect

MODEL_HELP = (
    "'demo' (SmolLM2-135M-Instruct), 'gemma3-270m', a GGUF file, a Hugging Face directory (config.json and "
    "safetensors files), a hub id such as org/name, or a directory that spqr wrote"
)
DTYPES = ("float32", "bfloat16", "float16")

_HUB_FILES = (
    "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*",
    "special_tokens_map.json", "added_tokens.json", "chat_template*", "additional_chat_templates/*",
    "quant*_config.json", "hf_quant_config.json",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class OpenedModel:
    """A model that has been found but not yet read.

    Attributes:
      label: what the user called it.
      source: reads its parts.
      tokenizer: reads its tokenizer.
      quantized: whether its weights are `SpQRArray`s already.
      tokenizer_files, configurations: read the files that a checkpoint keeps, by their path in it.
      quantized_by: what others quantized its weights by, which are dense again; None for a dense model.
      note: what the user should know of its files.
    """

    label: str
    source: ModelSource
    tokenizer: Callable[[], Any]
    quantized: bool = False
    tokenizer_files: Callable[[], dict[str, bytes]] = dict
    configurations: Callable[[], dict[str, bytes]] = dict
    quantized_by: str | None = None
    note: str | None = None

    @property
    def first_token(self) -> int | None:
        """What windows of text should begin with; None for nothing in particular."""
        return first_token(self.source.config)


def default_dtype() -> str:
    """float32 on a CPU, where 16-bit products are slow; bfloat16 on accelerators."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def open_model(spec: str, dtype: Any = None, say: Callable[[str], None] = lambda message: None) -> OpenedModel:
    """Finds a model.

    Args:
      spec: see `MODEL_HELP`.
      dtype: type of the dense weights, one of `DTYPES` or such a type itself, such as `jnp.bfloat16`; None for
        `default_dtype`.
        A checkpoint of ours keeps its own.
      say: told of downloads, and of what the user should know of the model's files.

    Raises:
      ModelError: nothing of that kind, or a model that we do not run.
    """
    weights_dtype: Any = _known_dtype(default_dtype() if dtype is None else dtype)
    path = packaged_model(spec, say) if spec in PACKAGED else Path(spec).expanduser()
    if path.is_file():
        if not is_gguf(path):
            raise ModelError(f"{spec} is not a GGUF file: it is {first_bytes(path)}; expected {MODEL_HELP}")
        return _open_gguf(spec, path, weights_dtype, say)
    if path.is_dir():
        if is_checkpoint(path):
            return OpenedModel(spec, CheckpointSource(path), lambda: load_tokenizer(path, say), quantized=True)
        if is_legacy(path):
            raise ModelError(
                f"{spec} was written by the original SpQR implementation: import it with "
                f"'spqr import {spec} --base DIRECTORY_OF_THE_MODEL --out OUT'"
            )
        if not (path / "config.json").exists() and (models := _gguf_models(path)):
            if len(models) > 1:
                names = ", ".join(model.name for model in models)
                raise ModelError(f"{spec} holds several GGUF models: {names}; give one of these files")
            return _open_gguf(spec, models[0], weights_dtype, say)
        return _open_hf_directory(spec, path, weights_dtype, say)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", spec) and not unfinished_note(path):
        return _open_hf_directory(spec, _fetch_from_hub(spec, say), weights_dtype, say)
    raise ModelError(f"no model found for {spec!r}: expected {MODEL_HELP}{unfinished_note(path)}")


def read_config(spec: str, say: Callable[[str], None] = lambda message: None) -> DecoderConfig:
    """A dense model's sizes, for which its weights need not be there.

    Args:
      spec: a ``config.json``, a directory that holds one, a hub id whose ``config.json`` is in the hub's cache, or any
        model that `open_model` takes.
      say: told of downloads.

    Raises:
      ModelError: nothing of that kind, a model that we do not run, or one that is quantized already.
    """
    path = Path(spec).expanduser()
    if path.is_dir() and not is_checkpoint(path) and (path / "config.json").is_file():
        path = path / "config.json"
    elif not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", spec):
        path = _cached_config(spec) or path
    if path.suffix == ".json" and path.is_file():
        values = read_object(path)
        return family_of_hf(values).from_hf(values)
    opened = open_model(spec, None, say)
    if opened.quantized:
        raise ModelError(f"{spec} is already quantized: give the original model instead")
    return opened.source.config


def _cached_config(name: str) -> Path | None:
    """The config.json of a hub id, where the hub's client has fetched it before."""
    import huggingface_hub

    cached = huggingface_hub.try_to_load_from_cache(name, "config.json")
    return Path(cached) if isinstance(cached, str) else None


def _known_dtype(dtype: Any) -> np.dtype:
    """One of `DTYPES`, given by its name or as a type."""
    try:
        known = np.dtype(dtype)
    except TypeError:  # no type at all
        known = None
    if known is None or known.name not in DTYPES:
        raise SpQRError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return known


def _open_gguf(spec: str, path: Path, dtype: Any, say: Callable[[str], None]) -> OpenedModel:
    file = GGUFFile(path)
    return OpenedModel(
        spec,
        open_gguf(file, dtype),
        lambda: gguf_tokenizer(file, say),
        tokenizer_files=lambda: gguf_tokenizer_files(file),
    )


def _gguf_models(directory: Path) -> list[Path]:
    """The GGUF files of a folder; of a model in parts, the first. Images' projectors are no models."""
    files = sorted(path for path in directory.iterdir() if path.suffix.lower() == ".gguf" and path.is_file())
    later_part = re.compile(r".*-(?!00001)\d{5}-of-\d{5}\.gguf", re.IGNORECASE)
    return [path for path in files if not later_part.fullmatch(path.name) and not path.name.startswith("mmproj")]


def _open_hf_directory(spec: str, path: Path, dtype: Any, say: Callable[[str], None]) -> OpenedModel:
    """Dense, in Hugging Face's SpQR format, or in another one that is read as a dense model."""
    if is_hf_spqr(path):
        return OpenedModel(spec, HFSpQRSource(path, dtype), lambda: load_tokenizer(path, say), quantized=True)
    source = open_hf(path, dtype)
    if source.note is not None:
        say(f"{spec}: {source.note}")
    return OpenedModel(
        spec,
        source,
        lambda: load_tokenizer(path, say),
        tokenizer_files=lambda: tokenizer_files(path),
        configurations=lambda: origin_files(path),
        quantized_by=source.quantized_by,
        note=source.note,
    )


def _fetch_from_hub(name: str, say: Callable[[str], None]) -> Path:
    import huggingface_hub  # the hub's own client: caching, resuming, mirrors, tokens

    say(f"fetching {name} from the Hugging Face hub")
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(_HUB_FILES)))
    except Exception as error:  # the network and the hub fail in many ways
        raise ModelError(
            f"{name!r} is not a local path and could not be fetched from the hub: "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from None


def load_model(spec: str, dtype: Any = None) -> tuple[Decoder, Any]:
    """Reads a model and its tokenizer into memory.

    What you should know about the model's files comes as a warning.

    Args:
      spec: the model: ``demo`` (SmolLM2-135M-Instruct), ``gemma3-270m``, a GGUF file, a Hugging Face directory
        (``config.json`` and safetensors), a hub id such as ``org/name``, or a directory that `save` or ``spqr`` wrote.
      dtype: type of the dense weights: ``float32``, ``bfloat16`` or ``float16``, as a name or as a type such as
        `jnp.bfloat16`. None for float32 on a CPU, bfloat16 on GPUs and TPUs. A directory that `save` or ``spqr`` wrote
        keeps its types.

    Returns:
      The model, and its tokenizer (a transformers tokenizer; None if the model has none).

    Raises:
      ModelError: no such model, or a model that spqr-jax does not run.
      CheckpointError: a directory that `save` or ``spqr`` wrote is damaged or edited.
      SpQRError: an unknown ``dtype``.

    Example:
      >>> model, tokenizer = spqr_jax.load_model("demo")
      >>> model.config.num_layers == len(model.layers)
      True
    """
    notes: list[str] = []
    opened = open_model(spec, dtype, notes.append)
    notes.clear()  # told of downloads
    if opened.note is not None:
        notes.append(f"{spec}: {opened.note}")
    try:
        tokenizer = opened.tokenizer()
    except ModelError:
        tokenizer = None
    for note in notes:
        warnings.warn(note, stacklevel=2)
    return collect(opened.source), tokenizer
