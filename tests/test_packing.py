from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spqr_jax import SpQRError
from spqr_jax.packing import pack_codes, packed_words, unpack_codes


@given(bits=st.integers(1, 16), rows=st.integers(1, 5), runs=st.integers(0, 6), seed=st.integers(0, 2**32 - 1))
def test_round_trip_is_exact_and_wastes_nothing(bits, rows, runs, seed):
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (rows, 16 * runs))
    words = pack_codes(codes, bits)
    assert words.dtype == np.uint16
    assert words.nbytes * 8 == codes.size * bits
    np.testing.assert_array_equal(unpack_codes(words, bits), codes)


@given(bits=st.integers(1, 8), seed=st.integers(0, 1000))
def test_words_are_one_little_endian_bit_stream(bits, seed):
    codes = np.random.default_rng(seed).integers(0, 1 << bits, 16)
    stream = sum(int(code) << (bits * j) for j, code in enumerate(codes))
    words = [(stream >> (16 * k)) & 0xFFFF for k in range(bits)]
    np.testing.assert_array_equal(pack_codes(codes, bits), words)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_numpy_and_jitted_jax_agree(bits):
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (3, 5, 48)).astype(np.uint8)
    words = jax.jit(pack_codes, static_argnums=1)(jnp.asarray(codes), bits)
    np.testing.assert_array_equal(words, pack_codes(codes, bits))
    np.testing.assert_array_equal(jax.jit(unpack_codes, static_argnums=1)(words, bits), codes)


def test_high_bits_are_cut_off():
    np.testing.assert_array_equal(unpack_codes(pack_codes(np.full(16, 0xFF), 3), 3), np.full(16, 7))


@pytest.mark.parametrize(("count", "bits", "says"), [(17, 3, "pad it to 32"), (16, 0, "1..16"), (16, 17, "1..16")])
def test_bad_sizes_are_refused(count, bits, says):
    with pytest.raises(SpQRError, match=says):
        packed_words(count, bits)
