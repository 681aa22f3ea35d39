"""What every test gets: strict types in JAX, tiny models, and the real data where it is at hand."""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path

from support import compiling  # sets up the cache of compiled programs: before anything starts JAX

# isort: split

import jax
import numpy as np
import pytest
from hypothesis import settings
from support import ROOT, compat, order
from support.problems import TINY

from spqr_jax import Decoder, DecoderConfig
from spqr_jax.models.decoder import random_decoder

pytest_plugins = ["support.timing"]

jax.config.update("jax_numpy_dtype_promotion", "strict")
settings.register_profile("default", deadline=None, max_examples=30)  # the first example compiles
settings.load_profile("default")


def pytest_configure(config: pytest.Config) -> None:
    compiling.choose_optimization(quick="not slow" in config.option.markexpr)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    compat.mark(items)
    order.slowest_first(items)


@pytest.fixture(autouse=True, scope="module")
def _programs_are_let_go():
    """All tests' compiled programs together can take more memory maps than Linux grants a process; then it crashes."""
    yield
    if compiling.memory_maps() > compiling.MANY_MAPS:
        jax.clear_caches()
        gc.collect()


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
    path = ROOT.parent / "shared" / "data"
    if not (path / "wt2_test_ids.npy").is_file():
        pytest.skip("the WikiText-2 and PTB token ids are not beside this checkout (../shared/data)")
    return path
