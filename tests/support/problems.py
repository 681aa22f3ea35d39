"""Small problems and models that many tests share, so that their programs are compiled once."""

from __future__ import annotations

import jax
import numpy as np

from spqr_jax import Decoder, DecoderConfig, SpQRArray, forward

TINY = DecoderConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    norm_eps=1e-5,
    rope_theta=10000.0,
    max_positions=128,
    tied_head=False,
    eos_token_ids=(2,),
)


def correlated_problem(out: int, inner: int, seed: int = 0, tokens: int | None = None) -> tuple[jax.Array, jax.Array]:
    """Weights [out, in] with heavy tails and inputs [tokens, in] whose features are correlated."""
    rng = np.random.default_rng(seed)
    mixing = np.eye(inner) + rng.standard_normal((inner, inner)) / np.sqrt(inner)
    x = rng.standard_normal((tokens or 4 * inner, inner)) @ mixing * np.exp(0.5 * rng.standard_normal(inner))
    w = 0.05 * rng.standard_t(4, (out, inner))
    return jax.device_put(w.astype(np.float32)), jax.device_put(x.astype(np.float32))


run_forward = jax.jit(forward)


def with_dense_weights(model: Decoder) -> Decoder:
    """The model with what its quantized weights stand for: all models of one size are then one program."""
    return jax.tree.map(
        lambda leaf: leaf.to_dense() if isinstance(leaf, SpQRArray) else leaf,
        model,
        is_leaf=lambda leaf: isinstance(leaf, SpQRArray),
    )


def divergence(model: Decoder, other: Decoder, tokens: np.ndarray) -> float:
    """Mean KL divergence of the next-token distributions of a model and of another, quantized or not, in nats."""
    scores = (np.asarray(run_forward(with_dense_weights(m), tokens), np.float64) for m in (model, other))
    p, q = (s - np.logaddexp.reduce(s, axis=-1, keepdims=True) for s in scores)
    return float(np.mean(np.sum(np.exp(p) * (p - q), axis=-1)))


def random_tokens(shape: tuple[int, ...], seed: int, vocabulary: int = TINY.vocab_size) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocabulary, shape).astype(np.int32)
