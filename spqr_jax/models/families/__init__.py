"""The model families that we run: a table of names and a mapping of the configuration for each.

docs/how-to/adding-a-model.md says how to add one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spqr_jax.errors import ModelError
from spqr_jax.files import Entries
from spqr_jax.models.config import DecoderConfig
from spqr_jax.models.families.falcon import FALCON
from spqr_jax.models.families.family import Family, GGUFNames
from spqr_jax.models.families.gemma import GEMMA2, GEMMA3
from spqr_jax.models.families.gpt2 import GPT2
from spqr_jax.models.families.llama import LLAMA, MISTRAL, QWEN2, QWEN3
from spqr_jax.models.families.opt import OPT
from spqr_jax.models.families.phi3 import PHI3
from spqr_jax.models.families.sparse import MIXTRAL, QWEN3_MOE, is_mixtral

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (LLAMA, MISTRAL, MIXTRAL, QWEN2, QWEN3, QWEN3_MOE, GEMMA2, GEMMA3, PHI3, FALCON, OPT, GPT2)
}
"""By ``model_type``. Yi is a Llama by its files."""

_HELP = "see docs/how-to/adding-a-model.md for how to add one"


def family_of_hf(values: Entries | Mapping[str, Any]) -> Family:
    """The family that a ``config.json`` belongs to.

    Raises:
      ModelError: none that we have.
    """
    entries = values if isinstance(values, Entries) else Entries(values, "config.json")
    kind, architectures = entries.maybe_text("model_type"), entries.texts("architectures")
    for family in FAMILIES.values():
        if kind == family.name or kind in family.other_names or (kind is None and family.architecture in architectures):
            return family
    named = ", ".join(architectures) or kind or "not named"
    known = ", ".join(f"{family.name} ({family.architecture})" for family in FAMILIES.values())
    raise ModelError(f"{entries.label}: architecture {named!r} is not supported; supported: {known}. {_HELP}")


def names_of_gguf(header: Any) -> GGUFNames:
    """How to read a GGUF file.

    Args:
      header: a `spqr_jax.models.gguf.GGUFFile`.

    Raises:
      ModelError: an architecture that we do not have.
    """
    architecture = header.entries.text("general.architecture")
    if architecture == "llama":
        return (MIXTRAL if is_mixtral(header) else LLAMA).gguf[0]
    known = {names.architecture: names for family in FAMILIES.values() for names in family.gguf}
    if architecture not in known:
        raise ModelError(
            f"{header.label}: GGUF architecture {architecture!r} is not supported; "
            f"supported: {', '.join(known)}. {_HELP}"
        )
    return known[architecture]


def first_token(config: DecoderConfig) -> int | None:
    """The token that every window of text should begin with; None for a model that minds none."""
    return config.bos_token_id if FAMILIES[config.family].starts_with_bos else None


__all__ = ["FAMILIES", "Family", "GGUFNames", "family_of_hf", "first_token", "names_of_gguf"]
