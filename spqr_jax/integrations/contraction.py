"""Layers that multiply by a kernel, whatever its axes, seen as products with one matrix [out, in]."""

from __future__ import annotations

import dataclasses
import math
import string
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from spqr_jax.errors import SpQRError
from spqr_jax.products import linear


@dataclasses.dataclass(frozen=True)
class Contraction:
    """How a layer's kernel meets its input.

    Made by `over_axes` and `of_equation`.

    Attributes:
      kernel_shape: of the kernel.
      contracted: its axes that are summed over: together `in`.
      free: its other axes: together `out`.
      x_axes: the input's axes that meet `contracted`, without an equation.
      equation: (input, kernel, result) of an einsum, or None.
    """

    kernel_shape: tuple[int, ...]
    contracted: tuple[int, ...]
    free: tuple[int, ...]
    x_axes: tuple[int, ...] = ()
    equation: tuple[str, str, str] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the matrix."""
        sizes = self.kernel_shape
        return math.prod(sizes[axis] for axis in self.free), math.prod(sizes[axis] for axis in self.contracted)

    def matrix(self, kernel: Any) -> jax.Array:
        """A kernel as a matrix [out, in]."""
        return jnp.transpose(kernel, (*self.free, *self.contracted)).reshape(self.shape)

    def rows(self, x: jax.Array) -> jax.Array:
        """An input as rows that the matrix multiplies, [..., in].

        Raises:
          SpQRError: it does not fit the kernel.
        """
        axes = self._axes_of(x)
        sizes = tuple(self.kernel_shape[axis] for axis in self.contracted)
        if tuple(x.shape[axis] for axis in axes) != sizes:
            raise SpQRError(f"an input of shape {x.shape} does not fit a kernel of shape {self.kernel_shape}")
        lead = [axis for axis in range(x.ndim) if axis not in axes]
        return jnp.transpose(x, (*lead, *axes)).reshape(*(x.shape[axis] for axis in lead), -1)

    def product(self, weight: Any, x: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        """What the layer gives, with a dense or quantized matrix in place of its kernel."""
        y = linear(weight, self.rows(x))
        free = tuple(self.kernel_shape[axis] for axis in self.free)
        y = y.reshape(*y.shape[:-1], *free)
        if self.equation is None:
            return y if bias is None else y + bias.reshape(free).astype(y.dtype)
        given, kernel, result = self._spelled(x.ndim)
        made = [label for label in given if label not in kernel] + [kernel[axis] for axis in self.free]
        y = jnp.transpose(y, [made.index(label) for label in result])
        if bias is None:
            return y
        sizes = [self.kernel_shape[kernel.index(label)] if label in kernel else 1 for label in result]
        return y + bias.reshape(sizes).astype(y.dtype)

    def _axes_of(self, x: jax.Array) -> tuple[int, ...]:
        if self.equation is None:
            return tuple(axis % x.ndim for axis in self.x_axes)
        given, kernel, _ = self._spelled(x.ndim)
        return tuple(given.index(kernel[axis]) for axis in self.contracted)

    def _spelled(self, ndim: int) -> tuple[str, str, str]:
        """The equation for an input of so many axes, letters in place of dots."""
        assert self.equation is not None
        given, kernel, result = self.equation
        missing = ndim - len(given.replace("...", ""))
        if missing < 0 or (missing and "..." not in given):
            raise SpQRError(f"an input of {ndim} axes does not fit the equation {given},{kernel}->{result}")
        unused = [letter for letter in string.ascii_letters if letter not in given + kernel + result]
        dots = "".join(unused[:missing])
        return given.replace("...", dots), kernel, result.replace("...", dots)


def over_axes(kernel_shape: Sequence[int], axes: Sequence[int]) -> Contraction:
    """A kernel whose first axes meet `axes` of the input, in order; the result ends with its other axes."""
    count = len(axes)
    return Contraction(
        tuple(kernel_shape), tuple(range(count)), tuple(range(count, len(kernel_shape))), tuple(int(a) for a in axes)
    )


def of_equation(kernel_shape: Sequence[int], equation: str) -> Contraction:
    """A kernel that is the second operand of an einsum.

    Raises:
      SpQRError: it is no product with one matrix: an axis of the kernel stands in input and result both, or dots in it.
    """
    operands, _, result = equation.replace(" ", "").partition("->")
    given, _, kernel = operands.partition(",")
    contracted = tuple(i for i, label in enumerate(kernel) if label in given and label not in result)
    free = tuple(i for i, label in enumerate(kernel) if label not in given and label in result)
    lead = set(given.replace("...", "")) - set(kernel)
    if (
        len(contracted) + len(free) != len(kernel)
        or len(set(kernel)) != len(kernel_shape)
        or not lead <= set(result)
        or ("..." in given) != ("..." in result)
    ):
        raise SpQRError(f"einsum {equation!r} is not a product of the whole input with one matrix")
    return Contraction(tuple(kernel_shape), contracted, free, equation=(given, kernel, result))
