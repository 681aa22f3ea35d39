"""How a model says that it is quantized: `quantization_config` in config.json, or a file beside it.

Where to look, as transformers (`quantizers/auto.py`) and vLLM (`get_config_filenames` of
each method) do.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from spqr_jax.errors import ModelError
from spqr_jax.files import Entries, read_object

_ENTRIES = {"quantization_config": None, "compression_config": "compressed-tensors"}
"""Entry of config.json -> method where the entry does not name it."""

_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
"""File beside config.json -> method where the file does not name it: AutoGPTQ's, AutoAWQ's, ModelOpt's."""


@dataclasses.dataclass(frozen=True)
class Description:
    """What a model says of its quantization.

    Attributes:
      method: as it is named there, in lower case.
      entries: of the quantization.
    """

    method: str
    entries: Entries

    @property
    def key(self) -> str:
        """The method's name in one spelling: some have `_` where others have `-`."""
        return self.method.replace("_", "-").removeprefix("intel/")

    def refused(self, what: str = "") -> ModelError:
        """The error of a method, or of a kind of it, that is not read.

        Args:
          what: the kind, such as "version gemv".
        """
        name = f"{self.method}, {what}" if what else self.method
        return ModelError(
            f"{self.entries.label}: the model is already quantized with {name}, which spqr-jax cannot read: give the "
            "original dense model, or dequantize this one with the program that quantized it"
        )


def read_description(directory: Path, config: Entries) -> Description | None:
    """What a model says of its quantization; None where it says nothing.

    Args:
      directory: of the model.
      config: config.json.

    Raises:
      ModelError: entries of other types than expected, or none that names the method.
    """
    for holder in (config, config.nested("text_config")):
        for key, method in _ENTRIES.items():
            if key in holder and (entries := holder.nested(key)).to_dict():
                return Description(_method(entries, method), entries)
    if "quantization" in config and config.nested("quantization").to_dict():  # what mlx-lm writes
        return Description("mlx", config.nested("quantization"))
    for file, method in _FILES.items():
        if (directory / file).is_file():
            entries = read_object(directory / file)
            inner = entries.nested("quantization") if "quantization" in entries else entries
            return Description(_method(inner, method), inner)
    return None


def _method(entries: Entries, otherwise: str | None) -> str:
    if entries.maybe_flag("load_in_4bit") or entries.maybe_flag("load_in_8bit"):  # older ones name no method
        return "bitsandbytes"
    name = entries.maybe_text("quant_method") or otherwise
    if name is not None:
        return name.strip().lower()
    if {"group_size", "bits"} <= set(entries):  # what mlx-lm writes for transformers
        return "mlx"
    raise entries.lacks("quant_method", "the method that quantized the model, such as gptq")
