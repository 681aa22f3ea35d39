"""Relative links in Markdown files lead to files and headings that are there."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from support import ROOT
from support.markdown import anchors, links

DOCS = ROOT / "docs"
PAGES = sorted(
    path
    for path in [*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *ROOT.glob("examples/**/*.md")]
    if "_build" not in path.parts
)
DEEPEST_ON_SITE = 3  # myst_heading_anchors in docs/conf.py


def broken_links(page: Path) -> list[str]:
    """Each relative link of a page that leads nowhere, with the reason."""
    problems = []
    for link in links(page):
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            continue
        target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
        if not target.exists():
            problems.append(f"{link}: there is no such file")
        elif not target.is_relative_to(ROOT):
            problems.append(f"{link}: leaves the repository")
        elif parts.fragment and target.suffix == ".md":
            deepest = DEEPEST_ON_SITE if target.is_relative_to(DOCS) else 6
            if parts.fragment not in (there := anchors(target, deepest)):
                problems.append(f"{link}: there is no such heading, only {', '.join(sorted(there))}")
    return problems


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links(page):
    assert not broken_links(page)


def test_broken_links_are_noticed(tmp_path, monkeypatch):
    monkeypatch.setitem(broken_links.__globals__, "ROOT", tmp_path)
    (tmp_path / "other.md").write_text("# One `thing`, and another\n\n## Twice\n\n## Twice\n\n```\n# no heading\n```\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](other.md#one-thing-and-another) [b](other.md#twice-1) [c](https://example.org/none) `[code](none.md)`\n"
        "```\n[block](none.md)\n```\n"
        "[d](none.md) ![e](none.png) [f](other.md#no-heading) [g](#here)\n"
    )
    assert [problem.split(":")[0] for problem in broken_links(page)] == [
        "none.md",
        "none.png",
        "other.md#no-heading",
        "#here",
    ]


def test_every_page_is_in_its_index():
    """A page that no index names is lost on GitHub, where there is no menu."""
    for index in DOCS.glob("*/index.md"):
        pages = {path.name for path in index.parent.glob("*.md")} - {"index.md"}
        assert pages == {link for link in links(index) if "/" not in link}, index
        entries = index.read_text().partition("```{toctree}")[2].split("```")[0].split()
        assert {f"{entry}.md" for entry in entries[1:]} == pages, index
