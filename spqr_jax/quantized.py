"""`QuantizedMatrix`: what every quantized weight can do, whatever its layout."""

from __future__ import annotations

import abc
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spqr_jax.errors import SpQRError


class QuantizedMatrix(abc.ABC):
    """A weight matrix W [out, in] in packed form, the base of `SpQRArray` and of prepared weights.

    It behaves like a read-only float32 matrix: ``x @ w.T`` and ``w @ x`` multiply, ``w.to_dense()`` and ``w.astype()``
    give a dense array. Subclasses are pytrees, so they pass through `jax.jit`, `jax.vmap` and `jax.tree.map`.

    Attributes:
      shape: (out, in).
    """

    shape: tuple[int, int]

    @abc.abstractmethod
    def multiply(self, x: jax.Array) -> jax.Array:
        """y = x Wᵀ for activations [..., in]; the result [..., out] has the type of `x`."""

    @abc.abstractmethod
    def to_dense(self, dtype: Any = jnp.float32) -> jax.Array:
        """The matrix [out, in] as a dense array of type `dtype`, its columns in the original order."""

    @abc.abstractmethod
    def take_rows(self, index: jax.Array) -> jax.Array:
        """Rows of the matrix, float32 [..., in] for int `index` [...]. Indices outside 0..out-1 are clipped."""

    @property
    def ndim(self) -> int:
        """Always 2."""
        return 2

    @property
    def dtype(self) -> np.dtype:
        """Always float32, in which the matrix is defined."""
        return np.dtype(np.float32)

    @property
    def size(self) -> int:
        """Number of weights, out * in."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves in memory, padding included."""
        return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(self))

    @property
    def T(self) -> Transposed:
        """The transpose [in, out]; ``x @ w.T`` is the product that a linear layer needs."""
        return Transposed(self)

    def astype(self, dtype: Any) -> jax.Array:
        """The same as `to_dense`: a dense array of type `dtype`."""
        return self.to_dense(dtype)

    def __matmul__(self, x: jax.Array) -> jax.Array:
        """W x for `x` [in] or [..., in, columns]."""
        if x.ndim == 1:
            return self.multiply(x)
        return jnp.swapaxes(self.multiply(jnp.swapaxes(x, -1, -2)), -1, -2)

    def __rmatmul__(self, x: jax.Array) -> jax.Array:
        """x W for `x` [..., out], through the dense matrix."""
        return x @ self.to_dense(x.dtype)

    def _check_input(self, x: jax.Array) -> None:
        if x.ndim < 1 or x.shape[-1] != self.shape[1]:
            raise SpQRError(f"linear: activations {x.shape} do not fit a weight of shape {self.shape} [out, in]")


@jax.tree_util.register_pytree_node_class
class Transposed:
    """The transpose of a quantized matrix, [in, out].

    Args:
      matrix: the quantized matrix W [out, in].
    """

    __array_priority__ = 1000  # NumPy arrays on the left leave the product to `__rmatmul__`

    def __init__(self, matrix: QuantizedMatrix) -> None:
        self._matrix = matrix

    @property
    def shape(self) -> tuple[int, int]:
        """(in, out)."""
        return self._matrix.shape[::-1]

    @property
    def T(self) -> QuantizedMatrix:
        """The matrix itself."""
        return self._matrix

    def to_dense(self, dtype: Any = jnp.float32) -> jax.Array:
        """Wᵀ [in, out] as a dense array of type `dtype`."""
        return self._matrix.to_dense(dtype).T

    def __matmul__(self, x: jax.Array) -> jax.Array:
        return self.to_dense(x.dtype) @ x

    def __rmatmul__(self, x: Any) -> jax.Array:
        return self._matrix.multiply(jnp.asarray(x))

    def __repr__(self) -> str:
        return f"{self._matrix!r}.T"

    def tree_flatten(self) -> tuple[tuple[QuantizedMatrix], None]:
        return (self._matrix,), None

    @classmethod
    def tree_unflatten(cls, _: None, children: tuple[QuantizedMatrix]) -> Transposed:
        return cls(children[0])


def is_quantized(leaf: Any) -> bool:
    """Whether `leaf` is a quantized weight. Use it as ``is_leaf`` of `jax.tree` functions."""
    return isinstance(leaf, QuantizedMatrix)


def quantized_leaves(tree: Any) -> list[Any]:
    """All quantized weights of a tree."""
    return [leaf for leaf in jax.tree.leaves(tree, is_leaf=is_quantized) if is_quantized(leaf)]
