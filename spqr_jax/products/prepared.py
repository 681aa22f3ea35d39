"""`PreparedMatrix`: quantized weights in the layout that a backend's kernels read."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import jax

from spqr_jax.quantized import QuantizedMatrix


class PreparedMatrix(QuantizedMatrix):
    """A quantized matrix W [out, in] in a backend's own layout. `prepare` makes it; every backend has its subclass.

    Attributes:
      shape: (out, in).
    """

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.shape})"

    def multiply(self, x: jax.Array) -> jax.Array:
        self._check_input(x)
        return self.multiply_all(x, [self])[0]

    @classmethod
    @abc.abstractmethod
    def multiply_all(cls, x: jax.Array, ws: Sequence[Any]) -> list[jax.Array]:
        """x [..., in] times several matrices of this class: [..., out] each, in the type of x."""
