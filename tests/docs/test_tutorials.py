"""The tutorials: every command and every Python block in them runs, and prints what they show."""

from __future__ import annotations

import jax.numpy as jnp
import pytest
from support import ROOT
from support.pages import run_page

from spqr_jax import ModelError
from spqr_jax.models.packaged import packaged_model

TUTORIALS = ROOT / "docs" / "tutorials"
WITH_THE_DEMO = ("quantize-and-chat.md", "size-budget.md", "compare-methods.md")


@pytest.mark.parametrize("page", WITH_THE_DEMO)
def test_a_tutorial_runs_with_a_tiny_model(page, tmp_path):
    run_page(TUTORIALS / page, tmp_path)


def test_the_flax_tutorial_runs(tmp_path):
    names = run_page(TUTORIALS / "flax.md", tmp_path)
    for logits in (names["logits"], names["linen_logits"]):
        assert logits.shape == (4, 32, 256)
        assert jnp.all(jnp.isfinite(logits))


def test_every_tutorial_is_run():
    assert {path.name for path in TUTORIALS.glob("*.md")} - {"index.md"} == {*WITH_THE_DEMO, "flax.md"}


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_THE_DEMO)
def test_a_tutorial_runs_as_it_is_written(page, tmp_path):
    try:
        packaged_model("demo")
    except ModelError as error:
        pytest.skip(f"the demo model is not at hand: {error}")
    run_page(TUTORIALS / page, tmp_path, real_demo=True)
