"""Self-attention: one formula, computed head by head on a CPU and all at once elsewhere."""

from __future__ import annotations

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from spqr_jax.models.attention import KVCache, Positions, _attend_queries, _attend_self, _split_heads, attend


@pytest.fixture(scope="module")
def inputs():
    """q, k, v, padding of two sequences of 150 tokens (more than a chunk of queries), three query heads a key head."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, 150, heads, 8)), jnp.float32) for heads in (6, 2, 2))
    return q, k, v, jnp.array([0, 7])


def self_attention(q, k, v, padding):
    return _attend_self(*_split_heads(q, k, v), padding)


def test_it_is_causal_softmax_attention(inputs):
    q, k, v, padding = (np.asarray(a, np.float64) for a in inputs)
    got = np.asarray(self_attention(*inputs)).reshape(2, 150, 6, 8)
    for batch, head, token in [(0, 0, 0), (0, 5, 149), (1, 2, 130), (1, 3, 7)]:
        seen = slice(int(padding[batch]), token + 1)
        scores = k[batch, seen, head // 3] @ q[batch, token, head] / 8**0.5
        weights = np.exp(scores - scores.max())
        want = weights @ v[batch, seen, head // 3] / weights.sum()
        np.testing.assert_allclose(got[batch, token, head], want, atol=1e-5)


def test_all_heads_at_once_give_the_same(inputs):
    """What accelerators run: here the heads stand side by side."""
    q, k, v = _split_heads(*inputs[:3])
    at_once = jax.vmap(jax.vmap(_attend_queries, (0, 0, 0, None)))(q, k, v, inputs[3])
    want = self_attention(*inputs).reshape(2, 150, 2, 3, 8).transpose(0, 2, 3, 1, 4)
    np.testing.assert_allclose(at_once, want, atol=1e-5)


def test_gradients_pass(inputs):
    """Against a difference quotient."""
    q, k, v, padding = inputs
    probe = jax.random.normal(jax.random.key(0), (2, 150, 48))
    step = 1e-2 * jax.random.normal(jax.random.key(1), k.shape)

    def value(k):
        return jnp.vdot(probe, self_attention(q, k, v, padding))

    slope = float(value(k + step) - value(k - step)) / 2
    assert float(jnp.vdot(jax.grad(value)(k), step)) == pytest.approx(slope, rel=1e-2)


def test_an_accelerator_gets_no_loop_over_heads(inputs):
    def loops(platform):
        return jax.export.export(jax.jit(self_attention), platforms=[platform])(*inputs).mlir_module().count("while")

    assert loops("cpu") > 0
    assert loops("tpu") == loops("cuda") == 0


def test_one_token_at_a_time_gives_the_same(inputs):
    """From an empty cache, and after a prefill of 100 tokens."""
    q, k, v, padding = inputs
    want = self_attention(*inputs)

    @jax.jit
    def step(q, k, v, start, cache):
        nothing = jnp.zeros(0)
        return attend(q, k, v, Positions(nothing, nothing, padding, start), cache)

    for prefill in (0, 100):
        cache = KVCache(*(jnp.full((2, 2, 160, 8), 7.0) for _ in range(2)))  # what is not yet written does not count
        if prefill:
            _, cache = step(q[:, :prefill], k[:, :prefill], v[:, :prefill], jnp.int32(0), cache)
        for token in range(prefill, 150):
            here = slice(token, token + 1)
            got, cache = step(q[:, here], k[:, here], v[:, here], jnp.int32(token), cache)
            if token >= 7:  # the second sequence's padding is over
                np.testing.assert_allclose(got, want[:, here], atol=1e-5)
        np.testing.assert_array_equal(cache.keys[:, :, :150], k.transpose(0, 2, 1, 3))
        np.testing.assert_array_equal(cache.values[:, :, :150], v.transpose(0, 2, 1, 3))
