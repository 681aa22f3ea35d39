"""Sound files of every kind, tiny, made when a run begins and the same each time.

Each maker fills a folder of its own with folders, the variants; a variant holds what a reader is given.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from support.fuzz.seeds import models, quantized, requests

MAKERS: dict[str, Callable[[Path], None]] = {
    make.__name__: make
    for make in (
        models.hf_configs,
        models.hf_directories,
        models.safetensors_files,
        models.quantized_directories,
        models.tokenizers,
        models.chat_templates,
        models.gguf_files,
        quantized.checkpoints,
        quantized.spqr_directories,
        quantized.spqr_words,
        quantized.legacy_matrices,
        quantized.legacy_folders,
        requests.data_files,
        requests.results,
        requests.rules,
        requests.quantizations,
        requests.decoder_configs,
        requests.prompts,
    )
}
