"""What every test gets: strict types in JAX, tiny models, and the real data where it is at hand."""

from __future__ import annotations

import atexit
import dataclasses
import gc
import os
import shutil
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import settings

from spqr_jax import Decoder, DecoderConfig
from spqr_jax.models.decoder import random_decoder

# Worker processes, and the many command lines that tests run, share what they compile.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="spqr-tests-compiled-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

jax.config.update("jax_numpy_dtype_promotion", "strict")
settings.register_profile("default", deadline=None, max_examples=30)  # the first example compiles
settings.load_profile("default")


def pytest_configure(config: pytest.Config) -> None:
    """Quick tests are mostly time in which XLA compiles: with less optimization, half of it or less.

    The slow tests compile as users do, and so does a run with flags of its own, if empty: ``XLA_FLAGS= scripts/test``.
    """
    if config.option.markexpr == "not slow":
        quick = "--xla_backend_optimization_level=0"
        if jax.__version_info__ < (0, 11):  # later versions have no other emitters
            quick += " --xla_cpu_use_fusion_emitters=false"
        os.environ.setdefault("XLA_FLAGS", quick)


@pytest.fixture(autouse=True, scope="module")
def _programs_are_let_go():
    """All tests' compiled programs together take more memory maps than Linux grants a process, and then it crashes."""
    yield
    jax.clear_caches()
    gc.collect()


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


@pytest.fixture(scope="session")
def tiny_config() -> DecoderConfig:
    return TINY


@pytest.fixture(scope="session")
def tiny_model() -> Decoder:
    return random_decoder(TINY, seed=0)


@pytest.fixture(scope="session")
def odd_model() -> Decoder:
    """Sizes that are no multiple of anything."""
    return random_decoder(
        dataclasses.replace(TINY, hidden_size=50, intermediate_size=75, num_heads=5, num_kv_heads=1, head_dim=10),
        seed=1,
    )


@pytest.fixture(scope="session")
def tiny_batches() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, TINY.vocab_size, (2, 32)).astype(np.int32) for _ in range(3)]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real token ids beside the checkout; tests that compare with published numbers need them."""
    path = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not (path / "wt2_test_ids.npy").is_file():
        pytest.skip("the WikiText-2 and PTB token ids are not beside this checkout (../shared/data)")
    return path


def correlated_problem(out: int, inner: int, seed: int = 0, tokens: int | None = None) -> tuple[jax.Array, jax.Array]:
    """Weights [out, in] with heavy tails and inputs [tokens, in] whose features are correlated."""
    rng = np.random.default_rng(seed)
    mixing = np.eye(inner) + rng.standard_normal((inner, inner)) / np.sqrt(inner)
    x = rng.standard_normal((tokens or 4 * inner, inner)) @ mixing * np.exp(0.5 * rng.standard_normal(inner))
    w = 0.05 * rng.standard_t(4, (out, inner))
    return jnp.asarray(w, jnp.float32), jnp.asarray(x, jnp.float32)
