"""n-bit codes to 16-bit words and back.

Sixteen consecutive b-bit codes along the last axis become exactly b words of
16 bits. Within such a run the codes form one little-endian bit stream: code j
occupies bits [j*b, (j+1)*b), and word k holds bits [16*k, 16*(k+1)). Nothing is
wasted for any b in 1..16, and one run never touches another, so any slice of
16 codes can be unpacked on its own.

The functions work on NumPy and on JAX arrays alike, also under ``jax.jit``.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spqr_jax.errors import SpQRError

CODES_PER_RUN = 16
"""Codes are packed in runs of this many: b words of 16 bits hold one run."""


def packed_words(num_codes: int, bits: int) -> int:
    """Number of uint16 words that hold `num_codes` codes of `bits` bits.

    Raises:
      SpQRError: `num_codes` is not a multiple of 16 or `bits` is outside 1..16.
    """
    if not 1 <= bits <= 16:
        raise SpQRError(f"bits must lie in 1..16, got {bits}")
    if num_codes % CODES_PER_RUN:
        raise SpQRError(
            f"codes are packed in runs of {CODES_PER_RUN}: but the last axis has {num_codes}; "
            f"pad it to {-(-num_codes // CODES_PER_RUN) * CODES_PER_RUN}"
        )
    return num_codes // CODES_PER_RUN * bits


def pack_codes(codes: Any, bits: int) -> Any:
    """Packs codes along the last axis.

    Args:
      codes: unsigned integers below 2**bits, shape [..., n], n a multiple of 16.
        Higher bits are cut off.
      bits: bits a code, 1..16.

    Returns:
      uint16 words, shape [..., n/16*bits], of the same array library.
    """
    xp = jnp if isinstance(codes, jax.Array) else np
    num_words = packed_words(codes.shape[-1], bits)
    mask = (1 << bits) - 1
    runs = (xp.asarray(codes).astype(xp.uint32) & mask).reshape(*codes.shape[:-1], -1, CODES_PER_RUN)
    begin = CODES_PER_RUN * np.arange(bits)  # of each word in the stream of bits
    words = xp.zeros((*runs.shape[:-1], bits), xp.uint32)
    for ahead in range(-(-16 // bits) + 1):  # so many codes may lie in one word
        code = begin // bits + ahead
        shift = code * bits - begin + 16  # to where the code lies in the upper half of 32 bits
        inside = (code < CODES_PER_RUN) & (shift < 32)
        shift = np.where(inside, shift, 0).astype(np.uint32)
        words = words | (runs[..., np.minimum(code, CODES_PER_RUN - 1)] << shift >> 16)
    return words.astype(xp.uint16).reshape(*codes.shape[:-1], num_words)


def unpack_codes(words: Any, bits: int) -> Any:
    """Unpacks what :func:`pack_codes` packed.

    Args:
      words: uint16, shape [..., m], m a multiple of `bits`.
      bits: bits a code, 1..16.

    Returns:
      Codes of shape [..., m/bits*16]: uint8 up to 8 bits, uint16 above.
    """
    xp = jnp if isinstance(words, jax.Array) else np
    if not 1 <= bits <= 16:
        raise SpQRError(f"bits must lie in 1..16, got {bits}")
    if words.shape[-1] % bits:
        raise SpQRError(f"{words.shape[-1]} words do not divide into runs of {bits}-bit codes")
    runs = xp.asarray(words).astype(xp.uint32).reshape(*words.shape[:-1], -1, bits)
    mask = (1 << bits) - 1
    codes = []
    for j in range(CODES_PER_RUN):
        k, shift = divmod(j * bits, 16)
        code = runs[..., k] >> shift
        if shift + bits > 16:
            code = code | (runs[..., k + 1] << (16 - shift))
        codes.append((code & mask).astype(xp.uint8 if bits <= 8 else xp.uint16))
    out = xp.stack(codes, axis=-1)
    return out.reshape(*words.shape[:-1], words.shape[-1] // bits * CODES_PER_RUN)
