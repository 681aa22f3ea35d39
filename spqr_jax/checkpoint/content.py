"""One number for all that a checkpoint holds."""

from __future__ import annotations

from pathlib import Path

from spqr_jax.checkpoint.reading import CheckpointSource
from spqr_jax.files.content import digest_of_file, digest_of_values
from spqr_jax.stream import sweep


def content_digest(path: Path | str, *, verify: bool = True) -> str:
    """SHA-256 over all arrays, JSON and other files of a checkpoint, in hexadecimal.

    Two checkpoints with the same arrays, provenance, tokenizer and so on have the same digest. Orbax' own files do
    not count: they hold the time of writing, and the arrays in a form of Orbax' choice.

    Args:
      path: of the checkpoint.
      verify: read all arrays and compare them with the SHA-256s that the checkpoint states. Without, these count.

    Raises:
      CheckpointError: as `CheckpointSource`.
    """
    source = CheckpointSource(path)
    if verify:
        source.outer()
        sweep.forward(source, lambda index, block: None, read_ahead=False)
    files = {
        place.as_posix(): digest_of_file(source.path / place)
        for file in sorted(source.path.rglob("*"))
        if file.is_file() and (place := file.relative_to(source.path)).parts[0] not in ("model", "layers")
    }
    return digest_of_values([source.identity(), files])
