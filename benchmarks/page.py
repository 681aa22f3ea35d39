"""Tables of a documentation page that a script makes: they stand between two HTML comments.

<!-- name --> begins a table, <!-- end of name --> ends it.
"""

from __future__ import annotations


def markdown(header: list[str], lines: list[list[str]], numbers_from: int | None = None) -> str:
    """A Markdown table. Columns from `numbers_from` on are set to the right."""
    right = len(header) if numbers_from is None else numbers_from
    ruler = ["---" if column < right else "---:" for column in range(len(header))]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ruler, *lines])


def with_tables(text: str, tables: dict[str, str]) -> str:
    """The page's text with these tables (by name) in place of those it has.

    Raises:
      ValueError: the page has no place for a table, or more than one.
    """
    for name, table in tables.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"the page must have {begin} and {end} once each")
        before, after_begin = text.split(begin)
        text = f"{before}{begin}\n{table}\n{end}{after_begin.split(end)[1]}"
    return text
