"""Elements of bfloat16, float16 and float32 arrays in a thread of the kernel, where all arithmetic is in float32."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from pallas_kernels import machine as m
from pallas_kernels.machine import Address, Bool, Float, Word


def unpack(word: Word, dtype: Any) -> list[Float]:
    """The elements of a word as float32."""
    if dtype == jnp.float32:
        return [word.float()]
    if dtype == jnp.float16:
        return [word.pair()[0], word.pair()[1]]
    return [(word << 16).float(), (word & 0xFFFF0000).float()]


def load_element(base: Address, index: Word, dtype: Any, when: Bool) -> Float:
    """One element of device memory as float32, zero where `when` does not hold."""
    if dtype == jnp.float32:
        return m.load(base.at(index), when=when, policy=m.PLAIN)[0].float()
    return unpack(m.load_half(base.at(index, 2), when=when, policy=m.PLAIN), dtype)[0]


def round_to(value: Float, dtype: Any) -> tuple[Word, Float]:
    """The bits of a value that is rounded to nearest, and the value again."""
    if dtype == jnp.float32:
        return value.word(), value
    zero = m.number(0.0)
    bits = m.as_pair(value, zero).word() if dtype == jnp.float16 else m.as_bfloat16(value, zero)
    return bits, unpack(bits, dtype)[0]


def store_element(base: Address, index: Word, bits: Word, dtype: Any, when: Bool) -> None:
    """The bits of one element to device memory."""
    if dtype == jnp.float32:
        m.store(base.at(index), [bits], when=when)
    else:
        m.store_half(base.at(index, 2), bits, when=when)
