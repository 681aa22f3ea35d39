"""What files hold, in short: SHA-256 over their content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from spqr_jax.errors import ModelError


def digest_of_files(paths: Iterable[Path]) -> str:
    """SHA-256 over the names and the whole content of files, in hexadecimal; their folder and their times do not count.

    Raises:
      ModelError: one cannot be read.
    """
    return digest_of_values([(path.name, digest_of_file(path)) for path in sorted(set(paths))])


def digest_of_file(path: Path) -> str:
    """SHA-256 of the whole content of a file, in hexadecimal.

    Raises:
      ModelError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from None


def digest_of_values(values: object) -> str:
    """SHA-256 of JSON values, in hexadecimal."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
