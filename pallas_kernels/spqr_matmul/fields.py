"""Codes of a run, and for the TPU where a code of 2, 3 or 4 bits is in a half-word and how it becomes a float.

A half-word plane holds the codes of up to eight k-steps, one field each; three-bit codes
leave one bit over, and the spare bits of three planes are the code of a sixteenth step.

A field at bit p of a float's mantissa of m bits becomes a number by one AND and one OR: with
the exponent of 2^(m-p) above it, the half-word reads as 2^(m-p) + code. That offset is a
power of two, so taking it off again is exact.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

STEPS = 16
"""k-steps whose codes share a block of planes."""


@dataclasses.dataclass(frozen=True)
class Field:
    """One k-step's codes: in half-words of `plane`, shifted right by `shift`, from bit `position` on.

    Read as 16-bit floats with `mantissa` bits and an exponent's `bias`: float16, or bfloat16.
    """

    plane: int
    shift: int
    position: int
    mantissa: int
    bias: int

    @property
    def offset(self) -> int:
        """What is added to the code when its half-word is read as a float: 2^(mantissa - position)."""
        return 1 << (self.mantissa - self.position)

    @property
    def exponent(self) -> int:
        """The bits of the float that make that so."""
        return (self.bias + self.mantissa - self.position) << self.mantissa


def run_codes(words: jax.Array, bits: int) -> jax.Array:
    """The 16 codes of a run of the canonical format, uint32 [..., bits half-words] -> [..., 16]."""
    word, shift = np.divmod(np.arange(STEPS) * bits, 16)
    low = words[..., word]
    high = words[..., np.minimum(word + 1, bits - 1)]
    return (low | high << 16) >> jnp.asarray(shift, jnp.uint32) & ((1 << bits) - 1)


def planes_of(runs: jax.Array, bits: int, starts: Sequence[int]) -> jax.Array:
    """Planes of half-words whose field f begins at bit starts[f].

    Args:
      runs: uint32 [..., 16 steps, bits], a run of 16 codes a step.
      starts: where each field of a plane begins.

    Returns:
      uint32 [..., bits planes, 16 columns].
    """
    codes = run_codes(runs, bits)
    inside = codes[..., : bits * len(starts), :].reshape(*codes.shape[:-2], bits, len(starts), STEPS)
    shifts = jnp.asarray(starts, jnp.uint32)[:, None]
    planes = jax.lax.reduce(inside << shifts, np.uint32(0), jax.lax.bitwise_or, (inside.ndim - 2,))
    if bits * len(starts) < STEPS:
        bit = jnp.arange(bits, dtype=jnp.uint32)[:, None]
        planes |= (codes[..., -1:, :] >> bit & 1) << 15
    return planes
