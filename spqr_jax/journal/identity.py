"""Which run a journal belongs to: only a run with the same inputs may go on with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

JOURNAL_VERSION = 2
"""Of the files that the journal writes."""
NUMERICS_VERSION = 4
"""Of the arithmetic: a change that alters any bit of a result counts it up."""

_MEANING = {
    "model": "the model",
    "text": "the calibration text",
    "configuration": "the configuration",
    "tuning": "the tuning",
    "plan": "the plan it was given",
    "format": "the version of spqr-jax's format",
}


def identity_of(
    model: str,
    batches: Iterable[Any] | None,
    configuration: Mapping[str, Any],
    tuning: Mapping[str, Any] | None,
    plan: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """What two runs must have in common for the second to go on with the first.

    Args:
      model: SHA-256 of the model, as `ModelSource.identity` has it.
      batches: calibration text, arrays of token ids; None for none.
      configuration: of the quantization, in JSON.
      tuning: settings of the tuning, in JSON; None for no tuning.
      plan: that the run was given, in JSON; None for a plan of its own, or none.
    """
    identity = {
        "model": model,
        "text": "none" if batches is None else _digest_of_tokens(batches),
        "configuration": _canonical(configuration),
        "tuning": "none" if tuning is None else _canonical(tuning),
        "format": f"journal {JOURNAL_VERSION}, numerics {NUMERICS_VERSION}",
    }
    if plan is not None:
        identity["plan"] = hashlib.sha256(_canonical(plan).encode()).hexdigest()
    return identity


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What differs between two identities, in words, with both values in short."""
    words = []
    for key in sorted({*before, *now}, key=lambda key: (*_MEANING, key).index(key)):
        values = before.get(key, "none"), now.get(key, "none")
        if values[0] != values[1]:
            words.append(f"{_MEANING.get(key, key)} ({_compared(*values)})")
    return words


def _digest_of_tokens(batches: Iterable[Any]) -> str:
    """Of the token ids and of how they are cut into batches, on which the order of sums depends."""
    digest = hashlib.sha256()
    for batch in batches:
        tokens = np.asarray(batch).astype("<i8")
        digest.update(json.dumps(tokens.shape).encode())
        digest.update(tokens.tobytes())
    return digest.hexdigest()


def _canonical(values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True)


def _compared(before: str, now: str) -> str:
    """Of two settings in JSON only the entries that differ."""
    try:
        old, new = json.loads(before), json.loads(now)
    except ValueError:
        old = new = None
    if not isinstance(old, dict) or not isinstance(new, dict):
        return f"{_short(before)}, now {_short(now)}"
    keys = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    return "; ".join(
        f"{key} {_short(json.dumps(old.get(key)))}, now {_short(json.dumps(new.get(key)))}" for key in keys
    )


def _short(value: str) -> str:
    is_digest = len(value) == 64 and set(value) <= set("0123456789abcdef")
    most = 12 if is_digest else 60
    return value if len(value) <= most else f"{value[:most]}…"
