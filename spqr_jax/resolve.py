"""What `MODEL` means: the demo, a GGUF file, a model directory, a hub id or a checkpoint of ours."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from spqr_jax.blocks import BlockSource, collect
from spqr_jax.checkpoint import CheckpointSource, is_checkpoint
from spqr_jax.errors import ModelError, SpQRError
from spqr_jax.formats.hf_spqr_source import HFSpQRSource, is_hf_spqr
from spqr_jax.formats.legacy import is_legacy
from spqr_jax.models.decoder import Decoder
from spqr_jax.models.families import first_token
from spqr_jax.models.gguf import GGUFFile, open_gguf
from spqr_jax.models.hf import open_hf
from spqr_jax.models.packaged import PACKAGED, packaged_model
from spqr_jax.models.tokenizer import gguf_tokenizer, load_tokenizer
from spqr_jax.output import unfinished_note

MODEL_HELP = (
    "'demo' (SmolLM2-135M-Instruct), 'gemma3-270m', a GGUF file, a Hugging Face directory (config.json and "
    "safetensors), a hub id such as org/name, or a directory that spqr wrote"
)
DTYPES = ("float32", "bfloat16", "float16")

_HUB_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json", "tokenizer*", "special_tokens_map.json",
              "chat_template*", "generation_config.json")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class OpenedModel:
    """A model that has been found but not yet read.

    Attributes:
      label: what the user called it.
      source: reads its parts.
      tokenizer: reads its tokenizer.
      quantized: whether its weights are `SpQRArray`s already.
    """

    label: str
    source: BlockSource
    tokenizer: Callable[[], Any]
    quantized: bool = False

    @property
    def first_token(self) -> int | None:
        """What windows of text should begin with; None for nothing in particular."""
        return first_token(self.source.config)


def default_dtype() -> str:
    """float32 on a CPU, where 16-bit products are slow; bfloat16 on accelerators."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def open_model(spec: str, dtype: str | None = None, say: Callable[[str], None] = lambda message: None) -> OpenedModel:
    """Finds a model.

    Args:
      spec: see `MODEL_HELP`.
      dtype: type of the dense weights, one of `DTYPES`; None for `default_dtype`.
        A checkpoint of ours keeps its own.
      say: told of downloads.

    Raises:
      ModelError: nothing of that kind, or a model that we do not run.
    """
    if dtype is not None and dtype not in DTYPES:
        raise SpQRError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    weights_dtype: Any = jnp.dtype(dtype or default_dtype())
    path = packaged_model(spec, say) if spec in PACKAGED else Path(spec).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{spec} is a file but no GGUF file; expected {MODEL_HELP}")
        file = GGUFFile(path)
        return OpenedModel(spec, open_gguf(file, weights_dtype), lambda: gguf_tokenizer(file))
    if path.is_dir():
        if is_checkpoint(path):
            return OpenedModel(spec, CheckpointSource(path), lambda: load_tokenizer(path), quantized=True)
        if is_legacy(path):
            raise ModelError(
                f"{spec} is a folder of the original implementation: read it with "
                f"'spqr import {spec} --base DIRECTORY_OF_THE_MODEL --out OUT'"
            )
        return _open_hf_directory(spec, path, weights_dtype)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", spec) and not unfinished_note(path):
        return _open_hf_directory(spec, _fetch_from_hub(spec, say), weights_dtype)
    raise ModelError(f"no model {spec!r}: expected {MODEL_HELP}{unfinished_note(path)}")


def _open_hf_directory(spec: str, path: Path, dtype: Any) -> OpenedModel:
    """Dense, or in Hugging Face's SpQR format."""
    if is_hf_spqr(path):
        return OpenedModel(spec, HFSpQRSource(path, dtype), lambda: load_tokenizer(path), quantized=True)
    return OpenedModel(spec, open_hf(path, dtype), lambda: load_tokenizer(path))


def _fetch_from_hub(name: str, say: Callable[[str], None]) -> Path:
    import huggingface_hub  # the hub's own client: caching, resuming, mirrors, tokens

    say(f"fetching {name} from the Hugging Face hub")
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(_HUB_FILES)))
    except Exception as error:  # the network and the hub fail in many ways
        raise ModelError(
            f"{name!r} is no local path and could not be fetched from the hub: "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from None


def load_model(spec: str, dtype: str | None = None) -> tuple[Decoder, Any]:
    """Reads a model into memory.

    Args:
      spec, dtype: as :func:`open_model`.

    Returns:
      Its parameters and its tokenizer (None where it has none).
    """
    opened = open_model(spec, dtype)
    try:
        tokenizer = opened.tokenizer()
    except ModelError:
        tokenizer = None
    return collect(opened.source), tokenizer
