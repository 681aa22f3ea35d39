"""Dense weights in other people's tensors, whose shapes nobody has checked yet."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spqr_jax.errors import ModelError
from spqr_jax.models.config import DecoderConfig
from spqr_jax.models.names import Row


def dense_part(
    tensor: np.ndarray, row: Row, path: str, shape: tuple[int, ...], config: DecoderConfig, dtype: Any, label: str
) -> jax.Array:
    """The weight at `path`, of shape `shape`, out of a tensor that holds the weights of `row`, in `dtype`.

    Raises:
      ModelError: the tensor has another shape, or values that are not finite; names `label` and the tensor.
    """
    try:
        part = row.packing.split(tensor, config)[row.paths.index(path)]
    except (ValueError, IndexError, TypeError):  # NumPy's, of sizes that cannot be split
        part = None
    if part is None or part.shape != shape:
        raise ModelError(f"{label}: {row.tensor} has shape {tensor.shape}, but {path} needs {shape}")
    part = part.astype(dtype)
    if not np.all(np.isfinite(part)):
        raise ModelError(f"{label}: {row.tensor} has values that are not finite in {np.dtype(dtype)}")
    return jnp.asarray(part)
