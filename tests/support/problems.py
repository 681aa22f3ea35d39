"""Small problems and models that many tests share, so that their programs are compiled once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from spqr_jax import DecoderConfig

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
    return jnp.asarray(w, jnp.float32), jnp.asarray(x, jnp.float32)
