"""JSON files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spqr_jax.errors import ModelError, SpQRError
from spqr_jax.files.entries import Entries, shown


def read_json(path: Path, error: type[SpQRError] = ModelError) -> Any:
    """What a JSON file holds, of any type.

    Raises:
      SpQRError: of type `error`: the file is not there, cannot be read, or is no JSON in UTF-8.
    """
    return parse_json(read_bytes(path, error), str(path), error)


def read_object(path: Path, error: type[SpQRError] = ModelError, defaults: Mapping[str, Any] | None = None) -> Entries:
    """The entries of a JSON file that holds an object; `defaults` as in :class:`Entries`.

    Raises:
      SpQRError: as :func:`read_json`, or it holds something else.
    """
    values = read_json(path, error)
    if not isinstance(values, dict):
        raise error(f"{path} holds {shown(values)}, expected a JSON object: is it the right file?")
    return Entries(values, str(path), defaults=defaults, error=error)


def parse_json(data: bytes | str, label: str, error: type[SpQRError] = ModelError) -> Any:
    """JSON text, with an error that names where it comes from."""
    try:
        return json.loads(data.decode("utf-8-sig") if isinstance(data, bytes) else data)
    except (ValueError, RecursionError) as problem:  # ValueError: of JSON, of UTF-8, of numbers too long to convert
        reason = "it is nested too deeply" if isinstance(problem, RecursionError) else str(problem)
        raise error(f"{label} is not valid JSON: {reason}; fetch the file again") from None


def read_bytes(path: Path, error: type[SpQRError] = ModelError) -> bytes:
    """A whole file.

    Raises:
      SpQRError: of type `error`: it is not there or cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise error(f"{path} does not exist") from None
    except (OSError, ValueError) as problem:  # ValueError: a name that no file can have
        raise error(f"{path} cannot be read: {getattr(problem, 'strerror', None) or problem}") from None
