"""The links, headings and code of a Markdown file, as GitHub sees them."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

_FENCE = re.compile(r"^( *)(`{3,}|~{3,})[^\n]*\n.*?^\1?\2[`~]* *$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"(`+)(?!`).*?(?<!`)\1(?!`)", re.DOTALL)
_LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\[\]]*\])*\]\(\s*<?([^)>\s]+)>?(?:\s+\"[^\"]*\")?\s*\)")
_REFERENCE = re.compile(r"^ {0,3}\[[^\]]+\]:\s+<?(\S+?)>?\s*$", re.MULTILINE)
_HEADING = re.compile(r"^ {0,3}(#{1,6})\s+(.+?)\s*#*\s*$", re.MULTILINE)


def without_code(text: str) -> str:
    """The text without blocks between fences."""
    return _FENCE.sub("", text)


def links(path: Path) -> list[str]:
    """Targets of all links and images that stand in the text, code left out."""
    text = _CODE.sub("", without_code(path.read_text()))
    return [match.group(1) for pattern in (_LINK, _REFERENCE) for match in pattern.finditer(text)]


def anchors(path: Path, deepest: int = 6) -> set[str]:
    """GitHub's slugs of the headings: letters, digits, - and _ in lower case; a repeated one is numbered."""
    counts: dict[str, int] = {}
    slugs = set()
    for hashes, title in _HEADING.findall(without_code(path.read_text())):
        title = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", title)  # a link counts by its text
        kept = [c for c in title.lower() if c in " -_" or unicodedata.category(c)[0] in "LN"]
        slug = "".join(kept).replace(" ", "-")
        count = counts.get(slug, 0)
        counts[slug] = count + 1
        if len(hashes) <= deepest:
            slugs.add(f"{slug}-{count}" if count else slug)
    return slugs
