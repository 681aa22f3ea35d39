"""Self-attention: one formula, computed head by head on a CPU and all at once elsewhere."""

from __future__ import annotations

from functools import partial

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import cpu_kernels
from spqr_jax.models.attention import (
    AttentionRules,
    KVCache,
    Positions,
    _merge_heads,
    _split_heads,
    attend,
    rotate,
)
from spqr_jax.models.prompt_attention import attend_in_loop, attend_queries, attend_self

needs_library = pytest.mark.skipif(
    not cpu_kernels.kernel_names(), reason="the native CPU kernels are not built (python -m cpu_kernels)"
)


@pytest.fixture(scope="module")
def inputs():
    """q, k, v, padding of two sequences of 150 tokens (more than a chunk of queries), three query heads a key head."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 150, heads, 8)).astype(np.float32) for heads in (6, 2, 2))
    return q, k, v, np.array([0, 7], np.int32)


RULES = AttentionRules()


def at(angle, padding, start):
    """Tokens from position `start` on, with these rotary angles."""
    index = start + jnp.arange(angle.shape[1]) - padding[:, None]
    rotary = jnp.cos(angle), jnp.sin(angle)
    return Positions(index, padding, jnp.asarray(start, jnp.int32), rotary, rotary)


def rotate_both(q, k, angle):
    rotary = jnp.cos(angle), jnp.sin(angle)
    return rotate(q, rotary), rotate(k, rotary)


@jax.jit
def self_attention(q, k, v, padding):
    return _merge_heads(attend_self(None, None, *_split_heads(q, k, v), padding))


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

    @jax.jit
    def all_at_once(q, k, v, padding):
        return jax.vmap(jax.vmap(partial(attend_queries, None, None), (0, 0, 0, None)))(*_split_heads(q, k, v), padding)

    at_once = all_at_once(*inputs)
    want = self_attention(*inputs).reshape(2, 150, 2, 3, 8).transpose(0, 2, 3, 1, 4)
    np.testing.assert_allclose(at_once, want, atol=1e-5)


def test_gradients_pass(inputs):
    """Against a difference quotient."""
    q, k, v, padding = inputs
    rng = np.random.default_rng(1)
    probe = rng.standard_normal((2, 150, 48)).astype(np.float32)
    step = (1e-2 * rng.standard_normal(k.shape)).astype(np.float32)

    @jax.jit
    def value_and_gradient(k):
        return jax.value_and_grad(lambda k: jnp.vdot(probe, self_attention(q, k, v, padding)))(k)

    slope = float(value_and_gradient(k + step)[0] - value_and_gradient(k - step)[0]) / 2
    assert float(np.vdot(value_and_gradient(k)[1], step)) == pytest.approx(slope, rel=1e-2)


def test_an_accelerator_gets_no_loop_over_heads(inputs):
    """A short text has no loop there, a longer one has a loop over chunks of queries."""
    q, k, v, padding = inputs

    def loops(platform, tokens):
        cut = *(np.tile(a, (1, 4, 1, 1))[:, :tokens] for a in (q, k, v)), padding
        return jax.export.export(self_attention, platforms=[platform])(*cut).mlir_module().count("stablehlo.while")

    assert loops("cpu", 100) > 0
    assert loops("tpu", 512) == loops("cuda", 512) == 0
    assert loops("tpu", 600) == loops("cuda", 600) == 1


@pytest.mark.parametrize(("window", "tokens"), [(None, 150), (20, 150), (20, 70)])
def test_a_loop_over_queries_gives_the_same(inputs, window, tokens):
    """Chunks of 32 in a loop against chunks that are written out; 70 queries follow 80 earlier keys."""
    q, k, v = (a[1] for a in _split_heads(*inputs[:3]))
    given = q[0, :, -tokens:], k[0], v[0], inputs[3][1]
    looped = jax.jit(partial(attend_in_loop, None, window, chunk=32))
    want = jax.jit(partial(attend_queries, None, window))(*given)
    real = slice(max(0, 7 + tokens - 150), None)  # the first 7 queries of the text are padding: any mean of values
    np.testing.assert_allclose(looped(*given)[:, real], want[:, real], atol=1e-5)


CASES = [("xla", 8, 3), ("xla", 32, 3)] + [
    (kernels, *shape) for kernels in cpu_kernels.kernel_names() for shape in ((32, 3), (48, 1), (16, 6))
]


@pytest.mark.parametrize(("implementation", "dim", "share"), CASES)
def test_one_token_at_a_time_gives_the_same(monkeypatch, implementation, dim, share):
    """XLA's formula and each native kernel, after a prefill; the cache is longer than what kernels look at together."""
    monkeypatch.setenv(cpu_kernels.KERNELS_VARIABLE, "none" if implementation == "xla" else implementation)
    jax.clear_caches()  # of what was traced with other kernels
    rng, tokens, prefill = np.random.default_rng(dim), 80, 50
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    q, k, v = draw(2, tokens, 2 * share, dim), draw(2, tokens, 2, dim), draw(2, tokens, 2, dim)
    padding, angle = np.array([0, 7], np.int32), draw(2, tokens, dim // 2)

    @jax.jit
    def step(q, k, v, angle, start, cache):
        return attend(RULES, q, k, v, at(angle, padding, start), cache)

    # what is not yet written does not count
    cache = KVCache(*(np.full((2, 2, tokens + 10, dim), 7.0, np.float32) for _ in range(2)))
    outputs = []
    for first, last in [(0, prefill), *((token, token + 1) for token in range(prefill, tokens))]:
        out, cache = step(*(a[:, first:last] for a in (q, k, v, angle)), np.int32(first), cache)
        outputs.append(out)
    got = np.concatenate(outputs, axis=1)
    q, k = (np.asarray(a) for a in jax.jit(rotate_both)(q, k, angle))
    want = self_attention(q, k, v, padding)
    np.testing.assert_allclose(got[0], want[0], atol=1e-5)
    np.testing.assert_allclose(got[1, 7:], want[1, 7:], atol=1e-5)  # after the second sequence's padding
    cache = jax.tree.map(np.asarray, cache)
    np.testing.assert_allclose(cache.keys[:, :, :tokens], k.transpose(0, 2, 1, 3), atol=1e-6)
    np.testing.assert_array_equal(cache.values[:, :, :tokens], v.transpose(0, 2, 1, 3))


def test_a_text_may_start_from_an_empty_cache():
    """Without a prefill: the first token sees itself only."""
    rng = np.random.default_rng(3)
    k, v = (rng.standard_normal((1, 1, 2, 16)).astype(np.float32) for _ in range(2))

    @jax.jit
    def first_token(k, v, cache):
        where = at(jnp.zeros((1, 1, 8)), jnp.zeros(1, jnp.int32), 0)
        return attend(RULES, k, k, v, where, cache)[0]

    out = first_token(k, v, KVCache(*(np.full((1, 2, 4, 16), 9.0, np.float32) for _ in range(2))))
    np.testing.assert_allclose(out, v.reshape(1, 1, 32), rtol=1e-6)


attend_natively = jax.jit(cpu_kernels.attend, static_argnames="kernels")


@needs_library
def test_large_scores_and_long_caches_are_right():
    """Scores in the hundreds over some spans of positions, against float64."""
    rng = np.random.default_rng(1)
    keys, values = (rng.standard_normal((1, 1, 1000, 16)).astype(np.float32) for _ in range(2))
    q = (100 * rng.standard_normal((1, 1, 2, 16))).astype(np.float32)
    ones, zeros = np.ones((1, 8), np.float32), np.zeros((1, 8), np.float32)
    out, *_ = attend_natively(
        *(q, keys[:, :, 900], values[:, :, 900], ones, zeros, keys, values, np.array([130], np.int32), np.int32(900))
    )
    scores = q[0, 0].astype(np.float64) @ keys[0, 0, 130:901].T.astype(np.float64) / 4
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    want = weights @ values[0, 0, 130:901] / weights.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(out[0, 0], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernels", cpu_kernels.kernel_names())
@pytest.mark.parametrize("where", ["q", "keys", "values"])
def test_what_is_no_number_stays_so(kernels, where):
    """NaN in the query, in one key or in one value that is looked at, and nothing of what is not."""
    arrays = {"q": np.ones((1, 1, 1, 16), np.float32)} | {
        n: np.ones((1, 1, 100, 16), np.float32) for n in ("keys", "values")
    }

    def out(position):
        ones, zeros, one = np.ones((1, 8), np.float32), np.zeros((1, 8), np.float32), np.ones((1, 1, 16), np.float32)
        given = (arrays["q"], one, one, ones, zeros, arrays["keys"], arrays["values"])
        return np.asarray(attend_natively(*given, np.zeros(1, np.int32), np.int32(position), kernels=kernels)[0])

    assert np.all(np.isfinite(out(90)))
    arrays[where][0, 0, 70 if where != "q" else 0] = np.nan
    assert np.all(np.isnan(out(90)))
    assert where == "q" or np.all(np.isfinite(out(60)))


@needs_library
def test_native_attention_under_transformations():
    """vmap, and the gradient, which XLA's formula gives."""
    rng = np.random.default_rng(2)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    q, k, v, angle = draw(3, 2, 1, 4, 16), draw(3, 2, 1, 2, 16), draw(3, 2, 1, 2, 16), draw(3, 2, 1, 8)
    keys, values = draw(3, 2, 2, 40, 16), draw(3, 2, 2, 40, 16)

    def out(q, k, v, angle, keys, values):
        where = at(angle, jnp.array([0, 3]), 20)
        return attend(RULES, q, k, v, where, KVCache(keys, values))[0]

    singly = jax.jit(out)
    together = jax.jit(jax.vmap(out))(q, k, v, angle, keys, values)
    for i in range(3):
        np.testing.assert_allclose(together[i], singly(*(a[i] for a in (q, k, v, angle, keys, values))), atol=1e-6)
    probe = (1e-2 * draw(2, 2, 40, 16)).astype(np.float32)

    @jax.jit
    def value(keys):
        return jnp.sum(jnp.sin(out(q[0], k[0], v[0], angle[0], keys, values[0])))

    difference = float(value(keys[0] + probe) - value(keys[0] - probe)) / 2
    assert float(np.vdot(jax.jit(jax.grad(value))(keys[0]), probe)) == pytest.approx(difference, rel=1e-2)


@needs_library
def test_the_cache_is_written_in_place():
    """A donated cache is not copied: no copy of its shape in the compiled step."""
    cache = KVCache(*(jnp.zeros((1, 2, 160, 16)) for _ in range(2)))
    one = jnp.zeros((1, 1, 2, 16))

    def step(x, cache, start):
        angle = jnp.zeros((1, 1, 8))
        return attend(RULES, x, x, x, at(angle, jnp.zeros(1, jnp.int32), start), cache)

    compiled = jax.jit(step, donate_argnums=1).lower(one, cache, jnp.int32(3)).compile()
    assert "spqr_attend" in compiled.as_text()
    assert "f32[1,2,160,16]{3,2,1,0} copy(" not in compiled.as_text()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= 2 * 2 * 160 * 16 * 4
    assert memory.temp_size_in_bytes < 160 * 16 * 4


@needs_library
def test_what_does_not_fit_is_named():
    q, k, angle, cache = jnp.zeros((1, 1, 1, 16)), jnp.zeros((1, 1, 16)), jnp.zeros((1, 8)), jnp.zeros((1, 1, 4, 16))
    rest = (jnp.zeros(1, jnp.int32), jnp.int32(0))
    with pytest.raises(ValueError, match=r"v must be float32 \(1, 1, 16\)"):
        cpu_kernels.attend(q, k, k[..., :8], angle, angle, cache, cache, *rest)
    with pytest.raises(ValueError, match="padding and position"):
        cpu_kernels.attend(q, k, k, angle, angle, cache, cache, jnp.zeros(2, jnp.int32), jnp.int32(0))
    with pytest.raises(ValueError, match="four axes"):
        cpu_kernels.attend(q[0], k, k, angle, angle, cache, cache, *rest)
    with pytest.raises(ValueError, match="multiple of 16"):
        cpu_kernels.attend(
            q[..., :8], k[..., :8], k[..., :8], angle[:, :4], angle[:, :4], cache[..., :8], cache[..., :8], *rest
        )
