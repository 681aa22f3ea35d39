"""The tutorials: every command and every Python block in them runs, and prints what they show."""

from __future__ import annotations

import jax.numpy as jnp
import pytest
from support import ROOT
from support.pages import blocks_to_run, check_shown, console_steps, run_page

from spqr_jax import ModelError
from spqr_jax.models.packaged import packaged_model

TUTORIALS = ROOT / "docs" / "tutorials"
WITH_THE_DEMO = ("quantize-and-chat.md", "size-budget.md", "compare-methods.md")


def _skip_without_figures(page: str) -> None:
    if "$ spqr report" in (TUTORIALS / page).read_text(encoding="utf-8"):
        pytest.importorskip("matplotlib", reason="the report's figures need the extra `plots`")


@pytest.mark.parametrize("page", WITH_THE_DEMO)
def test_a_tutorial_runs_with_a_tiny_model(page, tmp_path):
    _skip_without_figures(page)
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
    _skip_without_figures(page)
    try:
        packaged_model("demo")
    except ModelError as error:
        pytest.skip(f"the demo model is not at hand: {error}")
    run_page(TUTORIALS / page, tmp_path, real_demo=True)


# ---- the harness itself -----------------------------------------------------------------------


def written(folder, text):
    page = folder / "page.md"
    page.write_text(text)
    return page


@pytest.mark.parametrize(
    ("block", "says"),
    [
        ("```console\n$ spqr inspect small --no-such-option\n```", "exits with 2"),
        ("```console\n$ rm -r small\n```", "a page may run spqr"),
        ("```console\n$ spqr inspect small | head\n```", "no pipes"),
        ("```python\nimport spqr_jax\nspqr_jax.quantise()\n```", "quantise"),
        ('```python\nprint("3 bits")  # 4 codes\n```', "no such line is printed"),
        ("```\nspqr inspect small\n```", "is not run"),
        ("```python\nx = 1\n", "not closed"),
    ],
)
def test_a_wrong_page_fails(tmp_path, block, says):
    with pytest.raises(AssertionError, match=says):
        run_page(written(tmp_path, block), tmp_path, real_demo=True)


def test_shown_output_is_compared_by_its_words():
    printed = [
        "starting",
        "┃ weight ┃ shape ┃",
        "│ layers.0.q_proj │ 2×2 │",
        "small: 4.2 ideal and 4.3 stored bits, 9 MB",
    ]
    check_shown(["┃ weight ┃ shape ┃", "...", "small: 3.1 ideal and 3.2", "stored bits, 80 MB"], [[], printed], "page")
    for wrong in (["┃ weight ┃ size ┃"], ["small: 3.1 stored bits", "┃ weight ┃ shape ┃"]):
        with pytest.raises(AssertionError, match="no such line is printed"):
            check_shown(wrong, [[], printed], "page")


def test_blocks_that_are_not_run(tmp_path):
    page = written(
        tmp_path, "<!-- not run: no network -->\n```bash\npip\n```\n\n```text\nx\n```\n\n```python\ny\n```\n"
    )
    assert [(block.lines, block.line) for block in blocks_to_run(page)] == [(("y",), 11)]


def test_console_blocks_are_commands_and_what_they_show():
    first, second = console_steps("$ spqr a \\\n    --b 'c d'  # why\nshown\n$ spqr e\n> typed\nanswer")
    assert first.command == ("spqr", "a", "--b", "c d")
    assert (first.shown, first.typed) == (("shown",), ())
    assert (second.shown, second.typed) == (("answer",), ("typed",))
