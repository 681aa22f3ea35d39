"""Rotary embeddings as files describe them: one rule for config.json, one for GGUF headers.

Every way of stretching a context ends as a divisor for each rotary frequency and one
factor on cosines and sines. Entries that are there and not understood are refused:
a model whose positions are read wrongly still talks, only worse.
"""

from __future__ import annotations

import math
from typing import Any

from spqr_jax.errors import ModelError
from spqr_jax.files import Entries
from spqr_jax.models.config import DecoderConfig

_MOST_FREQUENCIES = 1 << 16

_COMMON_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}
_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "longrope": {"factor", "short_factor", "long_factor", "attention_factor", "short_mscale", "long_mscale"},
    "yarn": {
        "factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", "finetuned",
    },
}  # fmt: skip
"""Entries that are understood, by type of scaling."""

_YARN_FAST, _YARN_SLOW = 32.0, 1.0  # turns within the original context: arXiv 2309.00071, section 3.2


def rope(values: Entries, head_dim: int, default_theta: float = 10000.0) -> dict[str, Any]:
    """The rotary entries of a configuration, by transformers' rule.

    ``rope_scaling`` replaces ``rope_parameters`` where it has entries; in either,
    ``rope_theta`` and ``partial_rotary_factor`` go before those beside it; an
    ``original_max_position_embeddings`` beside it goes before the one inside.

    Raises:
      ModelError: a way of scaling, or an entry of it, that we do not have.
    """
    scaling = values.nested("rope_scaling")
    entries = scaling if list(scaling) else values.nested("rope_parameters")
    kind = entries.maybe_text("rope_type") or entries.maybe_text("type") or "default"
    kind = {"su": "longrope", "none": "default"}.get(kind, kind)
    if kind not in _KEYS:
        raise ModelError(
            f"{values.label}: rotary scaling {kind!r} is not supported, expected one of {', '.join(_KEYS)}"
        )
    if unknown := [name for name in entries if name not in _COMMON_KEYS | _KEYS[kind]]:
        raise ModelError(
            f"{values.label}: rotary scaling of type {kind!r} has unknown entries: "
            f"{', '.join(unknown)}; expected only {', '.join(sorted(_COMMON_KEYS | _KEYS[kind]))}"
        )
    theta = entries.maybe_number("rope_theta", least=1e-6) or values.number("rope_theta", default_theta, least=1e-6)
    partial = entries.maybe_number("partial_rotary_factor") or values.number("partial_rotary_factor", 1.0)
    if not 0 < partial <= 1:
        entries.refuse("partial_rotary_factor", "a number above 0 and at most 1", partial)
    rotated = _rotated(int(head_dim * partial), head_dim, values.label)
    settings: dict[str, Any] = {"rope_theta": theta, "rope_dim": None if rotated == head_dim else rotated}
    if kind == "linear":
        settings["rope_factors"] = (entries.number("factor", least=1e-6),) * (rotated // 2)
    elif kind == "dynamic":  # changes nothing up to the model's context, where we end
        entries.number("factor", least=1.0)
    elif kind == "llama3":
        settings["rope_factors"] = _llama3_factors(entries, _original(values, entries), theta, rotated)
    elif kind == "yarn":
        settings |= _yarn(values, entries, theta, rotated)
    elif kind == "longrope":
        settings |= _long_rope(values, entries, rotated)
    return settings


def _rotated(rotated: int, head_dim: int, label: str) -> int:
    if not 2 <= rotated <= min(head_dim, 2 * _MOST_FREQUENCIES):
        raise ModelError(f"{label}: {rotated} of {head_dim} dimensions of a head are rotated, expected 2 to {head_dim}")
    return rotated


def _original(values: Entries, entries: Entries) -> int:
    """Positions of the context before it was stretched."""
    name = "original_max_position_embeddings"
    original = values.maybe_integer(name, least=1) or entries.maybe_integer(name, least=1)
    return original or values.integer("max_position_embeddings", 2048, least=1)


def llama3_factors(
    factor: float, low: float, high: float, original: int, theta: float, rotated: int
) -> tuple[float, ...]:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    factors = []
    for i in range(rotated // 2):
        turns = original / (2 * math.pi * theta ** (2 * i / rotated))
        blend = min(max((turns - low) / (high - low), 0.0), 1.0)
        factors.append(1.0 / (blend + (1.0 - blend) / factor))
    return tuple(factors)


def _llama3_factors(entries: Entries, original: int, theta: float, rotated: int) -> tuple[float, ...]:
    factor = entries.number("factor", least=1e-6)
    low, high = entries.number("low_freq_factor"), entries.number("high_freq_factor")
    if not low < high:
        entries.refuse("high_freq_factor", f"more than low_freq_factor, {low:g}")
    return llama3_factors(factor, low, high, original, theta, rotated)


def yarn_factors(
    factor: float, original: int, theta: float, rotated: int, fast: float, slow: float, truncate: bool = True
) -> tuple[float, ...]:
    """YaRN (arXiv 2309.00071): frequencies that turn often in the original context are kept, slow ones stretched."""

    def dimension(turns: float) -> float:
        return rotated * math.log(original / (2 * math.pi * turns)) / (2 * math.log(theta))

    low, high = dimension(fast), dimension(slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotated - 1)
    width = high - low if high != low else 0.001
    stretched = [min(max((i - low) / width, 0.0), 1.0) for i in range(rotated // 2)]
    return tuple(1.0 / ((1.0 - share) + share / factor) for share in stretched)


def yarn_scale(factor: float, mscale: float = 1.0) -> float:
    """What YaRN multiplies cosines and sines by: 0.1 mscale ln(factor) + 1."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _yarn(values: Entries, entries: Entries, theta: float, rotated: int) -> dict[str, Any]:
    original = _original(values, entries)
    longest = values.integer("max_position_embeddings", 2048, least=1)
    factor = entries.maybe_number("factor", least=1e-6) or longest / original
    scale, mscale = entries.maybe_number("attention_factor"), entries.maybe_number("mscale")
    all_dim = entries.maybe_number("mscale_all_dim")
    if scale is None and mscale and all_dim:
        scale = yarn_scale(factor, mscale) / yarn_scale(factor, all_dim)
    fast = entries.maybe_number("beta_fast", least=1e-6) or _YARN_FAST
    slow = entries.maybe_number("beta_slow", least=1e-6) or _YARN_SLOW
    if theta <= 1:
        entries.refuse("rope_theta", "more than 1")
    return {
        "rope_factors": yarn_factors(factor, original, theta, rotated, fast, slow, entries.flag("truncate", True)),
        "rope_scale": yarn_scale(factor) if scale is None else scale,
        # Model cards tell users to add the entries and leave the context as it was.
        "max_positions": max(longest, round(original * factor)),
    }


def _long_rope(values: Entries, entries: Entries, rotated: int) -> dict[str, Any]:
    """LongRoPE (arXiv 2402.13753) as it is for texts up to the original context, which becomes the model's.

    Beyond it other factors apply to the whole text at once, keys that are cached already included.
    """
    longest = values.integer("max_position_embeddings", 2048, least=1)
    original, factors = _original(values, entries), entries.numbers("short_factor")
    if len(factors) != rotated // 2 or min(factors, default=0.0) <= 0:
        entries.refuse("short_factor", f"{rotated // 2} positive numbers", factors)
    scale = entries.maybe_number("attention_factor")
    if scale is None:
        stretch = entries.maybe_number("factor", least=1e-6) or longest / original
        scale = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 and original > 1 else 1.0
    return {"rope_factors": tuple(factors), "rope_scale": scale, "max_positions": min(original, longest)}


# ---- written ------------------------------------------------------------------------------------


def rope_entries(theta: float | None, factors: tuple[float, ...] | None, scale: float, context: int) -> dict[str, Any]:
    """One ``rope_parameters``, in the form that most programs know.

    Equal factors are linear scaling, factors that follow Llama 3.1's formula are that; any others can be said as
    LongRoPE's.
    """
    if factors is None and scale == 1.0:
        return {"rope_type": "default", "rope_theta": theta}
    if factors is not None and scale == 1.0:
        if len(set(factors)) == 1:
            return {"rope_type": "linear", "rope_theta": theta, "factor": factors[0]}
        if (entries := _as_llama3(theta or 0.0, factors)) is not None:
            return entries
    listed = list(factors) if factors is not None else []
    return {
        "rope_type": "longrope",
        "rope_theta": theta,
        "short_factor": listed,
        "long_factor": listed,
        "factor": 1.0,
        "attention_factor": scale,
        "original_max_position_embeddings": context,
    }


_LLAMA3_CONTEXT, _LLAMA3_LOW, _LLAMA3_HIGH = 8192, 1.0, 4.0  # of every Llama 3.1, 3.2 and 3.3


def _as_llama3(theta: float, factors: tuple[float, ...]) -> dict[str, Any] | None:
    """The entries from which Llama 3.1's formula gives these factors, if it does.

    Between its two ends the formula is a line in the turns of a frequency: two of the
    frequencies there tell its slope and its place, and so the original context and
    `high_freq_factor`, with `low_freq_factor` 1 as everywhere.
    """
    largest, low = round(max(factors), 3), _LLAMA3_LOW
    per_position = [1 / (2 * math.pi * theta ** (i / len(factors))) for i in range(len(factors))]
    blends = [(1 / factor - 1 / largest) / (1 - 1 / largest) if largest > 1 else 1.0 for factor in factors]
    between = [(turns, blend) for turns, blend in zip(per_position, blends, strict=True) if 1e-4 < blend < 1 - 1e-4]
    original, high = float(_LLAMA3_CONTEXT), _LLAMA3_HIGH
    if len(between) == 1:
        original = (between[0][1] * (high - low) + low) / between[0][0]
    elif between:
        slope = (between[0][1] - between[-1][1]) / (between[0][0] - between[-1][0])
        place = slope * between[0][0] - between[0][1]  # low / (high - low)
        if place <= 0 or slope <= 0:
            return None
        original, high = low * slope / place, round(low + low / place, 3)
    entries = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": largest,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": max(1, round(original)),
    }
    formula = llama3_factors(largest, low, high, max(1, round(original)), theta, 2 * len(factors))
    return entries if all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(formula, factors, strict=True)) else None


def rope_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The rotary entries of a ``config.json``."""
    if config.rope_theta is None:
        return {}
    entries = rope_entries(config.rope_theta, config.rope_factors, config.rope_scale, config.max_positions)
    if config.rope_dim is not None:
        entries["partial_rotary_factor"] = config.rope_dim / config.head_dim
    return {"rope_theta": config.rope_theta, "rope_parameters": entries}


# ---- GGUF ---------------------------------------------------------------------------------------


_GGUF_KEYS = {
    f"scaling.{name}"
    for name in ("type", "factor", "attn_factor", "original_context_length", "finetuned", "yarn_beta_fast",
                 "yarn_beta_slow")
}  # fmt: skip


def gguf_rope(header: Any, arch: str, head_dim: int) -> dict[str, Any]:
    """The rotary entries of a GGUF header, by llama.cpp's rule (src/llama-model.cpp, ``load_hparams``).

    A factor without a type is linear scaling, the old key ``rope.scale_linear`` too;
    the tensor ``rope_freqs`` multiplies with either. Of the factors of a long context
    (``rope_factors_short``, ``_long``) those for the original context are taken,
    which becomes the model's.

    Raises:
      ModelError: a way of scaling that we do not have.
    """
    keys, prefix = header.entries, f"{arch}.rope."
    if unknown := [key for key in keys if key.startswith(prefix + "scaling.") and key[len(prefix) :] not in _GGUF_KEYS]:
        raise ModelError(f"{header.label}: these entries of rotary scaling are not supported: {', '.join(unknown)}")
    rotated = _rotated(keys.integer(prefix + "dimension_count", head_dim), head_dim, header.label)
    theta = keys.number(prefix + "freq_base", 10000.0, least=1e-6)
    factor = keys.maybe_number(prefix + "scaling.factor", least=0) or keys.number(prefix + "scale_linear", 0.0, least=0)
    factor = factor or 1.0  # 0 stands for none
    kind = keys.text(prefix + "scaling.type", "linear")
    context = keys.maybe_integer(f"{arch}.context_length", least=1) or 2048
    original = keys.maybe_integer(prefix + "scaling.original_context_length", least=1) or context
    scale = keys.number(prefix + "scaling.attn_factor", 1.0)
    settings: dict[str, Any] = {"rope_theta": theta, "rope_dim": None if rotated == head_dim else rotated}
    factors = [1.0] * (rotated // 2)
    if kind == "yarn":
        fast = keys.number(prefix + "scaling.yarn_beta_fast", _YARN_FAST, least=1e-6)
        slow = keys.number(prefix + "scaling.yarn_beta_slow", _YARN_SLOW, least=1e-6)
        factors = list(yarn_factors(factor, original, theta, rotated, fast, slow))
        scale *= yarn_scale(factor)
    elif kind == "linear":
        factors = [factor] * len(factors)
    elif kind not in ("none", "longrope"):
        keys.refuse(prefix + "scaling.type", "none, linear, yarn or longrope")
    for name in ("rope_freqs.weight", "rope_factors_short.weight"):
        if name in header.shapes():
            tensor = header.read(name, "float32").reshape(-1).tolist()
            if len(tensor) != len(factors) or not all(0 < value < math.inf for value in tensor):
                raise ModelError(
                    f"{header.label}: {name} must hold {len(factors)} positive numbers, but holds {len(tensor)}"
                )
            factors = [a * b for a, b in zip(factors, tensor, strict=True)]
    if "rope_factors_short.weight" in header.shapes():
        settings["max_positions"] = min(original, context)
    if any(value != 1.0 for value in factors):
        settings["rope_factors"] = tuple(factors)
    return settings if scale == 1.0 else settings | {"rope_scale": scale}
