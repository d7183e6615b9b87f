"""Tables between markers on a page, whose prose stays as somebody wrote it.

A table named ``speed`` stands between ``<!-- bench:speed -->`` and ``<!-- /bench:speed -->``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["check_markers", "replaced", "table"]


def markers(name: str) -> tuple[str, str]:
    """Before and behind a table."""
    return f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"


def check_markers(text: str, names: Sequence[str], page: str | Path) -> None:
    """Check that each table has its place.

    Args:
        text: of the page.
        names: of the tables.
        page: for the message.

    Raises:
        ValueError: naming the page and the marker that is missing, there twice, or before its
            beginning.
    """
    for name in names:
        first, last = markers(name)
        for marker in (first, last):
            if (count := text.count(marker)) != 1:
                raise ValueError(f"{page} must hold {marker} once, it is there {count} times")
        if text.index(first) > text.index(last):
            raise ValueError(f"{page} has {last} before {first}")


def replaced(text: str, name: str, content: str, page: str | Path = "the page") -> str:
    """The page with another table; all that is outside of its markers is as it was.

    Raises:
        ValueError: as :func:`check_markers`, or if ``content`` holds a marker.
    """
    check_markers(text, [name], page)
    if "<!-- " in content:
        raise ValueError(f"a table may hold no markers, got {content!r}")
    first, last = markers(name)
    before, rest = text.split(first)
    behind = rest.split(last)[1]
    return f"{before}{first}\n\n{content.strip()}\n\n{last}{behind}"


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in Markdown.

    Raises:
        ValueError: for a row of another length than the head.
    """
    for row in rows:
        if len(row) != len(head):
            raise ValueError(f"a row must have {len(head)} cells, got {list(row)}")
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
