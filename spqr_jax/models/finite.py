"""Activations and gradients that are no numbers, and what to do about them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spqr_jax.errors import NotFiniteError


def refuse_infinite(arrays: Iterable[jax.Array], where: str) -> None:
    """Checks activations or gradients on their way.

    Args:
      arrays: of one type, any shapes.
      where: in the model they are.

    Raises:
      NotFiniteError: some are infinite or no numbers.
    """
    for array in arrays:
        if not bool(all_finite(array)):
            raise NotFiniteError(f"{where} are not finite; {advice(array.dtype)}")


@jax.jit
def all_finite(array: jax.Array) -> jax.Array:
    return jnp.all(jnp.isfinite(array))


def advice(dtype: Any) -> str:
    """What to try when values of this type are no longer finite."""
    if np.dtype(dtype) == np.float16:
        return "float16 cannot hold values above 65504: try --dtype bfloat16 or --dtype float32"
    return (
        f"{np.dtype(dtype)} has enough range for model activations, so the weights themselves must be wrong: fetch or "
        "convert the model again, and check the dense model with 'spqr perplexity'"
    )
